"""benchmarks/shared_base.py: what it measures, in this process and on a tiny model."""

from __future__ import annotations

import pytest


@pytest.fixture
def shared_base(monkeypatch):
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import shared_base

    return shared_base


def test_runs_together_are_compared_with_as_many_alone(shared_base, tmp_path, monkeypatch):
    from gpu.workspace import recipe_file

    monkeypatch.setattr(shared_base, "STEPS", 4)
    path = recipe_file(tmp_path, "tiny", "alpaca", 32, "cpu", tiny=True)
    alone, together = shared_base._measured(path, [1]), shared_base._measured(path, [0, 1])
    assert together["losses"][1] == pytest.approx(alone["losses"][0], abs=1e-5)
    assert together["losses"][0] != pytest.approx(alone["losses"][0], abs=1e-5)
    row = shared_base._row(together, alone)
    assert row["runs"] == 2 and row["step_seconds_alone"] == 2 * alone["step_seconds"]
    assert row["speed_up"] is None or row["speed_up"] > 0
