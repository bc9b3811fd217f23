"""The stages of a run after its recipe is resolved: load, apply the arm, fit, evaluate, store, verify, finish.

Each is a function of the run's `Setup`; run.py calls them in order.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from typing import TYPE_CHECKING, Any, TextIO

from peft_recipes.arms.apply import Parameters, apply_arm
from peft_recipes.cards.write import write_run_card
from peft_recipes.distributed import gather, processes
from peft_recipes.errors import RecipeError
from peft_recipes.guards import checks
from peft_recipes.guards.runner import NOT_RUN
from peft_recipes.measuring.steps import StepMeter
from peft_recipes.models.architectures import parameters_by_component
from peft_recipes.recipe.benchmarks import benchmark_name
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs import checkpoints, facts
from peft_recipes.runs.checkpoints import Checkpoint
from peft_recipes.runs.files import clear, make_folder, write_json
from peft_recipes.runs.folder import RUN_FILE, Run, finished, read_run
from peft_recipes.runs.lock import LOCK_FILES, locked
from peft_recipes.runs.log import log, log_step, no_log, open_log
from peft_recipes.runs.predictions import Evaluation, write_predictions
from peft_recipes.runs.progress import PROGRESS_FILES, clear_progress
from peft_recipes.scoring import benchmark_tasks
from peft_recipes.scoring.benchmarks import BATCH_SIZE, Benchmark, run_benchmark
from peft_recipes.training import kept, tracking
from peft_recipes.training.callbacks import CheckpointCallback
from peft_recipes.training.fit import fit
from peft_recipes.training.progress import continue_times, write_pause
from peft_recipes.training.resolve import fit_memory
from peft_recipes.training.save import save
from peft_recipes.training.setup import Setup
from peft_recipes.training.verify import verify

if TYPE_CHECKING:
    import torch.nn as nn
    from transformers import Trainer


def fit_to_memory(setup: Setup) -> Recipe:
    """Return the recipe, with gradient checkpointing on where a step of the arm only fits in memory with it."""
    fitted = [setup.recipe]  # what stays if the guard is skipped
    setup.guard("memory", lambda: fitted.append(fit_memory(setup, setup.run.arm)))
    return fitted[-1]


def load_base(setup: Setup) -> tuple[nn.Module, list[str]]:
    """Load the base with the task's head; return it with the names of its new weights. Rank 0 downloads first."""

    def load() -> tuple[nn.Module, list[str]]:
        return setup.task.load_base(setup.prepared, setup.quantise)

    if setup.run.shared is not None:
        return setup.run.shared.load_base(setup.interruption, load)
    fingerprint, seed = setup.prepared.fingerprint, setup.run.seed
    return processes.local_rank_zero_first(lambda: kept.base(setup.task, fingerprint, setup.quantise, seed, load))


def use_base(setup: Setup, base: nn.Module) -> None:
    """Compute what the task needs of the untrained base (the reference of dpo)."""
    setup.task.use_base(base, setup.prepared, setup.quantise)


def apply(setup: Setup, base: nn.Module, new_weights: list[str]) -> tuple[nn.Module, Parameters]:
    """Apply the arm to the base; return the model and its parameter counts."""
    if setup.arm is None:
        components = dict(parameters_by_component(base))
        return base, Parameters(0, 0, 0, sum(components.values()), components)
    recipe, name = setup.recipe, setup.run.arm
    model, parameters = apply_arm(base, setup.arm, recipe.task, new_weights, name, skip_checks=recipe.skip_checks)
    setup.guard("trainable", checks.something_is_trainable, model, name)
    if setup.arm.peft is not None:
        setup.guard("saved", checks.trained_weights_are_saved, model, new_weights, name)
    return model, parameters


def take_folder(setup: Setup, held: contextlib.ExitStack) -> Checkpoint | Run | None:
    """Make, lock and clear the run's folder until `held` is closed; return the checkpoint to resume from, if any.

    Returns the run instead where another process finished it while this one waited or prepared.
    """
    folder, checkpoint = setup.run.folder, None
    make_folder(folder)
    held.enter_context(locked(folder, wait=setup.run.wait))
    if setup.run.resume and (done := finished(folder, setup.signature)):
        return done
    if not (setup.run.resume or setup.run.overwrite or read_run(folder) is None):
        raise RecipeError(
            f"Another process has written a run to {folder} meanwhile. Keep it with --resume, or replace it with "
            "--overwrite."
        )
    if setup.run.resume and setup.arm is not None:
        checkpoint, skipped = checkpoints.newest(folder / checkpoints.FOLDER, setup.signature)
        setup.prepared.notes += skipped
        if checkpoint is None and (lost := checkpoints.other_note(folder / checkpoints.FOLDER, setup.signature)):
            setup.prepared.notes.append(lost)
            print(f"Note: {lost}", file=sys.stderr, flush=True)
    places = tracking.earlier_places(setup)
    kept = (checkpoints.FOLDER, "log.jsonl", *PROGRESS_FILES, *tracking.kept_files(folder)) if checkpoint else ()
    clear(folder, keep=(*LOCK_FILES, "log.txt", *kept))
    continue_times(setup)
    setup.recipe.to_yaml(folder / "recipe.yaml")
    tracking.open_session(setup, places, checkpoint, held)
    return checkpoint


