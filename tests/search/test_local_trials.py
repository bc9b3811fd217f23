"""A scan in several processes of this machine: the same end as in one, within the budget, also where one dies."""

from __future__ import annotations

import json
import types

import pytest
from worker_processes import workers

from peft_recipes import RecipeError, scan
from peft_recipes.search import local_trials, short_runs
from peft_recipes.search.budget import Budget
from peft_recipes.search.candidates import candidates
from peft_recipes.search.local_trials import LocalTrials
from peft_recipes.search.preparation import Preparation
from peft_recipes.search.trials import Scanned, Trial, failed_entry

RATES = [3e-3, 3e-2, 10.0]


def found(made):
    """What a scan found, without its seconds."""
    return {
        name: (arm["best"], [{k: v for k, v in run.items() if k != "seconds"} for run in arm["runs"]])
        for name, arm in made.data["arms"].items()
    }


def test_two_processes_find_what_one_does_also_after_ctrl_c(classify, tmp_path):
    options = {"arms": ["head", "lora"], "budget": 1e6}

    def interrupt(arm, run, number, total):
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(classify(), RATES, output=tmp_path / "two", jobs=2, on_trial=interrupt, **options)
    kept = json.loads((tmp_path / "two/tiny/scan/scan.json").read_text())
    assert kept["unfinished"] and sum(len(arm["runs"]) for arm in kept["arms"].values()) == 2
    assert not workers() and not (tmp_path / "two/tiny/scan/.trials").exists()

    seen = []
    two = scan(
        classify(), RATES, output=tmp_path / "two", jobs=2, on_trial=lambda *told: seen.append(told[2]), **options
    )
    one = scan(classify(), RATES, output=tmp_path / "one", jobs=1, **options)
    assert found(two) == found(one) and two.data["steps"] == one.data["steps"] == 12
    assert seen == [3, 4, 5, 6] and (two.data["at_a_time"], one.data["at_a_time"]) == (2, 1)
    assert any(note.startswith("2 runs at a time shared this machine") for note in two.data["notes"])
    assert not workers()


class Process:
    """In place of a worker process. code: its exit code, None while it runs."""

    def __init__(self, code=None):
        self.code, self.killed, self.stdin = code, False, types.SimpleNamespace(close=lambda: None)

    def poll(self):
        return self.code

    def wait(self, timeout=None):
        return self.code

    def kill(self):
        self.killed = True

    def send_signal(self, number):
        pass


@pytest.fixture
def trials(classify, tmp_path, monkeypatch):
    """trials(process): the scan of two arms in two such processes, with their two probes."""
    started = []

    def make(*processes, seconds=100.0, log=""):
        def start(command, path, environment, fork):
            path.write_text(log)
            started.append((command, environment))
            return processes[len(started) - 1]

        monkeypatch.setattr(local_trials, "start", start)
        monkeypatch.setattr(local_trials.forking, "prepare", lambda: None)
        tried = candidates(classify(), ["head", "lora"], RATES)
        local = LocalTrials(Scanned(classify(), tried, tmp_path, 0, Budget(seconds)), 2)
        return local, [Trial(one, RATES[0], 2, (2,), 0) for one in tried]

    make.started = started
    return make


def test_what_outlasts_the_budget_is_ended_and_what_has_not_begun_does_not(trials, monkeypatch):
    processes = [Process(), Process()]
    local, probes = trials(*processes)
    budget = local._scanned.budget
    # The budget is over once the first two have begun.
    monkeypatch.setattr(local_trials.time, "sleep", lambda _: setattr(budget, "seconds", -1000.0))
    with local:
        for probe in [*probes, probes[0]]:
            local.submit(probe)
        assert list(local.finished()) == [(probes[0], None), (probes[1], None), (probes[0], None)]
    assert all(process.killed for process in processes) and len(trials.started) == 2


def test_a_process_that_dies_is_a_failed_run_and_the_next_one_has_another(trials):
    local, probes = trials(Process(-9), Process(1), Process(-9), log="RuntimeError: CUDA out of memory\n")
    with local:
        for probe in [*probes, probes[0]]:
            local.submit(probe)
        entries = [entry for _, entry in local.finished()]
    assert [entry["ended"] for entry in entries] == ["failed"] * 3 and len(trials.started) == 3
    assert "signal 9" in entries[0]["error"] and "CUDA out of memory" in entries[1]["error"]
    assert entries[0].keys() == failed_entry(1.0, "").keys()


def test_a_mistake_in_the_recipe_is_raised(trials):
    local, probes = trials(Process(2), log="arm 'head': no such thing\n")
    with pytest.raises(RecipeError, match=r"^arm 'head': no such thing$"), local:
        local.submit(probes[0])
        list(local.finished())


def test_a_process_gets_its_share_of_the_threads(trials, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6))
    local, _ = trials()
    assert [worker._environment["OMP_NUM_THREADS"] for worker in local._workers] == ["3", "3"]


def test_a_trial_that_fails_in_this_process_is_a_row_and_the_others_go_on(classify, tmp_path, monkeypatch):
    train = Preparation.train

    def failing(self, trial, **options):
        if trial.candidate.name == "lora" and trial.learning_rate == 3e-2:
            raise OSError("no disk")
        return train(self, trial, **options)

    monkeypatch.setattr(Preparation, "train", failing)
    made = scan(classify(), [3e-3, 3e-2], ["head", "lora"], budget=1e6, output=tmp_path, jobs=1)
    rows = {
        (name, run["learning_rate"]): run["ended"] for name, arm in made.data["arms"].items() for run in arm["runs"]
    }
    assert rows["lora", 3e-2] == "failed" and rows["head", 3e-2] == "whole" and set(made.best) == {"head", "lora"}


def test_a_probe_ends_with_the_budget(classify, tmp_path, monkeypatch):
    seen, short_run = [], short_runs.short_run

    def late(*arguments, deadline, **options):
        seen.append(deadline)
        return short_run(*arguments, deadline=0.0, **options)

    monkeypatch.setattr(short_runs, "short_run", late)
    made = scan(classify(), RATES, ["lora"], budget=300, output=tmp_path)
    assert seen and seen[0] < float("inf") and made.data["probes"] == {} and made.best == {}


def test_on_a_gpu_a_scan_takes_as_many_processes_as_fit_and_on_a_cpu_one(classify, monkeypatch):
    from peft_recipes.search import scan as module

    def seem(device, needs, **options):
        prepared = types.SimpleNamespace(
            hardware=types.SimpleNamespace(device=device),
            needs=needs,
            candidates=list(needs),
            recipe=classify(**options),
        )
        return lambda jobs: module._at_a_time(jobs, prepared)

    monkeypatch.setattr("peft_recipes.planning.together.Room.most", lambda self, needs: 3)
    monkeypatch.setattr("peft_recipes.planning.together.environment.device_memory_bytes", lambda device: 30 * 10**9)
    monkeypatch.setattr("peft_recipes.planning.together.cpu_cores", lambda: 8)
    needs = dict.fromkeys("abcd", 8 * 10**9)
    assert seem("cuda", needs)(None) == 3 and seem("cpu", needs)("auto") == 3
    assert seem("cpu", needs)(None) == 3 and seem("mps", needs)(None) == 1
    assert seem("cuda", {"a": 10**9})(None) == 1  # one arm: its runs follow one another
    with pytest.raises(RecipeError, match=r"--jobs 4: .* At most: --jobs 3"):
        seem("cuda", needs)(4)
    assert seem("cuda", needs, skip_checks=["memory"])(4) == 4
