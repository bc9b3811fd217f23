"""The benchmark of arms that take turns runs, on a tiny model, and gives equal figures both ways."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "live_comparison.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("live_comparison", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "live_comparison", module)  # for its dataclass
    spec.loader.exec_module(module)
    return module


def test_both_ways_give_the_same_figures_and_the_times_are_in_order(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "_import_seconds", lambda times: 1.0)
    monkeypatch.setattr(sys, "argv", ["live_comparison.py", "--tiny", "--output", str(tmp_path / "o.json")])
    script.main()
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["equal_figures"] and result["in_turns"]["turns"] == 5 and result["one_after_another"]["turns"] == 3
    for way in ("in_turns", "one_after_another"):
        times = result[way]
        assert 0 < times["every_arm_validated_seconds"] <= times["right_top_seconds"] <= times["total_seconds"]
    assert result["turn"]["kept_process"]["turns"] >= 1 and result["turn"]["fresh_process"]["turns"] >= 1


def test_a_ranking_is_right_from_the_moment_on_which_it_stays(script):
    found = script.Compared(True, {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.1}, end=9.0)
    found.points = [(1.0, "a", 0, 0.9), (2.0, "b", 0, 0.8), (3.0, "c", 0, 0.95), (4.0, "d", 0, 0.1), (5.0, "c", 0, 0.7)]
    assert found.figures()["right_top_seconds"] == 5.0 and found.figures()["right_set_seconds"] == 3.0
    assert found.figures()["every_arm_validated_seconds"] == 4.0