def train_and_store(
    setup: Setup, model: nn.Module, parameters: Parameters, checkpoint: Checkpoint | None
) -> dict[str, Any]:
    """Fit, evaluate, save and verify; return the content of run.json, or that of progress.json where the run pauses."""
    step, path = checkpoint.step if checkpoint else 0, setup.run.folder / "log.jsonl"
    with open_log(path, step) if processes.is_rank_zero() else no_log() as lines:
        trainer, meter = _trainer(setup, model, lines)
        figures = None
        if setup.arm is not None:
            together = (
                setup.run.shared.joined(trainer, setup.prepared.notes) if setup.run.shared else contextlib.nullcontext()
            )
            with setup.watch("train"), together:
                figures = fit(setup, trainer, meter, checkpoint)
            if figures is None:
                return write_pause(setup, trainer, meter, lines)
        log(lines, stage="evaluate")
        evaluations = _evaluate(setup, trainer)
        trained = _gathered_model(setup, trainer)
        # The other ranks wait for rank 0, which has the gathered model.
        return processes.from_rank_zero(lambda: _store(setup, trained, evaluations, figures, parameters, lines))


def finish(setup: Setup, data: dict[str, Any]) -> dict[str, Any]:
    """Write the complete run.json and the run's card."""
    write_json(setup.run.folder / RUN_FILE, data)
    if setup.run.data is None:  # a comparison writes the cards of its runs itself, once it has all figures
        with setup.guard.recorded("card"):
            write_run_card(Run(setup.run.folder, data))
        if "card" in setup.guard.results:
            write_json(setup.run.folder / RUN_FILE, data)
    if tracking.finish_session(setup, data):
        write_json(setup.run.folder / RUN_FILE, data)
    return data


def completed_step(setup: Setup) -> int | None:
    """The last step of a training that is complete and stored in a checkpoint, for a run that failed afterwards."""
    if setup.arm is None:
        return None
    checkpoint, _ = checkpoints.newest(setup.run.folder / checkpoints.FOLDER, setup.signature)
    return checkpoint.step if checkpoint and checkpoint.step >= checkpoint.state["max_steps"] else None


def run_facts(setup: Setup, parameters: Parameters | None = None) -> dict[str, Any]:
    """The part of run.json that is known whether or not the run succeeds."""
    found = tracking.facts(setup) | facts.facts(
        setup.recipe,
        setup.run.arm,
        setup.run.seed,
        setup.prepared,
        setup.hardware,
        signature=setup.signature,
        attention=setup.attention,
        parameters=parameters.to_dict() if parameters else None,
    )
    if setup.run.shared is not None:
        size = found["environment"]["shared_base"] = setup.run.shared.shared.size
        found["notes"].append(f"Trained on one base with {size - 1} other runs: time and memory are of all together.")
    found["notes"] += [note for note in setup.earlier_notes if note not in found["notes"]]
    if setup.warm:
        found["environment"]["warm"] = True
    return found


def _trainer(setup: Setup, model: nn.Module, lines: TextIO) -> tuple[Trainer, StepMeter]:
    from transformers import PrinterCallback

    recipe, hardware = setup.recipe, setup.hardware
    finite = "finite-loss" not in recipe.skip_checks
    meter = StepMeter(hardware.device, lambda *step: log_step(lines, *step), finite_loss=finite)
    callbacks = [meter, CheckpointCallback(recipe.checkpoint_seconds, setup.interruption, setup.pause)]
    quiet = setup.run.quiet or not processes.is_rank_zero()
    folder = setup.run.folder / checkpoints.FOLDER
    arguments = setup.task.arguments(setup.arm, setup.run.seed, hardware, folder, quiet)
    callbacks += tracking.callbacks(setup, arguments)
    trainer = setup.task.trainer(model, setup.prepared, arguments, callbacks)
    setup.pause.possible = lambda: trainer.may_checkpoint
    trainer.on_data = meter.add_data_seconds
    trainer.on_answers = lambda done, of: log(lines, stage="answer", step=done, of=of)
    trainer.recipe_batch_size = recipe.training.get("per_device_train_batch_size", 8)
    trainer.remove_callback(PrinterCallback)  # its lines are in log.jsonl
    return trainer, meter


def _evaluate(setup: Setup, trainer: Trainer) -> dict[str, Evaluation]:
    further = [name for name in setup.recipe.evaluate_also if name in setup.prepared.ids]
    task, prepared, evaluations = setup.task, setup.prepared, {}
    with setup.watch("evaluate"):
        for split in ("validation", "test"):
            if setup.run.shared:  # its signals are recorded, not raised
                setup.interruption.raise_received()
            evaluations[split] = task.evaluate(trainer, prepared, split)
        for split in further:
            # Ranks evaluate together: one that continued alone would leave the others waiting.
            alone = processes.count() == 1
            with setup.guard.recorded(f"evaluate {split}") if alone else contextlib.nullcontext():
                evaluations[split] = task.evaluate(trainer, prepared, split)
    for split, evaluation in evaluations.items():
        for metric, words in evaluation.errors.items():
            setup.guard.results[f"{metric} of {split}"] = {"error": words}
    return evaluations


