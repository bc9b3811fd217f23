"""Which rank is enough: groups of ranks, the verdict from intervals, and its text, table and plot."""

from __future__ import annotations

import pytest
from comparison_fixture import image_comparison
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, RandLoraConfig, VeraConfig
from small import compared_here

from peft_recipes import Arm
from peft_recipes.reporting import facts
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
    "change",
    [
        {"optim": "adafactor"}, {"quantise": "int8"}, {"lora_plus_ratio": 16.0},
        {"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.1}, {"init_lora_weights": "pissa"},
        {"target_modules": ["q_lin", "v_lin"]}, {"modules_to_save": ["embeddings"]}, {"bias": "all"},
        {"lora_bias": True}, {"layers_to_transform": [0]}, {"rank_pattern": {"q_lin": 3}}, {"lora_alpha": 5},
        {"alpha_pattern": {"q_lin": 3}},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_arms_that_differ_in_more_than_the_rank_are_no_group(change):
    of_arm = {key: value for key, value in change.items() if key in ("optim", "quantise", "lora_plus_ratio")}
    config = {"r": 8, "lora_alpha": 16, "target_modules": ["q_lin"], **{k: change[k] for k in change.keys() - of_arm}}
    changed = Arm(LoraConfig(**config), **of_arm)
    assert rank_groups({"lora": lora(4), "changed": changed}) == []
    assert rank_groups({"lora": lora(4), "changed": changed, "lora-r8": lora(8)}) == [["lora", "lora-r8"]]


def test_the_learning_rate_may_differ_because_each_arm_has_its_own():
    low, high = lora(4), lora(8)
    high.learning_rate = 3e-3
    assert rank_groups({"low": low, "high": high}) == [["low", "high"]]


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ({"lora_alpha": 16}, {"lora_alpha": 16}), ({"lora_alpha": 16}, {"lora_alpha": 64}),
        ({"lora_alpha": 16}, {"lora_alpha": 32}),  # with the square root of the rank
        ({"rank_pattern": {"k": 8}}, {"rank_pattern": {"k": 32}}),
        ({"rank_pattern": {"k": 8}}, {"rank_pattern": {"k": 8}}),
        ({"alpha_pattern": {"k": 8}, "lora_alpha": 4}, {"alpha_pattern": {"k": 32}, "lora_alpha": 16}),
    ],
)  # fmt: skip
def test_alphas_and_patterns_may_follow_the_rank(low, high):
    arms = {"high": Arm(LoraConfig(r=16, **high)), "low": Arm(LoraConfig(r=4, **low))}
    assert rank_groups(arms) == [["low", "high"]]


def test_one_rule_for_alpha_holds_in_a_whole_group():
    alphas = {"r4": (4, 8), "r8": (8, 16), "r16": (16, 32), "r8-same": (8, 32), "r32-same": (32, 32), "odd": (64, 7)}
    arms = {name: Arm(LoraConfig(r=rank, lora_alpha=alpha)) for name, (rank, alpha) in alphas.items()}
    assert rank_groups(arms) == [["r4", "r8", "r16"], ["r8-same", "r32-same"]]


@pytest.mark.parametrize(
    ("config", "grouped"),
    [
        (lambda rank: AdaLoraConfig(target_r=rank, init_r=2 * rank, total_step=10), True),
        (lambda rank: AdaLoraConfig(target_r=rank, init_r=64, total_step=10), True),
        (lambda rank: AdaLoraConfig(target_r=8, init_r=8 + rank, total_step=10), False),  # all end at rank 8
        (lambda rank: LoHaConfig(r=rank, alpha=2 * rank), True),
        (lambda rank: LoKrConfig(r=rank, alpha=16), True),
        (lambda rank: VeraConfig(r=rank), True),
        (lambda rank: OFTConfig(r=rank, oft_block_size=0), False),  # the number of blocks
        (lambda rank: OFTConfig(r=0, oft_block_size=rank), False),
        (lambda rank: RandLoraConfig(r=rank), False),
    ],
)
def test_a_rank_is_the_size_of_what_is_trained(config, grouped):
    arms = {"high": Arm(config(16)), "low": Arm(config(4)), "lora": lora(4), "full": Arm()}
    assert rank_groups(arms) == ([["low", "high"]] if grouped else [])


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


def test_the_report_groups_the_ranks_that_the_comparison_groups():
    """From comparison.json alone LoRA+ looks like a LoRA of another rank."""
    arms = image_comparison()["arms"]
    arms |= {"wide": {**arms["lora"], "rank": 64}}
    assert "wide" in facts.rank_groups(image_comparison(arms=arms))[0]
    assert facts.rank_groups(image_comparison(arms=arms, rank_groups=[])) == []
    assert facts.rank_groups(image_comparison(arms=arms, rank_groups=[["lora", "gone", "wide"]])) == [["lora", "wide"]]


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
    made = with_ranks("lora", -0.008, 0.004)
    made["arms"]["lora"]["learning_rate"] = 7e-4
    assert rank_lines(made)[0].endswith("Each rank has its own learning rate.")
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
