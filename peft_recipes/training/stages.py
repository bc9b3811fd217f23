"""The stages of a run: load the base, apply the arm, fit, evaluate, store, verify. Each is a function of a `Setup`."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from peft_recipes.arms.apply import Parameters, apply_arm
from peft_recipes.cards.write import write_run_card
from peft_recipes.distributed import gather, processes
from peft_recipes.guards import checks
from peft_recipes.guards.runner import Guards
from peft_recipes.measuring.steps import StepMeter, Stopwatch
from peft_recipes.models.architectures import parameters_by_component
from peft_recipes.recipe.arm import Arm
from peft_recipes.runs import checkpoints, facts
from peft_recipes.runs.checkpoints import Checkpoint
from peft_recipes.runs.files import clear, make_folder, write_json
from peft_recipes.runs.folder import RUN_FILE, Run
from peft_recipes.runs.lock import LOCK_FILES, locked
from peft_recipes.runs.log import log, log_step, no_log, open_log, write_bad_batch
from peft_recipes.runs.predictions import Evaluation, write_predictions
from peft_recipes.training.callbacks import CheckpointCallback
from peft_recipes.training.fit import Fit, first_batch_is_padded_right
from peft_recipes.training.interruption import Interruption
from peft_recipes.training.resolve import Resolved
from peft_recipes.training.save import save
from peft_recipes.training.verify import verify

if TYPE_CHECKING:
    import torch.nn as nn
    from transformers import Trainer


@dataclass
class Setup:
    """What the stages of one run share.

    signature: of recipe, arm, seed, data and code; a checkpoint of another signature is not resumed. attention: the
    attention implementation of the loaded base.
    """

    resolved: Resolved
    arm_name: str
    seed: int
    folder: Path
    signature: str
    guard: Guards
    watch: Stopwatch
    attention: str | None = None

    @property
    def arm(self) -> Arm | None:
        """None for the untrained base."""
        return self.resolved.recipe.arms.get(self.arm_name)


def load_base(setup: Setup) -> tuple[nn.Module, list[str]]:
    """The base with the task's head, and the names of its new weights; rank 0 downloads first."""
    quantise = setup.arm.quantise if setup.arm else None
    return processes.local_rank_zero_first(lambda: setup.resolved.task.load_base(setup.resolved.prepared, quantise))


def apply(setup: Setup, base: nn.Module, new_weights: list[str]) -> tuple[nn.Module, Parameters]:
    """The base with the arm applied, and its parameter counts."""
    if setup.arm is None:
        components = dict(parameters_by_component(base))
        return base, Parameters(0, 0, 0, sum(components.values()), components)
    recipe, name = setup.resolved.recipe, setup.arm_name
    model, parameters = apply_arm(base, setup.arm, recipe.task, new_weights, name, skip_checks=recipe.skip_checks)
    setup.guard("trainable", checks.something_is_trainable, model, name)
    if setup.arm.peft is not None:
        setup.guard("saved", checks.trained_weights_are_saved, model, new_weights, name)
    return model, parameters


def take_folder(setup: Setup, held: contextlib.ExitStack, resume: bool, wait: bool) -> Checkpoint | None:
    """Make, lock and clear the run's folder until `held` is closed; return the checkpoint to resume from, if any."""
    make_folder(setup.folder)
    held.enter_context(locked(setup.folder, wait=wait))
    found = None
    if resume and setup.arm is not None:
        found, skipped = checkpoints.newest(setup.folder / checkpoints.FOLDER, setup.signature)
        setup.resolved.prepared.notes += skipped
    kept = (checkpoints.FOLDER, "log.jsonl") if found else ()
    clear(setup.folder, keep=(*LOCK_FILES, "log.txt", *kept))
    setup.resolved.recipe.to_yaml(setup.folder / "recipe.yaml")
    return found


def train_and_store(
    setup: Setup,
    model: nn.Module,
    parameters: Parameters,
    checkpoint: Checkpoint | None,
    interruption: Interruption,
    quiet: bool,
) -> dict[str, Any]:
    """Fit, evaluate, save and verify; returns the content of run.json."""
    at = checkpoint.step if checkpoint else 0
    with open_log(setup.folder / "log.jsonl", at) if processes.is_rank_zero() else no_log() as lines:
        trainer, meter = _trainer(setup, model, lines, interruption, quiet)
        figures = None
        if setup.arm is not None:
            with setup.watch("train"):
                figures = _fit(setup, trainer, meter, checkpoint, interruption)
        log(lines, stage="evaluate")
        evaluations = _evaluate(setup, trainer)
        trained = _gathered_model(setup, trainer)
        # The other ranks wait for rank 0, which has the gathered model.
        return processes.from_rank_zero(lambda: _store(setup, trained, evaluations, figures, parameters, lines))


def finish(setup: Setup, data: dict[str, Any], *, card: bool) -> dict[str, Any]:
    """Write run.json, the last file of a run, and delete its checkpoints.

    card: write the model card too; a comparison writes the cards of its runs itself, once it has all figures.
    """
    write_json(setup.folder / RUN_FILE, data)
    shutil.rmtree(setup.folder / checkpoints.FOLDER, ignore_errors=True)  # nothing is left to resume
    if card:
        write_run_card(Run(setup.folder, data))
    return data


