"""A scan: real short runs within a budget, the test split unread, killed and called again, its winners compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from small import compared_here

from peft_recipes import Recipe, RecipeError, scan, train
from peft_recipes.data import sources
from peft_recipes.reporting.scan_report import scan_words
from peft_recipes.search.candidates import Candidate
from peft_recipes.search.short_runs import ShortRun
from peft_recipes.search.studies import best_run, goes_on, marks_of, next_trial, storage_at, study_of, tell, told

RATES = [1e-4, 3e-3, 3e-2, 10.0]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return tmp_path_factory.mktemp("scan")


@pytest.fixture
def made(classify, done):
    """Every arm at four rates; the second test that asks finds it finished."""
    return scan(classify(), RATES, budget=300, output=done)


def test_every_rate_is_tried_and_the_best_has_the_lowest_validation_loss(made, classify):
    data = json.loads((made.folder / "scan.json").read_text())
    own = {name: arm.learning_rate for name, arm in classify().arms.items()}
    assert {name: arm["own_learning_rate"] for name, arm in data["arms"].items()} == own
    assert data == made.data and not data["unfinished"] and data["split"] == "validation"
    assert data["steps"] == 12 and data["looks"] == [3, 6, 12]
    for arm in data["arms"].values():
        assert [run["learning_rate"] for run in arm["runs"]] == RATES and arm["not_begun"] == []
        whole = [run for run in arm["runs"] if run["ended"] == "whole"]
        assert whole and arm["best"] == min(whole, key=lambda run: run["validation"][-1]["loss"])["learning_rate"]
        assert all(point["step"] in (3, 6, 12) for run in arm["runs"] for point in run["validation"])
        assert arm["best"] != 10.0
    assert "test" not in data["rows"] and "test" not in json.dumps(data["arms"])


def test_halving_stops_the_worse_runs_early(made):
    runs = [run for arm in made.data["arms"].values() for run in arm["runs"]]
    stopped = [run for run in runs if run["ended"] == "stopped"]
    assert stopped and all(run["validation"][-1]["step"] < 12 for run in stopped)
    assert any(run["learning_rate"] == 10.0 and run["ended"] != "whole" for run in runs)


def test_a_finished_scan_is_returned_as_it_is_and_another_one_is_refused(made, classify, done):
    stamp = (made.folder / "scan.json").stat().st_mtime_ns
    again = scan(classify(), RATES, budget=300, output=done)
    assert again.data == made.data and (made.folder / "scan.json").stat().st_mtime_ns == stamp
    with pytest.raises(RecipeError, match="--overwrite"):
        scan(classify(), [1e-3], budget=300, output=done)


def test_the_winners_are_a_recipe_that_compare_takes(made, tmp_path):
    recipe = Recipe.from_yaml(made.recipe)
    assert {name: recipe.arms[name].learning_rate for name in made.best} == made.best
    compared = compared_here(recipe, ["full", "lora"], [0], tmp_path)
    assert compared.failed == [] and compared.data["arms"]["full"]["learning_rate"] == made.best["full"]
    assert (made.folder / "learning-rates.png").read_bytes()[:4] == b"\x89PNG"


class Poisoned:
    """A split that can't be looked at."""

    def __getattribute__(self, name):
        raise AssertionError(f"the test split was read: {name}")

    __len__ = __iter__ = __getitem__ = lambda self, *_: self.anything


@pytest.mark.parametrize("kind", ["classify", "instruct"])
def test_test_data_is_never_read(kind, request, tmp_path, monkeypatch):
    recipe, load = request.getfixturevalue(kind)(), sources.load_splits
    monkeypatch.setattr(sources, "load_splits", lambda source: {**load(source), "test": Poisoned()})
    found = scan(recipe, [1e-3], ["lora"], budget=300, output=tmp_path)
    assert found.best == {"lora": 1e-3} and found.data["arms"]["lora"]["runs"][0]["ended"] == "whole"
    with pytest.raises(AssertionError, match="the test split was read"):
        train(recipe, "lora", output=tmp_path)  # the poison works


def test_a_budget_is_kept_and_what_was_not_begun_is_said(classify, tmp_path):
    found = scan(classify(), [1e-3, 1e-2], ["full", "lora"], budget=1e-3, output=tmp_path)
    assert found.best == {} and all(arm["not_begun"] == [1e-3, 1e-2] for arm in found.data["arms"].values())
    assert "larger --budget" in " ".join(scan_words(found.data))
    more = scan(classify(), [1e-3, 1e-2], ["full", "lora"], budget=300, output=tmp_path)
    assert set(more.best) == {"full", "lora"} and (found.data["steps"], more.data["steps"]) == (0, 12)


def test_a_killed_scan_goes_on_with_the_runs_that_are_left(classify, tmp_path):
    path = tmp_path / "mine.yaml"
    classify(arms={"full": classify().arms["full"]}).to_yaml(path)
    command = [sys.executable, "-m", "peft_recipes", "scan", str(path), "--learning-rates", "1e-4:1e-2:5",
               "--budget", "300", "--output", str(tmp_path / "o")]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, stdout=subprocess.DEVNULL) as process:
        for line in process.stderr:
            if line.startswith("2/5"):
                process.send_signal(signal.SIGKILL)
                break
    before = json.loads((tmp_path / "o/tiny/scan/scan.json").read_text())
    kept = [run for run in before["arms"]["full"]["runs"]]
    assert before["unfinished"] and 2 <= len(kept) < 5
    told = subprocess.run([*command, "--json"], capture_output=True, text=True, env=env, check=True)
    after = json.loads(told.stdout)
    assert not after["unfinished"] and len(after["arms"]["full"]["runs"]) == 5
    assert all(run in after["arms"]["full"]["runs"] for run in kept)  # not done again
    assert after["budget"]["spent_seconds"] > before["budget"]["spent_seconds"]


