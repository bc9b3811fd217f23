"""Recipes: validation on creation, YAML without loss, and `--set` changes."""

from __future__ import annotations

import pytest
import yaml
from peft import AdaLoraConfig, IA3Config, LoraConfig, PrefixTuningConfig

from peft_recipes import Arm, Dataset, Recipe, RecipeError
from peft_recipes.catalog.changes import apply_changes


def recipe(**changes):
    options = {
        "name": "one",
        "task": "text-classification",
        "model": "org/model",
        "dataset": Dataset("org/data"),
        "arms": {"full": Arm(learning_rate=5e-5), "lora": Arm(LoraConfig(r=8, target_modules=["q"]), 1e-3)},
    }
    return Recipe(**{**options, **changes})


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=16, lora_alpha=32, target_modules=["b", "a"], lora_dropout=0.1, rank_pattern={"a": 4}),
        LoraConfig(
            r=2, target_modules=r".*\.(q|v)", use_dora=True, modules_to_save=["head"], init_lora_weights="pissa"
        ),
        IA3Config(target_modules=["k"], feedforward_modules=[]),
        AdaLoraConfig(target_modules=["q"], total_step=10, init_r=6, target_r=3),
        PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    ],
    ids=lambda c: c.peft_type.value,
)
def test_a_recipe_survives_a_round_trip_through_yaml(config, tmp_path):
    original = recipe(
        arms={"full": Arm(), "head": Arm("head", 1e-3), "adapter": Arm(config, learning_rate=3e-4)},
        training={"max_steps": 3, "warmup_steps": 0.1},
        embedded={"dataset": {"path": "embedded:x"}},
    )
    original.to_yaml(tmp_path / "r.yaml")
    loaded = Recipe.from_yaml(tmp_path / "r.yaml")
    assert loaded == original
    assert loaded.arms["adapter"].peft.to_dict() == config.to_dict()


def test_yaml_of_a_recipe_is_plain_data():
    assert "!!python" not in recipe().to_yaml()


def test_every_problem_is_reported_at_once():
    plain = recipe().to_dict()
    plain |= {"task": "sfft", "modle": 1, "training": {"max_step": 3, "num_train_epochs": "many"}}
    plain["arms"]["lora"]["peft"]["r"] = 0
    plain["arms"]["full"]["learning_rate"] = -1
    plain["dataset"]["txt"] = "a"
    with pytest.raises(RecipeError) as raised:
        Recipe.from_dict(plain)
    text = str(raised.value)
    for piece in (
        "'modle' in the recipe. Did you mean 'model'?",
        "'txt' in dataset. Did you mean 'text'?",
        "task 'sfft'. Did you mean 'sft'?",
        "'max_step' in training. Did you mean 'max_steps'?",
        "training.num_train_epochs: expected a number, got 'many'",
        "arms.lora.peft.r: the rank must be a whole number of 1 or more, got 0",
        "arms.full.learning_rate: expected a number above 0, got -1",
    ):
        assert piece in text
    assert len(raised.value.problems) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {}}, "needs at least one arm"),
        ({"name": "../up"}, "it names a folder"),
        ({"arms": {"base": Arm()}}, "not 'base'"),
        ({"arms": {"a": Arm("ful")}}, "Did you mean 'full'"),
        ({"arms": {"a": Arm(learning_rate=float("nan"))}}, "above 0"),
        ({"arms": {"a": Arm("head")}, "task": "sft"}, "'head' needs a task head"),
        ({"metric": "acuracy"}, "Did you mean 'accuracy'"),
        ({"max_length": 0}, "max_length"),
        ({"margin": -1}, "margin"),
        ({"training": {"learning_rate": 1}}, "arms.<ARM>.learning_rate"),
        ({"training": {"max_length": 3}}, "max_length of the recipe"),
        ({"training": {"seed": 3}}, "--seed"),
        ({"dataset": Dataset("d", train=0.9, validation=0.2)}, "add up to"),
        ({"dataset": Dataset("d", test=-5)}, "dataset.test"),
        ({"dataset": Dataset("d", format="alpacca")}, "Did you mean 'alpaca'"),
        ({"dataset": Dataset("d", transform={"rotatoin": 3})}, "Did you mean 'rotation'"),
        ({"dataset": Dataset("  ")}, "dataset.path"),
        ({"evaluate_also": {"test": {}}}, "split of the recipe itself"),
        ({"evaluate_also": {"clean": {"transfrom": 1}}}, "Did you mean 'transform'"),
        ({"prompts": [{"prompt": "x"}]}, "prompts[0]"),
    ],
)
def test_an_error_names_the_wrong_field(changes, message):
    with pytest.raises(RecipeError) as raised:
        recipe(**changes)
    assert message in str(raised.value)


def test_sft_options_are_valid_only_for_sft():
    arms = {"full": Arm()}
    assert recipe(task="sft", arms=arms, training={"loss_type": "nll"}).training == {"loss_type": "nll"}
    with pytest.raises(RecipeError, match="'loss_type' in training"):
        recipe(arms=arms, training={"loss_type": "nll"})


def test_dotted_keys_change_nested_values():
    changed = apply_changes(
        recipe(),
        ["arms.lora.peft.r=32", "arms.lora.learning_rate=1e-3", "training.max_steps=50", "dataset.path=my.csv",
         "arms.lora.peft.target_modules=[q, v]", "model=other/model"],
    )  # fmt: skip
    assert changed.arms["lora"].peft.r == 32
    assert changed.arms["lora"].learning_rate == 1e-3
    assert changed.arms["lora"].peft.target_modules == {"q", "v"}
    assert (changed.training["max_steps"], changed.dataset.path, changed.model) == (50, "my.csv", "other/model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("modle=x", "Did you mean 'model'"),
        ("trainning.max_steps=3", "Did you mean 'training'"),
        ("training.max_step=3", "Did you mean 'max_steps'"),
        ("arms.loar.learning_rate=3", "Did you mean 'lora'"),
        ("arms.lora.learnig_rate=3", "Did you mean 'learning_rate'"),
        ("arms.lora.peft.rr=3", "Did you mean 'r'"),
        ("arms.lora.peft.r=0", "whole number of 1 or more"),
        ("dataset.pth=3", "Did you mean 'path'"),
        ("model.name=3", "nothing inside it"),
        ("model", "expected KEY=VALUE"),
        ("arms.new=3", "Unknown arm 'new'"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(change, message):
    with pytest.raises(RecipeError) as raised:
        apply_changes(recipe(), [change])
    assert message in str(raised.value)


def test_yaml_with_python_objects_is_rejected(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(RecipeError, match=r"r\.yaml can't be read as YAML"):
        Recipe.from_yaml(path)


def test_invalid_yaml_names_its_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: one\n  task: [\n")
    with pytest.raises(RecipeError, match="line 2"):
        Recipe.from_yaml(path)


def test_plain_dicts_and_yaml_agree():
    assert Recipe.from_dict(yaml.safe_load(recipe().to_yaml())) == recipe()
