"""What is watched while a run trains."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from peft_recipes import checks
from peft_recipes.guards import Guards

_STEPS = 10  # of which at least one has a learning rate above 0, whatever the warm-up


class LearningCallback(TrainerCallback):
    """Stops a run early whose weights do not move: what follows would be as idle."""

    def __init__(self, guard: Guards, before: dict[str, Any], name: str):
        self.guard, self.before, self.name, self._rate_seen = guard, before, name, False

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, lr_scheduler: Any = None, **_: Any):
        if state.global_step < _STEPS and lr_scheduler is not None:
            self._rate_seen = self._rate_seen or any(rate > 0 for rate in lr_scheduler.get_last_lr())
        if state.global_step == _STEPS and self._rate_seen:
            self.guard("learning", checks.weights_moved, self.before, model, self.name)