def test_a_journal_cut_off_anywhere_goes_on_with_every_rate_once(tmp_path, classify):
    """Cut at every entry and inside of it: as a kill, or a full disk, leaves it."""
    rates = (1e-4, 1e-3, 1e-2)
    one = Candidate("full", classify().arms["full"], rates, "full")
    journal = tmp_path / "journal.jsonl"
    study = study_of(storage_at(journal), one)
    ends = iter(["whole", "stopped", "diverged"])
    while (trial := next_trial(study, one)) is not None:
        made = ShortRun(trial.params["learning_rate"], [{"step": 3, "loss": 0.5}], next(ends))
        goes_on(trial, made)
        tell(study, trial, made)
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) > 20
    for count, line in enumerate(lines):
        for part in (0, len(line) // 2):
            cut = tmp_path / f"{count}-{part}.jsonl"
            cut.write_bytes(b"".join(lines[:count]) + line[:part])
            study = study_of(storage_at(cut), one)
            ended = [run["learning_rate"] for run in told(study)]
            waiting = []
            while (trial := next_trial(study, one)) is not None:
                waiting.append(trial.params["learning_rate"])
            assert sorted(ended + waiting) == list(rates), (count, part)


def test_a_run_that_the_budget_cut_off_is_begun_again_with_more(tmp_path, classify):
    one = Candidate("full", classify().arms["full"], (1e-3, 1e-2), "full")
    endings = iter(["out of time", "whole", "whole"])
    for expected in ([1e-3, 1e-2], [1e-3]):  # the middle one first; then what was cut off, and no other
        study = study_of(storage_at(tmp_path / "journal.jsonl"), one)
        tried = []
        while (trial := next_trial(study, one)) is not None:
            tried.append(trial.params["learning_rate"])
            tell(study, trial, ShortRun(tried[-1], [{"step": 3, "loss": 0.5}], next(endings)))
        assert sorted(tried) == expected
        ended = {run["learning_rate"]: run["ended"] for run in told(study)}
    assert ended == {1e-3: "whole", 1e-2: "whole"} and len(told(study)) == 2


def test_a_rate_at_the_edge_is_said_in_words(made):
    data = json.loads(json.dumps(made.data))
    for rate, side in ((1e-4, "lower"), (10.0, "higher")):
        data["arms"]["lora"] |= {"best": rate, "at_the_edge": {"lower": "lowest", "higher": "highest"}[side]}
        assert f"a {side} one may be better" in " ".join(scan_words(data))
    assert made.data["arms"]["lora"]["at_the_edge"] is None or made.best["lora"] in (1e-4, 10.0)


def test_without_optuna_the_extra_is_named(classify, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RecipeError, match=r"pip install 'peft_recipes\[scan\]'"):
        scan(classify(), output=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_best_is_among_those_that_came_furthest():
    def run(rate, losses, ended="whole"):
        return {"learning_rate": rate, "ended": ended, "validation": [{"loss": loss, "step": i} for i, loss in losses]}

    early = run(1.0, [(1, 0.1)], "stopped")  # looks good, at another step
    late = [run(2.0, [(1, 0.5), (2, 0.4), (4, 0.3)]), run(3.0, [(1, 0.5), (2, 0.4), (4, 0.2)])]
    assert best_run([early, *late])["learning_rate"] == 3.0
    assert best_run([early])["learning_rate"] == 1.0 and best_run([]) is None
    assert best_run([run(1.0, [(1, None)])]) is None and best_run([run(1.0, [(1, 1.0)], "diverged")]) is None


@pytest.mark.parametrize(("steps", "marks"), [(3, [1, 2, 3]), (4, [1, 2, 4]), (10, [3, 5, 10]), (125, [32, 63, 125])])
def test_a_run_is_looked_at_three_times(steps, marks):
    assert marks_of(steps) == marks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning-rates", "1e-3:1e-5:4"], "expected LOW:HIGH:COUNT"),
        (["--ranks", "two"], "--ranks two"),
        (["--budget", "soon"], "--budget soon"),
        (["--arms", "lroa"], "Did you mean 'lora'"),
        (["--arms", "full", "--ranks", "4"], "has a rank"),
        (["--set", "arms.lora.peft.target_modules=[q_lni]"], "Nearest: q_lin"),
        (["--output", "/dev/null/x"], "is a file"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_written(classify, tmp_path, monkeypatch, words, message):
    from typer.testing import CliRunner

    from peft_recipes.cli.app import app

    classify().to_yaml(tmp_path / "mine.yaml")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    result = CliRunner().invoke(app, ["scan", str(tmp_path / "mine.yaml"), *words])
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()) and result.stdout == ""
    assert list((tmp_path / "work").iterdir()) == []
