"""Three steps of one arm of a recipe, to see what an option changes."""

from __future__ import annotations

import transformers

from peft_recipes.arms.apply import apply_arm
from peft_recipes.training.resolve import resolve


def trainer_of(recipe, folder, arm="full", **training):
    """The trainer of three steps of an arm, with more training options."""
    recipe = recipe.with_changes({"training": {"max_steps": 3, "eval_strategy": "no", **training}})
    resolved = resolve(recipe, [arm])
    resolved.task.check_arguments(recipe.arms[arm], resolved.hardware)
    transformers.set_seed(0)
    base, new = resolved.task.load_base(resolved.prepared)
    resolved.task.use_base(base, resolved.prepared)
    model, _ = apply_arm(base, recipe.arms[arm], recipe.task, new)
    arguments = resolved.task.arguments(recipe.arms[arm], 0, resolved.hardware, folder, True)
    trainer = resolved.task.trainer(model, resolved.prepared, arguments, [])
    transformers.set_seed(0)
    return trainer


def logged(recipe, folder, what="loss", **training) -> list[float]:
    """Train the full arm; return what was logged of each step."""
    trainer = trainer_of(recipe, folder, **training)
    trainer.train()
    return [entry[what] for entry in trainer.state.log_history if what in entry]
