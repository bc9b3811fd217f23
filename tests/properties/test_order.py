"""Every arm of a comparison sees the same examples in every optimiser step, whatever its batches look like."""

from __future__ import annotations

import pytest
import transformers
from architectures import save_tiny_base
from peft import LoraConfig

from peft_recipes import Arm, Recipe, RecipeError
from peft_recipes.arms.apply import apply_arm
from peft_recipes.arms.methods import METHODS
from peft_recipes.arms.selection import choose_arms
from peft_recipes.tasks.trainer import TrainerMixin
from peft_recipes.training.resolve import resolve

SOME = ("lora", "prompt-tuning", "ia3", "adalora")


@pytest.fixture
def examples_of(monkeypatch, tmp_path):
    """examples_of(recipe, arm) -> the ids of each step's examples in two epochs, as the arm's trainer loads them."""
    orders: list[list[list[int]]] = []
    loader_of = TrainerMixin.get_train_dataloader

    def recorded(self):
        loader, batches = loader_of(self), []
        for epoch in (1, 0):
            loader.set_epoch(epoch)
            batches = [[int(i) for i in batch] for batch in loader.batch_sampler] + batches
        orders.append(batches)
        return loader

    monkeypatch.setattr(TrainerMixin, "get_train_dataloader", recorded)

    def examples(recipe: Recipe, arm: str, resolved=None) -> list[list[str]]:
        resolved = resolved or resolve(recipe, [arm])
        transformers.set_seed(3)
        base, new = resolved.task.load_base(resolved.prepared, resolved.recipe.arms[arm].quantise)
        resolved.task.use_base(base, resolved.prepared)
        model, _ = apply_arm(base, resolved.recipe.arms[arm], recipe.task, new, arm)
        arguments = resolved.task.arguments(resolved.recipe.arms[arm], 0, resolved.hardware, tmp_path, True)
        resolved.task.trainer(model, resolved.prepared, arguments, []).get_train_dataloader()
        ids = resolved.prepared.ids["train"]
        return [[ids[i] for i in batch] for batch in orders[-1]]

    return examples


def with_arms(recipe: Recipe, names, **arms: Arm) -> Recipe:
    training = {**recipe.training, "max_steps": 1, "eval_strategy": "no"}
    recipe = Recipe(**{**vars(recipe), "training": training, "arms": {"full": Arm(learning_rate=1e-3), **arms}})
    return choose_arms(recipe, ["full", *arms, *names]).recipe


def assert_one_order(recipe: Recipe, examples_of) -> str:
    """All arms have one order, resolved alone (`train`) or together (`compare`); returns the sampling strategy."""
    together = resolve(recipe, list(recipe.arms))
    orders = {}
    for arm in recipe.arms:
        orders[arm] = examples_of(recipe, arm)
        assert orders[arm] == examples_of(recipe, arm, together), arm
    assert all(order == orders["full"] for order in orders.values()), {a: o[:2] for a, o in orders.items()}
    assert len(orders["full"]) > 2 and len({i for batch in orders["full"] for i in batch}) > 20
    return together.recipe.training.get("train_sampling_strategy", "random")


ALORA = Arm(LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[5]), learning_rate=1e-3)


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_on_a_base_that_can_be_packed_arms_that_are_padded_keep_the_random_order(instruct, prefer, examples_of, task):
    recipe = with_arms((instruct if task == "sft" else prefer)(), SOME, alora=ALORA)
    assert assert_one_order(recipe, examples_of) == "random"


@pytest.mark.parametrize("kind", ["bloom", "gpt_neo", "mamba", "mixtral", "qwen3_next"])
def test_on_a_base_that_must_be_padded_all_arms_are_grouped_by_length(instruct, examples_of, tmp_path, kind):
    recipe = with_arms(instruct(model=str(save_tiny_base(kind, tmp_path / kind))), ["lora"])
    assert assert_one_order(recipe, examples_of) == "group_by_length"


@pytest.mark.parametrize("changes", [{"batches": "padded"}, {"training": {"neftune_noise_alpha": 5.0}}], ids=str)
def test_what_the_recipe_pads_is_grouped_for_all_arms(instruct, examples_of, changes):
    recipe = with_arms(instruct().with_changes(changes), ["lora", "prompt-tuning"])
    assert assert_one_order(recipe, examples_of) == "group_by_length"


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "sequential"])
def test_an_order_that_the_recipe_sets_is_that_of_all_arms(classify, examples_of, strategy):
    recipe = classify("gpt2").with_changes({"training": {"train_sampling_strategy": strategy}})
    assert assert_one_order(with_arms(recipe, ["lora", "prompt-tuning"], head=Arm("head")), examples_of) == strategy


def test_every_method_of_the_table_has_the_order_of_the_full_fine_tune(instruct, tiny, examples_of):
    recipe = instruct(model=str(tiny("llama", 64)))
    orders = {}
    for name in ("full", *METHODS):
        try:
            one = with_arms(recipe, [name])
            orders[name] = examples_of(one, name)
        except RecipeError:
            continue  # it does not fit this base, or needs what is not installed
    assert len(orders) > 25 and all(order == orders["full"] for order in orders.values())
