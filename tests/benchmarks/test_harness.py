"""Benchmarks write a file only with --keep or --output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path for path in BENCHMARKS.glob("*.py") if path.name != "harness.py")


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    return harness


def test_without_an_option_the_result_is_printed_and_nothing_written(harness, tmp_path, capsys):
    options = harness.result_parser("about").parse_args([])
    harness.write_result(options, tmp_path / "kept.json", {"ratio": 2.0}, {"summary": 1})
    assert json.loads(capsys.readouterr().out) == {"ratio": 2.0} and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--keep", "--output"])
def test_with_an_option_the_file_is_written_and_the_summary_printed(harness, tmp_path, capsys, option):
    kept, other = tmp_path / "folder" / "kept.json", tmp_path / "other.json"
    options = harness.result_parser("about").parse_args([option] if option == "--keep" else [option, str(other)])
    harness.write_result(options, kept, {"ratio": 2.0}, {"summary": 1})
    written = kept if option == "--keep" else other
    assert json.loads(written.read_text()) == {"ratio": 2.0} and kept.exists() != other.exists()
    assert json.loads(capsys.readouterr().out) == {"summary": 1}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_writes_through_the_harness(script):
    code = script.read_text()
    assert "result_parser(__doc__)" in code or "import compare_arms" in code
    assert "write_result(" in code or "compare_arms(" in code
    assert "KEPT.write" not in code and 'with_suffix(".json").write' not in code


def test_a_benchmark_leaves_the_repository_unchanged(tmp_path):
    kept = BENCHMARKS / "memory_estimates.json"
    before = kept.read_bytes(), kept.stat().st_mtime_ns
    command = [sys.executable, str(BENCHMARKS / "memory_estimates.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(before[0])
    assert (kept.read_bytes(), kept.stat().st_mtime_ns) == before and list(tmp_path.iterdir()) == []


def test_a_disturbed_measurement_is_taken_again_and_marked_if_it_stays_so(harness, tmp_path):
    script = tmp_path / "measure.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "tries = pathlib.Path(sys.argv[1]); n = int(tries.read_text()) + 1; tries.write_text(str(n))\n"
        "busy = {'verdict': 'disturbed', 'why': 'busy'}\n"
        "print(json.dumps({'n': n, 'disturbance': busy if n < int(sys.argv[2]) else {'verdict': 'quiet'}}))\n"
    )
    for quiet_from, expected in ((2, 2), (9, 3)):
        (tmp_path / "tries").write_text("0")
        result = harness.in_fresh_process(str(script), [str(tmp_path / "tries"), str(quiet_from)])
        assert result["n"] == expected
        assert harness.disturbed(result) == ("busy" if quiet_from == 9 else None)


def test_a_disturbed_round_has_no_ratio_and_counts_only_if_there_is_no_other(harness):
    def rounds(*busy: bool) -> list:
        made = []
        for number, is_busy in enumerate(busy, 1):
            found = {"verdict": "disturbed" if is_busy else "quiet", "why": "busy" if is_busy else None}
            figures = {"losses": [1.0], "gradient_norms": [1.0], "peak_memory_bytes": 1, "disturbance": found}
            speeds = {"trl-default": 1.0, "trl-best": 1.0, "peft-recipes": float(number)}
            by_arm = {arm: {**figures, "tokens_per_second": speed} for arm, speed in speeds.items()}
            made.append((harness._summary(by_arm), by_arm))
        return made

    summary, _ = harness._median_round(rounds(True, False, True))
    assert summary["ratio_to_trl_best"] == 2.0 and not summary["disturbed"]
    summary, _ = harness._median_round(rounds(True, True))
    assert summary["ratio_to_trl_best"] is None and summary["disturbed"]["peft-recipes"] == "busy"
