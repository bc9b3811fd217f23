"""Three steps of a recipe's full arm, to see what an option changes."""

from __future__ import annotations

import transformers

from peft_recipes.arms.apply import apply_arm
from peft_recipes.training.resolve import resolve


def logged(recipe, folder, what="loss", **training) -> list[float]:
    """Train for three steps with more training options; return what was logged of each step."""
    recipe = recipe.with_changes({"training": {"max_steps": 3, "eval_strategy": "no", **training}})
    resolved = resolve(recipe, ["full"])
    resolved.task.check_arguments(recipe.arms["full"], resolved.hardware)
    transformers.set_seed(0)
    base, new = resolved.task.load_base(resolved.prepared)
    resolved.task.use_base(base, resolved.prepared)
    model, _ = apply_arm(base, recipe.arms["full"], recipe.task, new)
    arguments = resolved.task.arguments(recipe.arms["full"], 0, resolved.hardware, folder, True)
    trainer = resolved.task.trainer(model, resolved.prepared, arguments, [])
    transformers.set_seed(0)
    trainer.train()
    return [entry[what] for entry in trainer.state.log_history if what in entry]
