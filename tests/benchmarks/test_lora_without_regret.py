"""docs/lora-without-regret.md matches its files; the search for learning rates extends beyond an edge."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from pathlib import Path

import pytest

from peft_recipes import load_recipe

ROOT = Path(__file__).parents[2]


def _loaded(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return _loaded(ROOT / "benchmarks" / "lora_without_regret.py")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def writer():
    return _loaded(ROOT / "docs" / "write_lora_without_regret.py")


def test_the_page_is_up_to_date(script, writer):
    assert writer.PAGE.read_text(encoding="utf-8") == writer.page(writer.kept())
    assert {found["recipe"] for found in writer.kept()} >= {"mnist-shift"}
    assert (writer.FIGURES, writer.NEIGHBOUR) == (script.FIGURES, script.NEIGHBOUR)


def test_the_files_support_the_claims_of_the_page(writer):
    for found in writer.kept():
        assert len(found["seeds"]) == 3 and all(len(row["test"]) == 3 for row in found["full"] if row["test"])
        sign = 1 if found["metric"] == "accuracy" else -1
        for kind in ("full", "lora"):
            means = {row["learning_rate"]: statistics.fmean(v[found["metric"]] for v in row["validation"])
                     for row in found[kind] if row["validation"]}  # fmt: skip
            assert means[found["best"][kind]] * sign == max(mean * sign for mean in means.values())
        assert found["at_ten_times"]["learning_rate"] == pytest.approx(10 * found["best"]["full"], rel=0.1)
        best = next(row for row in found["full"] if row["learning_rate"] == found["best"]["full"])
        held = found["at_its_best"]
        assert held["estimate"] == pytest.approx(held["mean"] - statistics.fmean(best["test"]), abs=1e-6)


def test_the_search_continues_while_the_best_is_an_edge(script, monkeypatch):
    recipe = load_recipe("mnist-shift", embedded=True)

    def made_up(recipe, kind, middle, power, seeds, output):
        """The best is four steps below the middle, beyond the first learning rates."""
        score = 1 - abs(power + 4) / 10
        validation = [{"accuracy": score, "loss": 1 - score}]
        return {"learning_rate": 10.0**power, "power": power, "validation": validation, "test": [score]}

    monkeypatch.setattr(script, "_row", made_up)
    found = script._search(recipe, "lora", 1.0, [0], Path())
    assert [row["power"] for row in found] == [-4, -3, -2, -1, 0, 1]
    assert script._best(found, recipe)["power"] == -4
    rows = [{**row, "validation": None} if row["power"] == -4 else row for row in found]  # its runs failed
    assert script._best(rows, recipe)["power"] == -3
