"""Memory and traffic of several processes: the formulas, the page that shows them, and plans over several."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from peft_recipes import RecipeError
from peft_recipes.planning.plan import plan
from peft_recipes.planning.scaling import Sizes, Spread, byte_count, kind_of, memory, planned_spread, traffic

ROOT = Path(__file__).parents[2]
SIZES = Sizes(
    weights=1_000,
    gradients=1_000,
    optimizer=2_000,
    activations=70,
    layer=90,
    layer_gradients=80,
    kept=100,
    learning=1_000,
)


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import scaling_tables

    yield scaling_tables
    sys.path.remove(str(ROOT / "benchmarks"))


def test_memory_by_the_formulas():
    assert memory(SIZES, None, 1)["total"] == 4_070
    assert memory(SIZES, "DDP", 4)["total"] == 5_070  # the gradients' buckets
    assert memory(SIZES, "FSDP2", 4)["total"] == 1_000 + 70 + 2 * 90 + 80 + 100
    assert memory(SIZES, "ZeRO-2", 4)["total"] == 1_000 + 750 + 70 + 1_000
    assert memory(SIZES, "FSDP2", 1)["buffers"] == 0


def test_traffic_by_the_formulas():
    assert traffic(SIZES, None, 1)["total"] == 0
    assert traffic(SIZES, "DDP", 4, accumulated=8)["total"] == 1_500
    assert traffic(SIZES, "FSDP2", 4)["total"] == 0.75 * (2_000 - 100) + 750
    assert traffic(SIZES, "FSDP2", 4, accumulated=2)["total"] == 0.75 * 2 * (2_000 - 100) + 750
    assert traffic(SIZES, "ZeRO-2", 4)["total"] == 1_500


def test_the_measured_traffic_matches_the_formulas(tables):
    """Every run of the stored measurement is within 3 %."""
    measured = json.loads(tables.TRAFFIC.read_text())["runs"]
    assert {(run["processes"], run["kind"]) for run in measured} == {(n, k) for n in (2, 4) for k in ("DDP", "FSDP2")}
    for run in measured:
        for row in run["arms"].values():
            assert max(row["sent"]) == pytest.approx(tables.gloo_bytes(row["formula"], run), rel=0.03)
        assert run["gloo"]["all-reduce"] == pytest.approx(2 * (run["processes"] - 1) / run["processes"], rel=0.02)


def test_the_page_is_what_its_command_writes(tables):
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.written(page) == page
    assert page.count("| Llama-3.1-70B |") == 6


def test_the_stored_sizes_equal_the_simulated_ones(tables):
    stored = json.loads(tables.SIZES.read_text())
    assert list(stored) == list(tables.MODELS)
    assert tables.sizes_of("SmolLM2-135M") == stored["SmolLM2-135M"]
    assert stored["SmolLM2-135M"]["full"]["weights"] == pytest.approx(4 * 134_515_008, rel=1e-6)  # and its buffers
    assert stored["Llama-3.1-70B"]["full"]["weights"] == pytest.approx(4 * 70_553_706_496, rel=1e-6)


def test_a_plan_over_several_processes(instruct):
    recipe = instruct()
    one = plan(recipe)["arms"]["full"]["memory"]
    many = plan(recipe, spread=Spread("FSDP2", 4, memory=byte_count("80GB")))
    memory = many["arms"]["full"]["memory"]
    assert many["processes"] == 4 and many["distributed"] == "FSDP2" and memory["machine"] == 80e9
    assert memory["weights"] == one["weights"] // 4 and memory["optimizer"] == one["optimizer"] // 4
    assert memory["activations"] < one["activations"] and memory["traffic"]["total"] > 0 and memory["libraries"] == 0
    tight = plan(recipe, spread=Spread("DDP", 2, memory=50_000))["arms"]
    assert not tight["full"]["memory"]["fits"]
    with pytest.raises(RecipeError, match="8 a step, which 3 processes"):
        plan(recipe, spread=Spread("DDP", 3))


def test_the_options_of_a_plan_are_validated(tmp_path):
    assert planned_spread(1, "", "") is None and planned_spread(1, "", "24GiB").memory == 24 * 2**30
    assert planned_spread(8, "", "80GB") == Spread("DDP", 8, memory=int(80e9))
    assert planned_spread(8, "deepspeed_zero2", "").kind == "ZeRO-2" == kind_of("zero2")
    for text in ("80", "80 GB", "1.5tb", "512mb"):
        assert byte_count(text) > 0
    for text in ("eighty", "-3GB", "0GB", "80 GX", ""):
        with pytest.raises(RecipeError, match="80GB"):
            byte_count(text)
    with pytest.raises(RecipeError, match="Did you mean 'fsdp2'"):
        planned_spread(8, "fspd2", "")
    with pytest.raises(RecipeError, match="--processes 8"):
        planned_spread(1, "fsdp2", "")


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_an_image_model_without_embeddings_is_sharded(kind):
    import torch

    from peft_recipes.models.small_cnn import SmallCnnConfig, SmallCnnForImageClassification
    from peft_recipes.planning.scaling import shared_step

    with torch.device("meta"):
        model = SmallCnnForImageClassification(SmallCnnConfig())
    weights = 4 * sum(p.numel() for p in model.parameters())
    step = {"weights": weights, "gradients": weights, "optimizer": 2 * weights, "activations": 0, "total": 4 * weights}
    assert shared_step(model, step, Spread(kind, 2), 1, False)["traffic"]["total"] > 0
