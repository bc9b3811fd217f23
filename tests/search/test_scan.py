"""A scan: short runs within a budget, the test split unread, resumed after a kill, its best recipe compared."""

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
from peft_recipes.search.halving import best_run, evaluation_steps, keep_training, pending
from peft_recipes.search.short_runs import ShortRun

RATES = [1e-4, 3e-3, 3e-2, 10.0]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return tmp_path_factory.mktemp("scan")


@pytest.fixture
def made(classify, done):
    """Every arm at four learning rates; the scan runs once, later tests get the finished one."""
    return scan(classify(), RATES, budget=300, output=done)


def test_every_learning_rate_is_tried_and_the_best_has_the_lowest_validation_loss(made, classify):
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


def test_a_finished_scan_is_returned_unchanged_and_another_one_is_refused(made, classify, done):
    stamp = (made.folder / "scan.json").stat().st_mtime_ns
    again = scan(classify(), RATES, budget=300, output=done)
    assert again.data == made.data and (made.folder / "scan.json").stat().st_mtime_ns == stamp
    with pytest.raises(RecipeError, match="--overwrite"):
        scan(classify(), [1e-3], budget=300, output=done)


def test_the_best_learning_rates_are_a_recipe_for_compare(made, tmp_path):
    recipe = Recipe.from_yaml(made.recipe)
    assert {name: recipe.arms[name].learning_rate for name in made.best} == made.best
    compared = compared_here(recipe, ["full", "lora"], [0], tmp_path)
    assert compared.failed == [] and compared.data["arms"]["full"]["learning_rate"] == made.best["full"]
    assert (made.folder / "learning-rates.png").read_bytes()[:4] == b"\x89PNG"


class Poisoned:
    """A split that fails on any access."""

    def __getattribute__(self, name):
        raise AssertionError(f"the test split was read: {name}")

    __len__ = __iter__ = __getitem__ = lambda self, *_: self.anything


@pytest.mark.parametrize("kind", ["classify", "instruct"])
def test_test_data_is_never_read(kind, request, tmp_path, monkeypatch):
    recipe, load = request.getfixturevalue(kind)(), sources.load_splits
    monkeypatch.setattr(sources, "load_splits", lambda source, notes=None: {**load(source), "test": Poisoned()})
    found = scan(recipe, [1e-3], ["lora"], budget=300, output=tmp_path)
    assert found.best == {"lora": 1e-3} and found.data["arms"]["lora"]["runs"][0]["ended"] == "whole"
    with pytest.raises(AssertionError, match="the test split was read"):
        train(recipe, "lora", output=tmp_path)  # the poison works


def test_a_scan_stays_within_its_budget_and_lists_the_runs_not_started(classify, tmp_path):
    found = scan(classify(), [1e-3, 1e-2], ["full", "lora"], budget=1e-3, output=tmp_path)
    assert found.best == {} and all(arm["not_begun"] == [1e-3, 1e-2] for arm in found.data["arms"].values())
    assert "larger --budget" in " ".join(scan_words(found.data))
    more = scan(classify(), [1e-3, 1e-2], ["full", "lora"], budget=300, output=tmp_path)
    assert set(more.best) == {"full", "lora"} and (found.data["steps"], more.data["steps"]) == (0, 12)


def test_a_killed_scan_continues_with_the_runs_that_are_left(classify, tmp_path):
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
    resumed = subprocess.run([*command, "--json"], capture_output=True, text=True, env=env, check=True)
    after = json.loads(resumed.stdout)
    assert not after["unfinished"] and len(after["arms"]["full"]["runs"]) == 5
    assert all(run in after["arms"]["full"]["runs"] for run in kept)  # not rerun
    assert after["budget"]["spent_seconds"] > before["budget"]["spent_seconds"]


