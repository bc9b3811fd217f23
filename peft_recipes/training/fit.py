"""Fit the model of a run: from its last checkpoint where there is one, with the guards of training."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.data.packing import Counts
from peft_recipes.distributed import processes
from peft_recipes.guards import checks
from peft_recipes.runs.log import write_bad_batch
from peft_recipes.training.callbacks import LearningCallback
from peft_recipes.training.pause import Pause

if TYPE_CHECKING:
    from transformers import Trainer, TrainerState

    from peft_recipes.measuring.steps import StepMeter
    from peft_recipes.runs.checkpoints import Checkpoint
    from peft_recipes.training.setup import Setup


def fit(setup: Setup, trainer: Trainer, meter: StepMeter, checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    """Train, and return the run's training figures; None where the run has paused before its end.

    Raises KeyboardInterrupt or Terminated after a signal, and FloatingPointError for a loss that is not finite, whose
    examples are written to bad_batch.json.
    """
    guard, arm, processor = setup.guard, setup.run.arm, setup.prepared.processor
    if processor is not None and hasattr(processor, "pad_token_id"):
        rows = trainer.train_dataset if setup.prepared.stream is None else setup.prepared.splits["train"]
        guard("padding", _check_padding, trainer, processor, rows)
    before = checks.trainable_snapshot(trainer.model)
    # Under FSDP2 only rank 0 is sure to hold the base by now.
    frozen = guard("frozen", checks.frozen_sums, trainer.model) if processes.is_rank_zero() else {}
    trainer.add_callback(LearningCallback(guard, before, arm))
    resumed_at, paused_at = _restore(trainer, meter, checkpoint)
    trainer.run_state = lambda: {
        "signature": setup.signature,
        "max_steps": trainer.state.max_steps,
        "meter": meter.state(),
        "counts": [astuple(counts) for counts in trainer.step_counts()],
        "resumed_at_steps": resumed_at,
        "paused_at_steps": [*paused_at, *([trainer.state.global_step] if setup.pause.reached else [])],
    }
    _seed_dropout(trainer.args.seed)
    try:
        with setup.interruption.deferred_signals():
            _train(trainer, checkpoint, setup.pause)
    except FloatingPointError as error:
        if not processes.is_rank_zero():
            raise
        ids = setup.prepared.ids["train"] if setup.prepared.stream is None else None
        path = write_bad_batch(setup.run.folder, trainer, ids)
        raise FloatingPointError(f"{error} Its examples are in {path.name}.") from error
    if setup.pause.reached:
        return None
    trained = trainer.accelerator.unwrap_model(trainer.model)
    guard("learning", checks.weights_moved, before, trained, arm)
    with guard.recorded("frozen"):
        guard("frozen", checks.frozen_unchanged, frozen or {}, trained, arm)
    figures = meter.figures(trainer.step_counts(), trainer.pass_figures, processes.all_gather(trainer.own_tokens()))
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    batches = {"batches": trainer.batches, "packed_attention": trainer.packed_attention}
    stops = {"resumed_at_steps": resumed_at, "paused_at_steps": paused_at}
    return {**figures, **batches, **stops, "best_step": best}


def _check_padding(trainer: Trainer, processor: Any, rows: Any) -> None:
    """The padding guard, on a batch of the training rows as training collates it."""
    count = min(trainer.args.per_device_train_batch_size, len(rows))
    batch = trainer.data_collator([rows[i] for i in range(count)])
    batch = batch if isinstance(batch, dict) else {}  # grpo's batches are made of the answers it draws
    checks.padding_is_set(trainer.model, processor, batch)


def _restore(trainer: Trainer, meter: StepMeter, checkpoint: Checkpoint | None) -> tuple[list[int], list[int]]:
    """Restore measurements and counts; return the steps at which the run was resumed, and those at which it paused."""
    if checkpoint is None:
        return [], []
    state = checkpoint.state
    meter.restore(state["meter"])
    trainer.restore_counts([Counts(*counts) for counts in state["counts"]])
    resumed, paused = state["resumed_at_steps"], state.get("paused_at_steps", [])
    return resumed if checkpoint.step in paused else [*resumed, checkpoint.step], paused


def _seed_dropout(seed: int) -> None:
    """Give each rank but 0 its own seed: otherwise all ranks would drop the same positions."""
    if processes.rank():
        import transformers

        transformers.set_seed(seed + processes.rank())


def _train(trainer: Trainer, checkpoint: Checkpoint | None, pause: Pause) -> None:
    if checkpoint is None:
        trainer.train()
    elif checkpoint.step >= checkpoint.state["max_steps"]:  # Trainer would train one step more
        trainer.load_checkpoint_weights(_final_weights(trainer, checkpoint))
        trainer.shard_for_evaluation()
    elif pause.is_due(checkpoint.step, checkpoint.state["max_steps"]):  # it ended before it wrote its progress
        trainer.state = _stored_state(checkpoint)
        trainer.load_checkpoint_weights(checkpoint.folder)
        trainer.shard_for_evaluation()
        pause.reached = True
    else:
        if trainer.is_fsdp_enabled:  # before the weights are sharded
            trainer.load_checkpoint_weights(checkpoint.folder)
        trainer.train(resume_from_checkpoint=str(checkpoint.folder))


def _final_weights(trainer: Trainer, checkpoint: Checkpoint) -> Path:
    """Restore the state of a run whose training is complete; return the checkpoint with the weights it ends with."""
    trainer.state = _stored_state(checkpoint)
    best = checkpoint.folder.with_name(f"checkpoint-{trainer.state.best_global_step}")
    return best if trainer.args.load_best_model_at_end and best.is_dir() else checkpoint.folder


def _stored_state(checkpoint: Checkpoint) -> TrainerState:
    from transformers import TrainerState

    return TrainerState.load_from_json(str(checkpoint.folder / "trainer_state.json"))
