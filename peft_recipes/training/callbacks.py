"""Trainer callbacks of a run: checkpoints by time or signal, and an early check that the weights move."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from peft_recipes.distributed import processes
from peft_recipes.guards import checks
from peft_recipes.guards.runner import Guards
from peft_recipes.training.interruption import Interruption
from peft_recipes.training.pause import Pause


class CheckpointCallback(TrainerCallback):
    """Save a checkpoint every `seconds`, at the end of training, and where it ends early: after a signal, at a pause.

    At the end only where a fifth of `seconds` has passed since the last one: a short run is soon repeated. At the
    end of an epoch the checkpoint follows the evaluation, so that a resumed run does not have to repeat it.
    """

    def __init__(self, seconds: float, interruption: Interruption, pause: Pause | None = None):
        self.seconds, self.interruption, self.pause = seconds, interruption, pause or Pause()
        self._last, self._at_epoch_end, self._stopped = time.monotonic(), False, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = time.monotonic()
        self.interruption.deferred = True  # from here on there are steps to lose

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        passed, last = time.monotonic() - self._last, state.global_step >= state.max_steps
        due = passed >= (self.seconds / 5 if last else self.seconds)
        # All ranks stop and save at the same step; rank 0's clock decides.
        signal, due = processes.all_reduce_max(self.interruption.received or 0, due and processes.is_rank_zero())
        if signal:
            self.interruption.receive(signal)
        elif self.pause.is_due(state.global_step, state.max_steps):
            self.pause.reached = True
        self._stopped = signal > 0 or self.pause.reached
        control.should_training_stop = control.should_training_stop or self._stopped
        if self._stopped or due:
            self._at_epoch_end = last or float(state.epoch).is_integer()
            control.should_save = control.should_save or not self._at_epoch_end

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._at_epoch_end:
            control.should_save, self._at_epoch_end = True, False
        elif self._stopped:  # Trainer ends the epoch here; it is evaluated once it is complete
            control.should_evaluate = control.should_save = control.should_log = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = time.monotonic()
        if self._stopped:  # Trainer would load the best weights now, and delete the checkpoint to continue from
            args.load_best_model_at_end, args.save_total_limit = False, None


_STEPS = 10  # at least one of them has a learning rate above 0, whatever the warm-up


class LearningCallback(TrainerCallback):
    """Stop a run after 10 steps if its weights have not moved."""

    def __init__(self, guard: Guards, before: dict[str, Any], arm: str):
        self.guard, self.before, self.arm, self._learning_rate_seen = guard, before, arm, False

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, lr_scheduler: Any = None, **_: Any):
        if state.global_step < _STEPS and lr_scheduler is not None:
            self._learning_rate_seen = self._learning_rate_seen or any(lr > 0 for lr in lr_scheduler.get_last_lr())
        if state.global_step == _STEPS and self._learning_rate_seen:
            self.guard("learning", checks.weights_moved, self.before, model, self.arm)
