"""The figures in README.md, docs/ and adapters/ are those of the files they name."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess

import pytest
from blocks import PAGES, ROOT
from safetensors import safe_open

from peft_recipes import load_recipe, read_comparison

KEPT = ROOT / "adapters" / "mnist-shift"


@pytest.fixture(scope="module")
def writer():
    spec = importlib.util.spec_from_file_location("write_readme", ROOT / "adapters" / "write_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_block_of_figures_is_as_its_files_give_it(writer):
    for page in writer.pages():
        assert writer.filled(page) == page.read_text(encoding="utf-8"), f"{page}: run `make readme`"
    assert writer.index(writer.kept()) == (ROOT / "adapters" / "README.md").read_text(encoding="utf-8")


def test_the_blocks_are_where_a_reader_looks_for_them():
    places = {
        "README.md": ["results"], "docs/index.md": ["results"], "docs/gallery/mnist-shift.md": ["results"],
        "docs/gallery/smollm2-alpaca.md": ["results"], "docs/gallery/smollm2-arithmetic.md": ["results"],
        "docs/concepts/packing.md": ["speed"],
        "docs/concepts/guards.md": ["trust"], "docs/concepts/measurements.md": ["cost"],
        "benchmarks/README.md": ["gpu", "cost"], "docs/guides/serve.md": ["load"],
        "docs/guides/cluster.md": ["cluster"], "docs/guides/seeds-and-verdicts.md": ["turns"],
        "docs/guides/shared-base.md": ["shared"], "docs/guides/learning-rate-and-rank.md": ["scans"],
    }  # fmt: skip
    for page, names in places.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert re.findall(r"<!-- /(\w+) -->", text) == names, page
        assert all(len(block) > 200 for block in re.findall(r"-->\n(.*?)<!-- /", text, re.DOTALL)), page


def test_the_table_in_the_readme_has_three_seeds_and_an_interval():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    kept = read_comparison(ROOT / "adapters" / re.search(r"adapters/([\w-]+)/comparison.json", text)[1]).data
    assert kept["differences"]["lora"]["ci95"] and len(kept["seeds"]) == 3 and kept["task"] == "sft"


def test_figures_in_the_text_are_those_of_the_files():
    page = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
    smollm2 = read_comparison(ROOT / "adapters" / "smollm2-alpaca").data
    low, high = (100 * bound for bound in smollm2["differences"]["lora"]["ci95"])
    estimate = -100 * smollm2["differences"]["lora"]["estimate"]
    assert f"ROUGE-L is {estimate:.1f} points below full's, with an interval from {low:.1f} to +{high:.1f}." in page[
        "docs/guides/seeds-and-verdicts.md"].replace("\n", " ")  # fmt: skip
    speed = [data["arms"]["full"]["training_seconds"] / data["arms"][arm]["training_seconds"] for data, arm in (
        (smollm2, "lora"), (read_comparison(KEPT).data, "lora-conv"))]  # fmt: skip
    assert (
        f"{speed[0]:.1f} times the speed" in page["docs/faq.md"]
        and f"{speed[1]:.2f} times full's" in page["docs/faq.md"]
    )
    estimates = [row["ratio"] for row in _benchmark("memory_estimates")]
    assert f"Over the {len(estimates)} arms" in page["docs/concepts/measurements.md"]
    assert f"{min(estimates):.2f}\nto {max(estimates):.2f} times" in page["docs/concepts/measurements.md"]
    served = _benchmark("adapter_set")
    assert f"{served['memory_ratio']:.2f} times the resident memory" in page["docs/guides/merge-switch-serve.md"]
    assert f"{served['switch_ms']:.2f} ms for a switch" in page["docs/guides/merge-switch-serve.md"]


def test_the_calibration_table_is_that_of_the_simulation():
    text = (ROOT / "docs" / "concepts" / "statistics.md").read_text(encoding="utf-8")
    rows = [row for row in _benchmark("statistics_calibration")["rows"] if row["gap"] == 0]
    for kind in ("plain", "apart", "one arm", "together", "opposed"):
        cells = []
        for seeds in (2, 3, 5):
            rates = [100 * row["excluded"] for row in rows if (row["kind"], row["seeds"]) == (kind, seeds)]
            cells.append(f"{min(rates):.1f} to {max(rates):.1f} %")
        assert f"| {' | '.join(cells)} |" in text, kind
    one = [row["excluded"] for row in rows if row["seeds"] == 1]
    assert f"{min(one):.0%}".replace("%", " %") in text and f"up to {max(one):.0%}".replace("%", " %") in text


def test_the_tables_of_false_verdicts_are_those_of_the_simulation():
    text = (ROOT / "docs" / "concepts" / "statistics.md").read_text(encoding="utf-8")
    made = _benchmark("statistics_calibration")
    of_kind: dict[tuple, dict[int, float]] = {}
    for row in made["verdicts"]:
        of_count = of_kind.setdefault((row["metric"], row["kind"].removesuffix(" lasting")), {})
        of_count[row["examples"]] = max(row["false"], of_count.get(row["examples"], 0))
    for row in made["families"]:
        for column in ("alone", "together"):
            of_count = of_kind.setdefault((row["kind"], column), {})
            of_count[row["arms"]] = max(row[column], of_count.get(row["arms"], 0))
    assert len(of_kind) == 9 + 4
    for case, of_count in of_kind.items():
        assert f"| {' | '.join(f'{100 * of_count[count]:.1f} %' for count in sorted(of_count))} |" in text, case
    assert max(of_kind["accuracy", "beyond"].values()) < 0.01 and max(of_kind["accuracy", "edge"].values()) < 0.06
    assert all(max(of_kind[kind, "together"].values()) < 0.07 for kind in ("equal", "edge lasting"))


def test_the_tables_of_seeds_until_it_is_decided_are_those_of_the_simulation():
    text = (ROOT / "docs" / "concepts" / "statistics.md").read_text(encoding="utf-8")
    made = _benchmark("sequential_calibration")
    lines = sequential_tables(made)
    assert len(lines) == 4 + 6 + 8 + 4 and all(line in text for line in lines), [x for x in lines if x not in text]
    of = [row for row in made["rows"] if row["kind"] in ("equal", "edge", "worse", "together", "one arm")]
    assert max(row["false"] for row in of) < 0.05 + 3 * 0.007  # the standard error of 1,000 comparisons
    assert all(row["false"] <= max(row["naive_false"], 0.05) for row in made["rows"])
    assert max(row["false"] for row in made["families"]) < 0.05 + 2 * 0.012


def test_the_table_of_dropped_arms_is_that_of_the_simulation():
    text = (ROOT / "docs" / "concepts" / "statistics.md").read_text(encoding="utf-8")
    made = _benchmark("drop_calibration")
    lines = dropping_table(made)
    assert len(lines) == 8 and all(line in text for line in lines), [line for line in lines if line not in text]
    assert max(row["false"] for row in made["rows"] if row["run_sd"] < 3) < 0.05


def dropping_table(made) -> list[str]:
    """The rows of figures in docs/concepts/statistics.md: false drops, and the training that is saved, by kind."""

    def cells(rows) -> str:
        most = (f"{100 * max(row[column] for row in rows):.1f} %" for column in ("false", "best", "naive", "halving"))
        shares = (100 * row["saved"] for row in rows)
        least, *_, saved = sorted(shares)
        return f"| {' | '.join([*most, f'{least:.0f} to {saved:.0f} %'])} |"

    rows = [row for row in made["rows"] if row["arms"] == 8]
    one = [row for row in rows if row["run_sd"] == 1]
    by_kind = [[row for row in one if row["kind"] == kind] for kind in dict.fromkeys(row["kind"] for row in one)]
    by_spread = [[row for row in rows if row["run_sd"] == run_sd] for run_sd in (0, 2, 3)]
    return [cells(each) for each in (*by_kind, *by_spread)]


def sequential_tables(made) -> list[str]:
    """The rows of figures in docs/concepts/statistics.md: false claims, power and seeds, several arms."""

    def most(rows, column: str) -> str:
        return f"{100 * max(row[column] for row in rows):.1f} %"

    lines = []
    for kind in ("equal", "edge"):
        for metric in ("accuracy", "loss"):
            five, ten = (
                [row for row in made["rows"] if (row["metric"], row["kind"], row["most"]) == (metric, kind, count)]
                for count in (5, 10)
            )
            cells = [most(five, "false"), *(most(ten, column) for column in ("false", "naive_false", "fixed_false"))]
            lines.append(f"| {' | '.join(cells)} |")
    for kind in ("together", "opposed", "one arm"):
        for metric in ("accuracy", "loss"):
            ten = [row for row in made["rows"] if (row["metric"], row["kind"]) == (metric, kind)]
            cells = [most(ten, column) for column in ("false", "naive_false", "fixed_false")]
            lines.append(f"| - | {' | '.join(cells)} |")
    for gap in (0, -1.5, -3, -6):
        for run_sd in (1, 3):
            (row,) = (
                row for row in made["rows"]
                if (row["metric"], row["most"], row["examples"]) == ("accuracy", 10, 1_000)
                and (row["gap"], row["run_sd"]) == (gap, run_sd)
            )  # fmt: skip
            cells = [f"{100 * row['power']:.0f} %", f"{100 * row['fixed_power']:.0f} %"]
            cells += [f"{row['mean_seeds']:.1f}", str(row["fixed_seeds"])]
            lines.append(f"| {abs(gap):g} | {run_sd} | {' | '.join(cells)} |")
    for kind in ("equal", "edge"):
        of_kind = [next(r for r in made["families"] if (r["kind"], r["arms"]) == (kind, arms)) for arms in (2, 5, 12)]
        rates = [f"{100 * row['false']:.1f} %" for row in of_kind]
        seeds = [f"{row['mean_seeds']:.1f}" for row in of_kind]
        lines.append(f"| {' | '.join(rates)} |")
        lines.append(f"| {' | '.join(seeds)} |")
    return lines


def _benchmark(name: str):
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))


def test_a_kept_adapter_is_complete_and_its_bytes_are_those_in_the_table():
    for name, arm in read_comparison(KEPT).data["arms"].items():
        if name == "full":
            continue
        folder = KEPT / arm["folder"]
        weights = "head.safetensors" if name == "head" else "adapter_model.safetensors"
        measured = json.loads((folder / "run.json").read_text(encoding="utf-8"))["checkpoint_files"]
        assert sum(measured.values()) == arm["checkpoint_bytes"]
        assert (folder / weights).stat().st_size == measured[weights]
        for file, size in measured.items():  # the configuration names a module that has moved since: 7 bytes
            assert abs((folder / file).stat().st_size - size) <= 16, file
        with safe_open(folder / weights, "pt") as tensors:
            sizes = [tensors.get_tensor(key).numel() for key in tensors.keys()]  # noqa: SIM118
        assert sum(sizes) == arm["trainable_parameters"]


def test_no_full_model_is_kept_in_the_repository():
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    tracked = subprocess.run(["git", "ls-files", str(KEPT)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not any(line.endswith("/model.safetensors") for line in tracked.stdout.splitlines())


def test_the_recipe_that_is_shown_is_the_shipped_one():
    text = (ROOT / "docs" / "get-started.md").read_text(encoding="utf-8")
    space: dict = {"__name__": "shown"}
    exec(re.search(r"```python\n(from peft import.*?)```", text, re.DOTALL)[1], space)
    shipped = load_recipe("gpt2-sms-spam")
    assert space["recipe"].arms == shipped.arms and space["recipe"].model == shipped.model
