"""Assert that two finished runs are the same, bit by bit."""

from __future__ import annotations

from typing import Any

import pandas
import torch
from safetensors.torch import load_file

from peft_recipes.runs.folder import Run

_OF_TIME = ("seconds", "memory", "per_second", "disturbance", "processes", "resumed", "paused", "runtime")


def same(one: Run, two: Run) -> None:
    """Losses, counts, validation, metrics, notes, predictions and weights are equal; times and memory are not read."""
    first, second = one.data["training"], two.data["training"]
    assert _untimed(first) == _untimed(second)
    assert list(map(_untimed, first["validation"])) == list(map(_untimed, second["validation"]))
    for key in ("metrics", "per_class", "parameters", "checkpoint_bytes", "rows", "signature"):
        assert one.data[key] == two.data[key], key
    assert _notes(one) == _notes(two)
    pandas.testing.assert_frame_equal(*(pandas.read_parquet(r.folder / "predictions.parquet") for r in (one, two)))
    files = [path.name for path in one.folder.glob("*.safetensors")]
    assert files and files == [path.name for path in two.folder.glob("*.safetensors")]
    for name in files:
        saved = load_file(one.folder / name), load_file(two.folder / name)
        assert saved[0].keys() == saved[1].keys()
        assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


def _notes(run: Run) -> list[str]:
    return [note for note in run.data["notes"] if "busy" not in note]


def _untimed(figures: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in figures.items() if not any(word in k for word in _OF_TIME) and k != "validation"}
