"""Recipes load by name and by path; every shipped one is valid, as it is and embedded."""

from __future__ import annotations

import pytest

from peft_recipes import Recipe, RecipeError, load_recipe
from peft_recipes.catalog.recipes import recipe_files

SHIPPED = [
    "distilbert-imdb",
    "distilbert-pairs",
    "gpt2-code",
    "gpt2-sms-spam",
    "mnist-shift",
    "smollm2-alpaca",
    "smollm2-arithmetic",
    "smollm2-dpo",
    "vision-shift",
]


def test_every_shipped_recipe_is_listed():
    assert list(recipe_files()) == SHIPPED


@pytest.mark.parametrize("name", sorted(recipe_files()))
def test_a_shipped_recipe_has_the_name_of_its_file_and_survives_a_round_trip(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert not recipe.uses_stand_ins
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("name", sorted(recipe_files()))
def test_a_shipped_recipe_has_stand_ins_full_fine_tuning_and_an_adapter(name):
    recipe = load_recipe(name, embedded=True)
    assert recipe.uses_stand_ins
    assert recipe.arms["full"].method == "full"
    assert any(arm.peft is not None for arm in recipe.arms.values())
    # A shared learning rate makes one of the arms look bad, unless scans of both found the same.
    shared = recipe.arms["full"].learning_rate == recipe.arms["lora"].learning_rate
    assert recipe.arms["full"].learning_rate <= recipe.arms["lora"].learning_rate and shared == (name == "vision-shift")


def test_shipped_arms_have_the_documented_options():
    lora = load_recipe("smollm2-alpaca").arms["lora"].peft
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (16, 16, 0)
    assert lora.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    dpo = load_recipe("smollm2-dpo").arms["lora"].peft
    assert (dpo.r, dpo.target_modules) == (16, {"q_proj", "k_proj", "v_proj", "o_proj"})
    code = load_recipe("gpt2-code").arms
    assert (code["lora"].peft.r, code["lora"].peft.lora_alpha, code["lora"].peft.lora_dropout) == (8, 16, 0.1)
    shift = load_recipe("mnist-shift").arms
    assert (shift["lora"].peft.r, shift["lora"].peft.lora_alpha) == (8, 16)
    assert set(shift) == {"full", "head", "lora", "lora-conv", "lora-r2", "lora-r4", "lora-r16"}


def test_a_typo_in_a_name_names_the_nearest_recipe():
    with pytest.raises(RecipeError, match="Did you mean 'mnist-shift'"):
        load_recipe("mnist-shfit")


def test_a_recipe_can_be_loaded_from_a_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(load_recipe("gpt2-sms-spam").to_yaml())
    assert load_recipe(path) == load_recipe("gpt2-sms-spam")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "no `recipe = Recipe"),
        ("x = 1\ny = = 2\n", "line 2"),
        ("x = 1\nimport nothing_of_this_name\n", "line 2"),
        ("from peft_recipes import *\nrecipe = Recipe('a', 'sfft', 'm', Dataset('d'), {'x': Arm()})\n",
         "Did you mean 'sft'"),
    ],
)  # fmt: skip
def test_a_broken_recipe_module_names_its_file_and_line(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    assert message in str(raised.value) and "mine.py" in str(raised.value)


def test_a_missing_recipe_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match="no recipe file"):
        load_recipe(tmp_path / "none.yaml")