def run_facts(setup: Setup, parameters: Parameters | None = None) -> dict[str, Any]:
    """The part of run.json that is known whether or not the run succeeds."""
    return facts.facts(
        setup.resolved.recipe,
        setup.arm_name,
        setup.seed,
        setup.resolved.prepared,
        setup.resolved.hardware,
        signature=setup.signature,
        attention=setup.attention,
        parameters=parameters.to_dict() if parameters else None,
    )


def _trainer(
    setup: Setup, model: nn.Module, lines: TextIO, interruption: Interruption, quiet: bool
) -> tuple[Trainer, StepMeter]:
    from transformers import PrinterCallback

    resolved, recipe = setup.resolved, setup.resolved.recipe
    meter = StepMeter(
        resolved.hardware.device,
        lambda *step: log_step(lines, *step),
        finite_loss="finite-loss" not in recipe.skip_checks,
    )
    callbacks = [meter, CheckpointCallback(recipe.checkpoint_seconds, interruption)]
    quiet = quiet or not processes.is_rank_zero()
    folder = setup.folder / checkpoints.FOLDER
    arguments = resolved.task.arguments(setup.arm, setup.seed, resolved.hardware, folder, quiet)
    trainer = resolved.task.trainer(model, resolved.prepared, arguments, callbacks)
    trainer.whole_batch = recipe.training.get("per_device_train_batch_size", 8)
    trainer.remove_callback(PrinterCallback)  # its lines are in log.jsonl
    return trainer, meter


def _fit(
    setup: Setup, trainer: Trainer, meter: StepMeter, checkpoint: Checkpoint | None, interruption: Interruption
) -> dict[str, Any]:
    processor = setup.resolved.prepared.processor
    if processor is not None and hasattr(processor, "pad_token_id"):
        setup.guard("padding", first_batch_is_padded_right, trainer, processor)
    try:
        return Fit(trainer, meter, setup.guard, setup.arm_name, setup.signature, checkpoint, interruption).do()
    except FloatingPointError as error:
        if not processes.is_rank_zero():
            raise
        path = write_bad_batch(setup.folder, trainer, setup.resolved.prepared.ids["train"])
        raise FloatingPointError(f"{error} Its examples are in {path.name}.") from error


def _evaluate(setup: Setup, trainer: Trainer) -> dict[str, Evaluation]:
    resolved = setup.resolved
    further = [name for name in resolved.recipe.evaluate_also if name in resolved.prepared.ids]
    with setup.watch("evaluate"):
        return {
            split: resolved.task.evaluate(trainer, resolved.prepared, split)
            for split in ("validation", "test", *further)
        }


def _gathered_model(setup: Setup, trainer: Trainer) -> nn.Module | None:
    """The trained model; where FSDP2 spread it over ranks, its gathered weights on a fresh base, on rank 0 alone."""
    # Without the wrapper of a lower precision: what is saved is checked as it will be loaded.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if not gather.is_sharded(model):
        return model
    import transformers

    learnt = gather.trainable_state_dict(model)
    if not processes.is_rank_zero():
        return None
    transformers.set_seed(setup.seed)  # so that a new head of the untrained base is drawn the same again
    quantise = setup.arm.quantise if setup.arm else None
    fresh, _ = apply(setup, *setup.resolved.task.load_base(setup.resolved.prepared, quantise))
    unexpected = fresh.load_state_dict(learnt, strict=False).unexpected_keys
    assert not unexpected, unexpected
    return fresh.to(setup.resolved.hardware.device)


def _store(
    setup: Setup,
    trained: nn.Module,
    evaluations: dict[str, Evaluation],
    figures: dict[str, Any] | None,
    parameters: Parameters,
    lines: TextIO,
) -> dict[str, Any]:
    """Write all files of the run but run.json, verify the checkpoint, and return the content of run.json."""
    data = run_facts(setup, parameters) | {"training": figures}
    data["metrics"] = {split: result.metrics for split, result in evaluations.items()}
    data["per_class"] = evaluations["test"].per_class
    write_predictions(setup.folder, evaluations)
    with setup.watch("answers"):
        data["answers"] = setup.resolved.task.answer(trained, setup.resolved.prepared)
    if setup.arm is not None:
        log(lines, stage="save")
        data |= _save(setup, setup.arm, trained)
    data["checks"] = setup.guard.results
    data["seconds"] = {**setup.watch.seconds, "total": setup.watch.total(), "guards": setup.guard.seconds}
    return data


def _save(setup: Setup, arm: Arm, trained: nn.Module) -> dict[str, Any]:
    resolved, folder = setup.resolved, setup.folder
    with setup.watch("save"):
        files = save(trained, arm, resolved.recipe, folder, resolved.prepared.processor)
    if arm.peft is not None:
        setup.guard("adapter-only", checks.folder_is_adapter_only, [path.name for path in folder.iterdir()])
    with setup.watch("verify"):
        timings = verify(resolved.task, resolved.prepared, arm, trained, folder, resolved.hardware, setup.guard)
    return {"checkpoint_bytes": sum(files.values()), "checkpoint_files": files, **timings}
