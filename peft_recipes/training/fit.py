"""The fit of a run: from its last checkpoint where there is one, guarded, and interrupted only between steps."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from peft_recipes.data.packing import Counts
from peft_recipes.distributed import processes
from peft_recipes.guards import checks
from peft_recipes.training.callbacks import LearningCallback

if TYPE_CHECKING:
    from transformers import Trainer

    from peft_recipes.guards.runner import Guards
    from peft_recipes.measuring.steps import StepMeter
    from peft_recipes.runs.checkpoints import Checkpoint
    from peft_recipes.training.interruption import Interruption


@dataclass
class Fit:
    """One call of a trainer. signature: whose checkpoints these are. checkpoint: where it goes on from, if anywhere."""

    trainer: Trainer
    meter: StepMeter
    guard: Guards
    arm: str
    signature: str
    checkpoint: Checkpoint | None
    interruption: Interruption

    def do(self) -> dict[str, Any]:
        """Trains, and returns the run's training figures. Raises KeyboardInterrupt or Terminated after a signal."""
        trainer = self.trainer
        before = checks.trainable_snapshot(trainer.model)
        # The other processes may hold no base yet: FSDP2 sends them their parts of the main one's.
        frozen = self.guard("frozen", checks.frozen_sums, trainer.model) if processes.is_rank_zero() else {}
        trainer.add_callback(LearningCallback(self.guard, before, self.arm))
        resumed = self._restore()
        trainer.run_state = lambda: self._state(resumed)
        _own_dropout(trainer.args.seed)
        with self.interruption.heeded_after():
            self._train()
        trained = trainer.accelerator.unwrap_model(trainer.model)
        self.guard("learning", checks.weights_moved, before, trained, self.arm)
        self.guard("frozen", checks.frozen_unchanged, frozen or {}, trained, self.arm)
        figures = self.meter.figures(
            trainer.step_counts(), getattr(trainer, "pass_figures", None), processes.all_gather(trainer.own_tokens())
        )
        return {**figures, "batches": trainer.batches, "resumed_at_steps": resumed}

    def _train(self) -> None:
        if self.checkpoint is None:
            self.trainer.train()
        elif self.checkpoint.step >= self.checkpoint.state["max_steps"]:
            self.trainer.load_checkpoint_weights(self.checkpoint.folder)  # Trainer would train a step more
            self.trainer.spread()
        else:
            if self.trainer.is_fsdp_enabled:  # before the weights are spread over processes
                self.trainer.load_checkpoint_weights(self.checkpoint.folder)
            self.trainer.train(resume_from_checkpoint=str(self.checkpoint.folder))

    def _restore(self) -> list[int]:
        """What was measured and counted before the checkpoint; returns the steps that the run was resumed at."""
        if self.checkpoint is None:
            return []
        state = self.checkpoint.state
        self.meter.restore(state["meter"])
        self.trainer.restore_counts([Counts(*counts) for counts in state["counts"]])
        return [*state["resumed_at_steps"], self.checkpoint.step]

    def _state(self, resumed: list[int]) -> dict[str, Any]:
        return {
            "signature": self.signature,
            "max_steps": self.trainer.state.max_steps,
            "meter": self.meter.state(),
            "counts": [astuple(counts) for counts in self.trainer.step_counts()],
            "resumed_at_steps": resumed,
        }


def _own_dropout(seed: int) -> None:
    """Processes but the main one draw from seeds of their own: else all would drop the same places."""
    if processes.rank():
        import transformers

        transformers.set_seed(seed + processes.rank())


def first_batch_is_padded_right(trainer: Trainer, processor: Any) -> None:
    """The guard of padding, on a batch as training will see it."""
    count = min(trainer.args.per_device_train_batch_size, len(trainer.train_dataset))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(count)])
    checks.padding_is_set(trainer.model, processor, batch)
