"""A scan on a cluster: the arms at the same time, each arm's runs in turn, and the same end as a scan here; no Ray."""

from __future__ import annotations

import json

import pytest
from fake_nodes import Nodes, Task

from peft_recipes import RecipeError, scan
from peft_recipes.cluster.pool import Pool
from peft_recipes.reporting.scan_report import scan_words
from peft_recipes.search import remote_trials, trial_worker
from peft_recipes.search.trial_worker import one

RATES = [3e-3, 3e-2, 10.0]


class Cluster(Nodes):
    """Nodes that do in this process what theirs would do, the latest submitted first. code: how they end."""

    def __init__(self, code=0, seconds=0.0):
        super().__init__()
        self.code, self.seconds, self.running, self.trials = code, seconds, [], None

    def resources(self, threads, gpu):
        return {"cpus": 1, "gpus": 0}

    def capacity(self, cpus, gpus):
        return 2

    def start(self, work, number, sent, driver):
        self.started.append(work.name)
        return Task([None, number, work])

    def wait(self, tasks, seconds):
        self.running.append([task[2].name.split()[1] for task in tasks])
        self.trials._scanned.budget._started -= self.seconds  # as if so many seconds had gone by
        return [] if self.code is None else [tasks[-1]]

    def result(self, task):
        work = task[2]
        if self.code == 0:
            one(*map(str, work.arguments[1:]))
        else:
            (work.folder / "log.txt").write_text("...\nOSError: no disk\n")
        return {"code": self.code}


@pytest.fixture
def on(monkeypatch):
    """on(nodes): scans on Ray are trained on these nodes."""
    pytest.importorskip("ray")

    class Trials(remote_trials.RemoteTrials):
        def __enter__(self):
            self._nodes = Trials.nodes
            self._pool, self._nodes.trials = Pool(self._nodes), self
            return self

    monkeypatch.setattr(remote_trials, "RemoteTrials", Trials)
    monkeypatch.setattr(trial_worker, "_age", lambda process: 0.0)  # not that of this process

    def use(nodes):
        Trials.nodes = nodes
        return nodes

    return use


def found(made):
    """What a scan found, without its seconds."""
    keys = ("best", "learning_rates", "validation", "not_begun")
    runs = {name: [{k: v for k, v in run.items() if k != "seconds"} for run in arm["runs"]]
            for name, arm in made.data["arms"].items()}  # fmt: skip
    return runs, {name: [arm[key] for key in keys] for name, arm in made.data["arms"].items()}


def test_a_scan_on_a_cluster_finds_what_a_scan_here_does(classify, tmp_path, on):
    nodes, options = on(Cluster()), {"arms": ["head", "lora"], "budget": 1e6}
    here = scan(classify(), RATES, output=tmp_path / "here", jobs=1, **options)
    there = scan(classify(), RATES, output=tmp_path / "there", on="ray", **options)
    assert found(there) == found(here) and there.data["steps"] == here.data["steps"]
    assert any("Ray cluster" in note for note in there.data["notes"]) and not there.data["unfinished"]
    assert max(map(len, nodes.running)) == 2 and all(len(set(names)) == len(names) for names in nodes.running)
    assert not (there.folder / ".trials").exists()


def test_probes_that_outlast_the_budget_are_ended_and_the_scan_says_what_to_do(classify, tmp_path, on):
    nodes = on(Cluster(code=None, seconds=20))
    made = scan(classify(), RATES, ["head", "lora"], budget=100, output=tmp_path, on="ray")
    assert sorted(nodes.cancelled) == [(f"tiny {name} at 0.003", False) for name in ("head", "lora")]
    assert made.best == {} and not made.data["unfinished"] and made.data["budget"]["spent_seconds"] < 130
    (line,) = scan_words(made.data)
    assert line.startswith("The budget of 1 min 40 s was too small: it ended while the first steps of each arm were")
    assert "the same command with a larger --budget continues (try --budget " in line


def test_a_budget_that_is_used_up_by_the_probes_keeps_them(classify, tmp_path, on):
    on(Cluster(seconds=49.9))
    made = scan(classify(), RATES, ["head", "lora"], budget=100, output=tmp_path, on="ray")
    assert set(made.data["probes"]) == {"head", "lora"} and made.best == {}
    (line,) = scan_words(made.data)
    assert "after the first steps of each arm were measured, too little was left for a run" in line
    nodes = on(Cluster())
    more = scan(classify(), RATES, ["head", "lora"], budget=1e6, output=tmp_path, on="ray")
    assert set(more.best) == {"head", "lora"} and more.data["steps"] == 12 and len(nodes.started) == 6  # no probe


def test_a_trial_that_fails_is_a_row_with_the_reason(classify, tmp_path, on):
    on(Cluster(code=1))
    made = scan(classify(), RATES, ["head", "lora"], budget=1e6, output=tmp_path, on="ray")
    runs = json.loads((made.folder / "scan.json").read_text())["arms"]["lora"]["runs"]
    assert [(run["learning_rate"], run["ended"], run["error"]) for run in runs] == [
        (3e-3, "failed", "OSError: no disk")
    ]
    assert "lora: no run gave a loss (OSError: no disk)." in scan_words(made.data)


def test_a_mistake_in_the_recipe_ends_the_scan(classify, tmp_path, on):
    on(Cluster(code=2))
    with pytest.raises(RecipeError, match=r"failed: OSError: no disk .*log.txt"):
        scan(classify(), RATES, ["head", "lora"], budget=1e6, output=tmp_path, on="ray")


@pytest.mark.parametrize("options", [{"on": "rai"}, {"address": "auto"}, {"on": "ray", "jobs": 2}, {"jobs": 0}])
def test_a_wrong_place_or_number_is_an_error_before_anything_starts(options, classify, tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(RecipeError, match=r"Did you mean 'ray'|add --on ray|leave it out|--jobs 0: expected"):
        scan(classify(), RATES, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
