"""What our trainers add to the libraries' own so that a run that was killed goes on as if it had not been."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from peft_recipes import checkpoints
from peft_recipes.interruption import Interruption


class CheckpointMixin(Trainer):
    """Checkpoints are written beside and renamed, hold the adapter and not the base, and what was counted so far.

    run_state: gives what a run stores with each checkpoint, as JSON takes it. None: no run, so the library's own way.
    """

    run_state: Callable[[], dict[str, Any]] | None = None
    may_checkpoint = True  # not where a run is done again sooner than it is stored: a head on features

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not self.may_checkpoint:
            return
        if self.run_state is None:
            super()._save_checkpoint(model, trial)
            return
        folder, step = Path(self.args.output_dir), self.state.global_step
        with checkpoints.staged(folder) as staging:
            self.args.output_dir = str(staging)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(folder)
            made = checkpoints.publish(staging / f"checkpoint-{step}", folder, self.run_state())
        if self.state.best_global_step:
            best = folder / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best if best.is_dir() else made)
        rotate_checkpoints(str(folder), self.args.save_total_limit or 1, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        from peft import PeftModel

        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.run_state is not None and isinstance(model, PeftModel):
            # "auto" would ask the Hub at every checkpoint whether the vocabulary grew.
            model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)
        else:
            super()._save(output_dir, state_dict)

    def load_checkpoint_weights(self, folder: Path) -> None:
        """The weights alone: of a run whose training was done, and whose evaluation or saving was not."""
        self._load_from_checkpoint(str(folder))


class CheckpointCallback(TrainerCallback):
    """Asks for a checkpoint every `seconds` and after training; after a signal for one, and for the end.

    After training only where a fifth of `seconds` has passed since the last one: a short run is soon repeated. At the
    end of an epoch the checkpoint follows the evaluation, so that a resumed run has no evaluation to make up for.
    """

    def __init__(self, seconds: float, interruption: Interruption):
        self.seconds, self.interruption = seconds, interruption
        self._last, self._at_epoch_end, self._stopped = time.monotonic(), False, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = time.monotonic()
        self.interruption.deferred = True  # from here on there is something to lose

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        passed, last = time.monotonic() - self._last, state.global_step >= state.max_steps
        self._stopped = self.interruption.asked is not None
        if self._stopped:
            control.should_training_stop = True
        if self._stopped or passed >= (self.seconds / 5 if last else self.seconds):
            self._at_epoch_end = last or float(state.epoch).is_integer()
            control.should_save = control.should_save or not self._at_epoch_end

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._at_epoch_end:
            control.should_save, self._at_epoch_end = True, False
        elif self._stopped:  # midway: the epoch's evaluation comes when it is whole
            control.should_evaluate = control.should_save = control.should_log = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = time.monotonic()
