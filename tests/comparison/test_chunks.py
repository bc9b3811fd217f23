"""Arms that take turns end with the figures of arms that do not, also where they or the comparison are killed."""

from __future__ import annotations

import signal
import sys
import threading
from dataclasses import replace

import psutil
import pytest
from equal_runs import same
from worker_processes import workers

from peft_recipes import Arm, Dataset, RecipeError, compare, train
from peft_recipes.comparison import forking, processes
from peft_recipes.comparison.chunks import pause_steps
from peft_recipes.reporting.facts import ratio
from peft_recipes.runs.folder import read_run, run_folder
from peft_recipes.runs.progress import read_progress

UNTIMED = ["reload", "merge", "fresh-process"]  # checks that reload what is compared here


LONG = {"num_train_epochs": 24, "eval_strategy": "no"}  # 144 steps: enough that one within a chunk is seen


@pytest.fixture(scope="module")
def small(classify):
    """small(*arms, **training) -> a recipe of the arms, without the checks that reload them."""

    def make(*names, **training):
        recipe = classify(skip_checks=UNTIMED)
        arms = {name: recipe.arms[name] for name in names}
        return replace(recipe, arms=arms, training={**recipe.training, **training})

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(recipe, arm, seed) -> the run, trained in this process without a pause, once."""
    root = tmp_path_factory.mktemp("whole")

    def make(recipe, arm, seed=0):
        output = root / str(recipe.training["num_train_epochs"])
        return train(recipe, arm, seed=seed, output=output, resume=True)

    return make


def run_of(output, recipe, arm, seed=0):
    return read_run(run_folder(output, recipe, arm, seed))


def test_arms_that_take_turns_end_as_those_that_do_not(small, whole, tmp_path):
    recipe, news, ids = small("full", "lora", "head"), [], set()

    def see(progress):
        ids.update(worker.pid for worker in workers())
        if progress.state != "running":
            news.append((*progress.job, progress.state, progress.step))
        if progress.state == "paused":  # what a live table shows
            paused = read_progress(run_folder(tmp_path, recipe, *progress.job))
            assert paused["step"] == progress.step and paused["of"] == 12 and paused["validation"][-1]["accuracy"] <= 1

    made = compare(recipe, seeds=[0, 1], output=tmp_path, chunks=2, on_progress=see)
    assert news == [
        ("base", 0, "ok", 0),
        *(
            turn
            for seed in (0, 1)
            for turn in (
                ("full", seed, "paused", 6), ("lora", seed, "paused", 6), ("head", seed, "ok", 0),
                ("full", seed, "ok", 0), ("lora", seed, "ok", 0),
            )
        ),
    ]  # fmt: skip
    assert len(ids) == 1 and workers() == []  # one process trained them all
    for arm, seed in [("full", 0), ("lora", 0), ("head", 0), ("lora", 1)]:
        same(whole(recipe, arm, seed), run_of(tmp_path, recipe, arm, seed))
    timing = made.data["arms"]["lora"]["timing"]
    assert timing["same_environment"] and not timing["memory"]
    assert any("Peak memory is shown without a ratio" in note and "--measure" in note for note in made.data["notes"])
    assert ratio(made.data["arms"]["lora"], made.data["arms"]["full"], "peak_memory_bytes") is None


def test_a_chunk_ends_at_the_same_step_for_every_arm():
    assert pause_steps(12, 3) == [4, 8] and pause_steps(10, 4) == [2, 5, 8] and pause_steps(5, 1) == []
    assert pause_steps(3, 8) == [1, 2]  # as many chunks as steps


def test_a_wrong_number_of_chunks_is_one_line(classify, tmp_path):
    with pytest.raises(RecipeError, match=r"--chunks 0: expected a number of chunks of 1 or more"):
        compare(classify(), chunks=0, output=tmp_path / "o")
    with pytest.raises(RecipeError, match=r"--chunks lets the arms take turns on this machine, and --on ray"):
        compare(classify(), chunks=2, on="ray", output=tmp_path / "o")
    data = Dataset("a/b", streaming=True, train=None, validation=2, test=2, labels=["bad", "good"])
    lora, training = {"lora": classify().arms["lora"]}, {**classify().training, "max_steps": 4}
    streamed = classify(dataset=data, arms=lora, training=training)
    with pytest.raises(RecipeError, match=r"--chunks continues each run several times.*dataset\.streaming"):
        compare(streamed, chunks=2, output=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def when(job, step, do):
    """A callback that calls `do` once, when a run is at a step or beyond; and all states of each job."""
    done, states = [], []

    def see(progress):
        states.append((progress.job, progress.state, progress.step))
        if not done and progress.job == job and progress.state == "running" and progress.step >= step:
            done.append(True)
            do()

    return see, states


def test_a_killed_worker_is_the_failure_of_the_run_that_it_trained(small, whole, tmp_path):
    recipe = small("full", "lora", **LONG)
    see, states = when(("lora", 0), 74, lambda: workers()[0].send_signal(signal.SIGKILL))
    made = compare(recipe, output=tmp_path, chunks=2, on_progress=see)
    assert made.failed == ["lora"] and made.data["arms"]["lora"]["status"] == "out-of-memory"
    full = run_of(tmp_path, recipe, "full")
    same(whole(recipe, "full"), full)
    see, states = when(("lora", 0), 10**9, None)
    assert compare(recipe, output=tmp_path, chunks=2, on_progress=see).failed == []
    lora = run_of(tmp_path, recipe, "lora")
    same(whole(recipe, "lora"), lora)
    assert lora.data["training"]["paused_at_steps"] == [72]
    assert (("full", 0), "kept", 0) in states and (("lora", 0), "paused", 72) in states
    assert min(step for job, state, step in states if job == ("lora", 0) and state == "running" and step) >= 72


def test_an_arm_that_fails_takes_no_other_along(small, whole, tmp_path):
    recipe = small("lora")
    recipe = replace(recipe, arms={"diverging": Arm(learning_rate=1e30), **recipe.arms})
    see, states = when(None, 0, None)
    made = compare(recipe, output=tmp_path, chunks=2, on_progress=see)
    assert made.failed == ["diverging"] and "The loss is" in made.data["arms"]["diverging"]["error"]
    ended = [(job[0], state) for job, state, _ in states if state != "running"]
    assert ended == [("base", "ok"), ("diverging", "failed"), ("lora", "paused"), ("lora", "ok")]
    same(whole(recipe, "lora"), run_of(tmp_path, recipe, "lora"))


def test_ctrl_c_in_a_chunk_ends_the_worker_after_a_checkpoint(small, whole, tmp_path):
    recipe = small("full", "lora", **LONG)

    def interrupt():
        raise KeyboardInterrupt

    see, _ = when(("lora", 0), 12, interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare(recipe, output=tmp_path, chunks=2, on_progress=see)
    assert workers() == []
    see, states = when(("lora", 0), 10**9, None)
    compare(recipe, output=tmp_path, chunks=2, on_progress=see)
    for arm in recipe.arms:
        same(whole(recipe, arm), run_of(tmp_path, recipe, arm))
    (resumed,) = run_of(tmp_path, recipe, "lora").data["training"]["resumed_at_steps"]
    assert 12 <= resumed < 72
    turns = [(job[0], state, step) for job, state, step in states if state != "running"]
    assert turns == [("base", "kept", 0), ("full", "paused", 72), ("lora", "paused", 72), ("full", "ok", 0),
                     ("lora", "ok", 0)]  # fmt: skip


@pytest.mark.skipif(not forking.can_fork(), reason="forks a comparison")
def test_a_killed_comparison_leaves_no_worker_and_the_next_call_goes_on(small, whole, tmp_path):
    recipe = small("full", "lora", **LONG)
    recipe.to_yaml(tmp_path / "tiny.yaml")
    words = ["compare", str(tmp_path / "tiny.yaml"), "--chunks", "2", "--output", str(tmp_path)]
    process = processes.start([sys.executable, "-m", "peft_recipes", *words], tmp_path / "log.txt", fork=True)
    folder = run_folder(tmp_path, recipe, "full", 0)
    while not ((log := folder / "log.jsonl").is_file() and '"step": 20,' in log.read_text()):
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        threading.Event().wait(0.02)
    (worker,) = [child for child in psutil.Process(process.pid).children()]
    process.kill()
    process.wait()
    psutil.wait_procs([worker], timeout=60)
    assert not worker.is_running() and not (folder / "run.json").exists()
    compare(recipe, output=tmp_path, chunks=2)
    for arm in recipe.arms:
        same(whole(recipe, arm), run_of(tmp_path, recipe, arm))
    assert 20 <= run_of(tmp_path, recipe, "full").data["training"]["resumed_at_steps"][0] <= 72