def _gathered_model(setup: Setup, trainer: Trainer) -> nn.Module | None:
    """The trained model; under FSDP2 its gathered weights on a fresh base, on rank 0 alone."""
    # Without the mixed-precision wrapper: what is saved is checked as it will be loaded.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if not gather.is_sharded(model):
        return model
    import transformers

    weights = gather.trainable_state_dict(model)
    if not processes.is_rank_zero():
        return None
    transformers.set_seed(setup.run.seed)  # draws the new head of the untrained base the same again
    fresh, _ = apply(setup, *setup.task.load_base(setup.prepared, setup.quantise))
    unexpected = fresh.load_state_dict(weights, strict=False).unexpected_keys
    assert not unexpected, unexpected
    return fresh.to(setup.hardware.device)


def _store(
    setup: Setup,
    trained: nn.Module,
    evaluations: dict[str, Evaluation],
    figures: dict[str, Any] | None,
    parameters: Parameters,
    lines: TextIO,
) -> dict[str, Any]:
    """Store the run, then let the model answer and verify its checkpoint; return the content of run.json.

    From the moment that weights and figures are stored the run is a finished one: what fails or is interrupted
    afterwards is recorded in its `checks`.
    """
    benchmarks = _benchmarks(setup, trained, lines)
    evaluations |= {name: Evaluation(result.metrics, result.predictions) for name, result in benchmarks.items()}
    data = run_facts(setup, parameters) | {"training": figures}
    data["metrics"] = {split: result.metrics for split, result in evaluations.items()}
    data["per_class"] = evaluations["test"].per_class
    data["benchmarks"] = {name: result.facts for name, result in benchmarks.items()}
    data["answers"] = None
    log(lines, stage="save")
    setup.interruption.deferred = True  # a signal takes effect once the run is stored
    with setup.interruption.deferred_signals():
        write_predictions(setup.run.folder, evaluations)
        if setup.arm is not None:
            data |= _save(setup, trained)
        not_run = dict.fromkeys(_checks_after_saving(setup), f"{NOT_RUN}: the run ended before it")
        write_json(
            setup.run.folder / RUN_FILE, data | _accounts(setup) | {"checks": {**setup.guard.results, **not_run}}
        )
        shutil.rmtree(setup.run.folder / checkpoints.FOLDER, ignore_errors=True)  # nothing is left to resume
        clear_progress(setup.run.folder)
    log(lines, stage="verify")
    with setup.watch("answers"), setup.guard.recorded("answers"):
        data["answers"] = setup.task.answer(trained, setup.prepared)
    if setup.arm is not None:
        with setup.watch("verify"), setup.guard.recorded("reload"):
            data |= verify(setup, trained)
    return data | _accounts(setup)


def _benchmarks(setup: Setup, trained: nn.Module, lines: TextIO) -> dict[str, Benchmark]:
    """Evaluate the recipe's benchmarks on rank 0, which has the gathered model; one that fails is a failed check."""
    recipe, results = setup.recipe, {}
    batch_size = recipe.training.get("per_device_eval_batch_size", BATCH_SIZE)
    with setup.watch("benchmarks"):
        for benchmark in recipe.benchmarks:
            name = benchmark_name(benchmark)
            log(lines, stage=f"benchmark {name}")
            with setup.guard.recorded(f"benchmark {name}"):
                tasks = benchmark_tasks.load([benchmark])[name]
                results[name] = run_benchmark(
                    trained, setup.prepared.processor, tasks, recipe.benchmark_examples, batch_size
                )
    return results


def _save(setup: Setup, trained: nn.Module) -> dict[str, Any]:
    """Save the checkpoint; return its entries of run.json, with those that `verify` fills still empty."""
    folder, variants = setup.run.folder, ("base", "adapter", "merged")
    with setup.watch("save"):
        files = save(trained, setup.arm, setup.recipe, folder, setup.prepared.processor)
    if setup.arm.peft is not None:
        with setup.guard.recorded("adapter-only"):
            setup.guard("adapter-only", checks.folder_is_adapter_only, [path.name for path in folder.iterdir()])
    empty = {"latency_ms": dict.fromkeys(variants), "generation_tokens_per_second": None}
    return {"checkpoint_bytes": sum(files.values()), "checkpoint_files": files, **empty}


def _checks_after_saving(setup: Setup) -> list[str]:
    """The guards that `verify` calls."""
    names = [] if setup.arm is None else ["reload"] if setup.arm.peft is None else ["reload", "merge"]
    return [name for name in names if name not in setup.guard.skipped]


def _accounts(setup: Setup) -> dict[str, Any]:
    """What the checks found, and where the time went."""
    seconds = {**setup.watch.seconds, "total": setup.watch.total(), "guards": setup.guard.seconds}
    return {"checks": setup.guard.results, "seconds": seconds}
