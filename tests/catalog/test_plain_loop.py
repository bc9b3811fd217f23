"""recipes/plain_loop.py, the comparison in plain PEFT and transformers."""

from __future__ import annotations

import importlib.util
import re

import pytest

from peft_recipes import RecipeError, load_recipe
from peft_recipes.catalog.recipes import recipe_files

PATH = recipe_files()["distilbert-imdb"].with_name("plain_loop.py")


def test_the_plain_loop_compares_full_fine_tuning_and_lora(tiny, reviews, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("plain_loop", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--model", str(tiny("distilbert")), "--dataset", str(reviews), "--examples", "96",
                 "--max-steps", "2", "--output", str(tmp_path)])  # fmt: skip
    printed = re.findall(r"(\w+): test accuracy (0\.\d+|1\.0+), ([\d,]+) trained parameters", capsys.readouterr().out)
    trained = {arm: int(count.replace(",", "")) for arm, _, count in printed}
    assert list(trained) == ["full", "lora"] and trained["lora"] < trained["full"]
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file() and (tmp_path / "full").is_dir()


def test_the_plain_loop_is_not_listed_as_a_recipe():
    assert PATH.is_file() and "plain-loop" not in recipe_files()
    with pytest.raises(RecipeError, match="has no `recipe"):
        load_recipe(PATH)
