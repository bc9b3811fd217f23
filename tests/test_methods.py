"""The table of methods: each trains, saves its adapter alone and comes back the same, or says why it can't."""

from __future__ import annotations

import pytest

from peft_recipes import Arm, Dataset, Recipe, RecipeError, train
from peft_recipes.methods import METHODS

CLASSIFY, SFT = "text-classification", "sft"
WHERE = [("gpt2", CLASSIFY), ("distilbert", CLASSIFY), ("llama", SFT)]
ALONE = "PEFT stores no classification head with it"
# What a library can't do, with the words that the user reads.
UNFIT = {
    ("distilbert", "prefix-tuning"): "keep no keys and values",
    ("llama", "bitfit"): "has no biases",
    **{(kind, name): ALONE for kind in ("gpt2", "distilbert") for name in ("adaption-prompt", "trainable-tokens")},
}


@pytest.fixture
def short(classify, instruct):
    """short(kind, task) -> a recipe of three steps with the arm full alone."""

    def make(kind: str, task: str, **changes) -> Recipe:
        made = (instruct if task == SFT else classify)(kind)
        sizes = {"train": 24, "validation": 8, "test": 8}
        options = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "use_cpu": True, "eval_strategy": "no"}
        data = Dataset(**{**vars(made.dataset), **sizes})
        return (
            made.with_changes({"training": options} | changes)
            if False
            else Recipe(
                **{
                    **vars(made),
                    "dataset": data,
                    "training": options,
                    "arms": {"full": Arm(learning_rate=5e-3)},
                    **changes,
                }
            )
        )

    return make


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("kind", "task"), WHERE, ids=lambda value: value)
def test_a_method_trains_and_comes_back_or_says_why_not(short, tmp_path, kind, task, name):
    recipe = short(kind, task)
    if (kind, name) in UNFIT:
        with pytest.raises(RecipeError, match=UNFIT[kind, name]):
            train(recipe, name, output=tmp_path)
        assert not (tmp_path / recipe.name).exists()
        return
    run = train(recipe, name, output=tmp_path)
    data = run.data
    assert data["status"] == "ok" and data["training"]["steps"] == 3
    assert data["checks"]["learning"] is True and data["checks"]["frozen"] is True
    assert data["checks"]["reload"] < 1e-4
    merged = data["checks"].get("merge")
    assert isinstance(merged, float) if METHODS[name].merges and name != "bitfit" else not isinstance(merged, float)
    assert not list(run.folder.glob("model*.safetensors"))
    # The adapter and, in classification, the new head; nothing of the base's size.
    assert data["parameters"]["adapter"] > 0 and (data["parameters"]["head"] > 0) == (task == CLASSIFY)


FITS_IMAGES = [n for n in METHODS if n not in (
    "ln-tuning", "prompt-tuning", "prefix-tuning", "p-tuning", "adaption-prompt", "trainable-tokens")]  # fmt: skip