def test_pending_are_the_untried_learning_rates_and_those_cut_off_by_the_budget(classify):
    candidate = Candidate("full", classify().arms["full"], (1e-4, 1e-3, 1e-2, 1e-1), "full")
    assert pending(candidate, {}) == [1e-3, 1e-2, 1e-4, 1e-1]
    endings = {1e-4: "stopped", 1e-3: "out of time", 1e-2: "whole"}
    assert pending(candidate, {rate: {"ended": ended} for rate, ended in endings.items()}) == [1e-3, 1e-1]


def test_a_run_continues_while_its_loss_is_in_the_better_half():
    def keeps(losses, *others):
        run = ShortRun(1e-3, [{"loss": loss} for loss in losses])
        return keep_training(run, [{"validation": [{"loss": loss} for loss in other]} for other in others])

    assert keeps([0.5]) and keeps([0.5, 0.9])  # the first run has nothing to lose against
    assert keeps([0.4], [0.5]) and not keeps([0.6], [0.5])
    assert keeps([0.5], [0.5])  # a tie continues
    assert keeps([0.5], [0.4], [0.6], [0.7]) and not keeps([0.6], [0.4], [0.5], [0.7])
    assert keeps([0.9, 0.3], [0.1], [0.2, 0.4])  # only losses at the same point are compared
    assert not keeps([float("nan")]) and keeps([0.5], [None])


def test_a_best_learning_rate_at_the_edge_is_reported(made):
    data = json.loads(json.dumps(made.data))
    for rate, side in ((1e-4, "lower"), (10.0, "higher")):
        data["arms"]["lora"] |= {"best": rate, "at_the_edge": {"lower": "lowest", "higher": "highest"}[side]}
        assert f"a {side} one may be better" in " ".join(scan_words(data))
    assert made.data["arms"]["lora"]["at_the_edge"] is None or made.best["lora"] in (1e-4, 10.0)


def test_the_best_run_is_among_those_evaluated_most_often():
    def run(rate, losses, ended="whole"):
        return {"learning_rate": rate, "ended": ended, "validation": [{"loss": loss, "step": i} for i, loss in losses]}

    early = run(1.0, [(1, 0.1)], "stopped")  # looks good, at another step
    late = [run(2.0, [(1, 0.5), (2, 0.4), (4, 0.3)]), run(3.0, [(1, 0.5), (2, 0.4), (4, 0.2)])]
    assert best_run([early, *late])["learning_rate"] == 3.0
    assert best_run([early])["learning_rate"] == 1.0 and best_run([]) is None
    assert best_run([run(1.0, [(1, None)])]) is None and best_run([run(1.0, [(1, 1.0)], "diverged")]) is None


@pytest.mark.parametrize(
    ("steps", "expected"), [(3, [1, 2, 3]), (4, [1, 2, 4]), (10, [3, 5, 10]), (125, [32, 63, 125])]
)
def test_a_run_is_evaluated_three_times(steps, expected):
    assert evaluation_steps(steps) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning-rates", "1e-3:1e-5:4"], "expected LOW:HIGH:COUNT"),
        (["--ranks", "two"], "--ranks two"),
        (["--budget", "soon"], "--budget soon"),
        (["--jobs", "many"], "--jobs many: expected a whole number of 1 or more, or auto"),
        (["--arms", "lroa"], "Did you mean 'lora'"),
        (["--arms", "full", "--ranks", "4"], "has a rank"),
        (["--set", "arms.lora.peft.target_modules=[q_lni]"], "Nearest: q_lin"),
        (["--output", "/dev/null/x"], "is a file"),
    ],
)
def test_a_user_error_is_one_message_and_writes_nothing(classify, tmp_path, monkeypatch, words, message):
    from typer.testing import CliRunner

    from peft_recipes.cli.app import app

    classify().to_yaml(tmp_path / "mine.yaml")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    result = CliRunner().invoke(app, ["scan", str(tmp_path / "mine.yaml"), *words])
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()) and result.stdout == ""
    assert list((tmp_path / "work").iterdir()) == []
