"""A scan on a cluster: the arms at the same time, each arm's runs in turn, and the same end as a scan here."""

from __future__ import annotations

import json
from collections import deque

import pytest

from peft_recipes import RecipeError, scan
from peft_recipes.search import remote_trials
from peft_recipes.search.candidates import with_learning_rates
from peft_recipes.search.trials import one_trial

RATES = [3e-3, 3e-2, 10.0]


class Here:
    """In place of the cluster: trials run in this process, the latest submitted first. running: the most at a time."""

    running: list[list[str]]

    def __init__(self, address):
        self.waiting = deque()
        Here.running = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def at_a_time(self, recipe):
        return 2

    def submit(self, recipe, candidate, learning_rate, folder, **options):
        assert folder.is_dir()
        recipe = with_learning_rates(recipe, {candidate.name: (candidate, learning_rate)})
        trial = json.loads(json.dumps({"arm": candidate.name, "learning_rate": learning_rate, **options}))
        self.waiting.append((recipe, candidate, learning_rate, trial))
        Here.running.append([each[1].name for each in self.waiting])

    def finished(self):
        while self.waiting:
            recipe, candidate, learning_rate, trial = self.waiting.pop()
            yield candidate, learning_rate, one_trial(type(recipe).from_dict(recipe.to_dict()), trial)

    def clear(self, folder):
        pass


def told(made):
    """What a scan found, without its seconds."""
    keys = ("best", "learning_rates", "validation", "not_begun")
    runs = {name: [{k: v for k, v in run.items() if k != "seconds"} for run in arm["runs"]]
            for name, arm in made.data["arms"].items()}  # fmt: skip
    return runs, {name: [arm[key] for key in keys] for name, arm in made.data["arms"].items()}


def test_a_scan_on_a_cluster_finds_what_a_scan_here_does(classify, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_trials, "RemoteTrials", Here)
    pytest.importorskip("ray")
    options = {"arms": ["head", "lora"], "budget": 1e6}
    here = scan(classify(), RATES, output=tmp_path / "here", **options)
    there = scan(classify(), RATES, output=tmp_path / "there", on="ray", **options)
    assert told(there) == told(here) and there.data["steps"] == here.data["steps"]
    assert any("Ray cluster" in note for note in there.data["notes"]) and not there.data["unfinished"]
    assert max(map(len, Here.running)) == 2 and all(len(set(names)) == len(names) for names in Here.running)


@pytest.mark.parametrize("options", [{"on": "rai"}, {"address": "auto"}])
def test_a_wrong_place_is_an_error_before_anything_starts(options, classify, tmp_path):
    with pytest.raises(RecipeError, match=r"Did you mean 'ray'|add --on ray"):
        scan(classify(), RATES, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
