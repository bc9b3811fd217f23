"""Which rank is enough: groups of ranks, the verdict from intervals, and its text, table and plot."""

from __future__ import annotations

import pytest
from comparison_fixture import image_comparison
from peft import LoraConfig
from small import compared_here

from peft_recipes import Arm
from peft_recipes.reporting.markdown import render_markdown
from peft_recipes.reporting.quality_plots import quality_by_parameters
from peft_recipes.reporting.rank_sentences import rank_lines
from peft_recipes.reporting.rows import table
from peft_recipes.statistics.ranks import rank_groups, rank_verdicts


def lora(rank: int, targets=("q_lin",), **options) -> Arm:
    return Arm(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), **options), learning_rate=1e-2)


@pytest.fixture
def ranks(classify):
    """A recipe with the ranks 2, 4, 8 of one LoRA, and a LoRA with other targets."""
    arms = {f"lora-r{rank}": lora(rank) for rank in (8, 2, 4)}
    return classify(arms={"full": Arm(learning_rate=5e-3), **arms, "other": lora(4, ("v_lin",))})


def interval(low: float, high: float) -> dict:
    return {"estimate": (low + high) / 2, "ci95": [low, high], "verdict": "not shown"}


def test_arms_that_differ_only_in_rank_and_alpha_form_a_group(ranks):
    assert rank_groups(ranks.arms) == [["lora-r2", "lora-r4", "lora-r8"]]
    arms = {**ranks.arms, "dora": lora(16, use_dora=True)}
    assert rank_groups(arms) == [["lora-r2", "lora-r4", "lora-r8"]]


@pytest.mark.parametrize(
    ("intervals", "enough"),
    [
        ({2: (-0.05, -0.02), 4: (-0.008, 0.004)}, "lora-r4"),
        ({2: (-0.009, 0.02), 4: (-0.008, 0.004)}, "lora-r2"),  # not worse is enough, even if not shown to be equivalent
        ({2: (-0.05, -0.02), 4: (-0.02, 0.03)}, "lora-r8"),  # may be worse
        ({2: (0.02, 0.04), 4: (-0.5, -0.4)}, "lora-r2"),  # better on test than the best on validation
    ],
)
def test_the_smallest_rank_that_is_not_worse_by_more_than_the_margin_is_enough(ranks, intervals, enough):
    validation = {"lora-r2": 0.7, "lora-r4": 0.9, "lora-r8": 0.9, "other": 0.99}
    (group,) = rank_verdicts(
        ranks, list(ranks.arms), validation, lambda name, _: interval(*intervals[ranks.arms[name].peft.r]), 0.01
    )
    assert (group["against"], group["enough"]) == ("lora-r8", enough)
    assert group["ranks"] == {"lora-r2": 2, "lora-r4": 4, "lora-r8": 8}


def test_a_lower_loss_is_better(ranks):
    ranks.metric = "loss"
    validation = {"lora-r2": 1.2, "lora-r4": 1.0, "lora-r8": 1.1}
    (group,) = rank_verdicts(ranks, list(validation), validation, lambda *_: interval(-0.1, 0.005), 0.01)
    assert (group["against"], group["enough"]) == ("lora-r4", "lora-r2")
    (group,) = rank_verdicts(ranks, list(validation), validation, lambda *_: interval(-0.001, 0.1), 0.01)
    assert group["enough"] == "lora-r4"


def test_a_failed_rank_is_not_the_reference_and_one_rank_is_not_a_group(ranks):
    assert rank_verdicts(ranks, list(ranks.arms), {"lora-r2": 0.9}, lambda *_: None, 0.01) == []
    (group,) = rank_verdicts(ranks, list(ranks.arms), {"lora-r2": 0.9, "lora-r8": 0.8}, lambda *_: None, 0.01)
    assert group["enough"] == "lora-r2" and group["differences"] == {}


def with_ranks(enough: str, low: float, high: float) -> dict:
    group = {
        "ranks": {"lora-r2": 2, "lora": 8, "lora-r16": 16}, "against": "lora-r16", "margin": 0.01, "enough": enough,
        "differences": {"lora-r2": interval(-0.06, -0.03), "lora": interval(low, high)},
    }  # fmt: skip
    return image_comparison(ranks=[group])


def test_the_verdict_is_in_the_text_the_table_and_the_plot():
    comparison = with_ranks("lora", -0.008, 0.004)
    (line,) = rank_lines(comparison)
    assert line.startswith("r=8 is enough: of LoRA's ranks 2, 8 and 16") and "-0.8 to +0.4" in line and "50 %" in line
    cells = {row.name: str(row.cells.get("ranks", "")) for row in table(comparison).rows}
    assert (
        cells["lora"] == "-0.2 points (-0.8 to +0.4, enough)" and cells["lora-r16"] == "best" and cells["full"] == "-"
    )
    assert line in render_markdown(comparison)
    plot = quality_by_parameters(comparison)
    assert "Ringed: the smallest rank that is enough, r=8" in plot.caption
    (line,) = rank_lines(with_ranks("lora-r16", -0.03, 0.004))
    assert line.startswith("No rank below r=16 is shown to be enough") and "r=8 may be worse" in line
    assert rank_lines(image_comparison()) == []
    assert "ranks" not in [column.key for column in table(image_comparison()).columns]


def test_a_comparison_has_the_verdict_on_its_ranks(ranks, tmp_path):
    made = compared_here(ranks, ["lora-r2", "lora-r8"], [0, 1], tmp_path)  # needs no full arm
    (group,) = made.data["ranks"]
    other = next(name for name in group["ranks"] if name != group["against"])
    values = {name: made.data["arms"][name]["metric"]["mean"] for name in group["ranks"]}
    assert group["differences"][other]["estimate"] == pytest.approx(values[other] - values[group["against"]])
    assert group["differences"][other]["against"] == group["against"]
    assert "enough" in (made.folder / "comparison.md").read_text()
    assert "Which rank is enough" in (made.folder / "comparison.html").read_text()
