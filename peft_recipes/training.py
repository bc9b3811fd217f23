"""One run: one arm trained once with one seed, in this process, measured, saved, checked, and written down."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from peft_recipes import allocator, cards, checkpoints, checks, run_facts, starting
from peft_recipes.arm_names import choose_arms
from peft_recipes.arms import Parameters, apply_arm
from peft_recipes.checkpoints import Checkpoint
from peft_recipes.distributed import processes, whole
from peft_recipes.distributed.batches import check_spreadable, shared_out
from peft_recipes.errors import RecipeError
from peft_recipes.fitting import Fit, first_batch_is_padded_right
from peft_recipes.guards import Guards
from peft_recipes.hardware import Hardware, choose
from peft_recipes.interruption import Interruption, interruptible
from peft_recipes.measuring import StepMeter, Stopwatch
from peft_recipes.recipe import Arm, Recipe
from peft_recipes.run_log import log, log_step, no_log, opened_log, write_bad_batch, write_predictions
from peft_recipes.runs import (
    BASE,
    LOCK_FILES,
    RUN_FILE,
    Run,
    clear,
    locked,
    make_folder,
    run_folder,
    signature,
    with_precision,
    write_json,
)
from peft_recipes.tasks.checkpointing import CheckpointCallback

if TYPE_CHECKING:
    import torch.nn as nn
    from transformers import Trainer

    from peft_recipes.tasks.base import Evaluation, Task


def train(
    recipe: Recipe,
    arm: str,
    *,
    seed: int = 0,
    output: str | Path = "adapters",
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
    data: str | Path | None = None,
    wait: bool = False,
) -> Run:
    """Trains one arm of a recipe with one seed, here, and returns its run.

    arm: a name among the recipe's arms or the table of methods, or "base" for the untrained base (evaluated only).
    resume: a finished run of the same recipe, data and code is returned as it is, an unfinished one goes on from its
    last whole checkpoint. overwrite: whatever is there is trained anew. data: where a comparison keeps the data it
    prepared for all its runs. wait: until no other process writes the folder. Raises RecipeError for a mistake in what
    was given (then nothing is written), KeyboardInterrupt or Terminated after SIGINT or SIGTERM (a checkpoint is
    written before), and whatever stopped the run otherwise (run.json says so).

    Under `accelerate launch` every process calls it and gets the same run; the main one prints, writes and asks the
    Hub. Where one fails, that one raises what stopped it and the others `processes.Elsewhere`.
    """
    if arm not in (BASE, *recipe.arms):
        recipe = choose_arms(recipe, [arm]).recipe
        if arm not in recipe.arms:
            raise RecipeError(f"'{arm}' names many arms; a run is one. `peft-recipes compare --arms {arm}` trains all.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise RecipeError(f"seed: expected a whole number from 0 to {2**32 - 1}, got {seed!r}.")
    output = Path(output)
    folder = run_folder(output, recipe, arm, seed)
    sharded = arm in recipe.arms and recipe.arms[arm].method != "head"  # a head's frozen backbone runs once, whole
    with processes.unsharded(not sharded), interruptible() as interruption:
        try:
            processes.join(choose(recipe.training, recipe.threads).device)
            processes.from_main(lambda: starting.check_free(output, folder, resume, overwrite))
            shared_out(recipe.training, processes.count())
            check_spreadable(recipe, arm, processes.kind())
            recipe = processes.from_main(lambda: with_precision(recipe, folder if resume else None))
            place = Path(data) if data else None
            return _OneRun(recipe, arm, seed, folder, resume, quiet, place, interruption, wait).do()
        except Exception as error:
            raised = processes.failed(error)
            if raised is error:
                raise
            raise raised from error


class _OneRun:
    """The stages of a run, in their order; each is timed under its own name."""

    def __init__(
        self,
        recipe: Recipe,
        arm: str,
        seed: int,
        folder: Path,
        resume: bool,
        quiet: bool,
        data: Path | None,
        interruption: Interruption,
        wait: bool,
    ):
        self.recipe, self.arm_name, self.seed, self.folder = recipe, arm, seed, folder
        self.resume, self.quiet, self.data = resume, quiet, data
        self.interruption, self.wait = interruption, wait
        self.checkpoint: Checkpoint | None = None
        self.arm: Arm | None = recipe.arms.get(arm)
        self.watch = Stopwatch()
        self.hardware: Hardware = choose(recipe.training, recipe.threads)
        self.guard = Guards(recipe.skip_checks)
        self.attention: str | None = None

    def do(self) -> Run:
        import transformers

        from peft_recipes.tasks import task_of

        allocator.set_for_training()
        with self.watch("imports"):
            self.task: Task = task_of(self.recipe)
        with self.watch("data"):
            self.prepared, self.recipe = processes.fetched(
                lambda: starting.data_and_targets(self.task, self.recipe, self.arm_name, self.data)
            )
            self.arm = self.recipe.arms.get(self.arm_name)
        self.signature = signature(self.recipe, self.arm_name, self.seed, self.prepared.fingerprint)
        if self.resume and (done := processes.from_main(lambda: starting.finished(self.folder, self.signature))):
            return done
        self.task.check_arguments(self.arm, self.hardware)
        with self.watch("plan"):
            self.recipe = self.task.recipe = processes.from_main(self._fitted)
        # The head, the adapter and dropout all draw from this seed; the data's order has its own (data_seed).
        transformers.set_seed(self.seed)
        with self.watch("load"):
            quantise = self.arm.quantise if self.arm else None
            base, new_weights = processes.fetched(lambda: self.task.load_base(self.prepared, quantise))
        self.attention = getattr(base.config, "_attn_implementation", None)
        # Of a base that only the main process reads, the others can't tell what it brought.
        model, parameters = self._arm_applied(base, processes.from_main(lambda: new_weights))
        with contextlib.ExitStack() as held:
            self.checkpoint = processes.from_main(lambda: self._take_folder(held))
            try:
                data = self._measured(model, parameters)
            except Exception as error:  # not Ctrl-C: an interrupted run is unfinished, not failed
                self.interruption.shield()  # what ends the other processes must not end this
                raised = processes.failed(error)  # told before it is written, so that the first one's words are
                if processes.is_main():
                    with contextlib.suppress(OSError):  # the disk may be full, which is what stopped it
                        write_json(self.folder / RUN_FILE, self._facts() | run_facts.failure(error))
                if raised is error and isinstance(error, RecipeError):  # a run that failed midway, not a mistake
                    raise RuntimeError(str(error)) from error
                raise raised from error.__cause__
            data = processes.from_main(lambda: self._finished(data))
        return Run(self.folder, data)

    def _fitted(self) -> Recipe:
        """The recipe as it fits this machine's memory; of several processes the main one asks for all."""
        self.task.recipe, found = self.recipe, []
        given = (self.task, self.prepared, self.arm, self.arm_name, self.hardware)
        self.guard("memory", lambda: found.append(starting.fitted_to_memory(*given)))
        return found[0] if found else self.recipe

    def _take_folder(self, held: contextlib.ExitStack) -> Checkpoint | None:
        """Makes, locks and clears the run's folder, until `held` is closed; the checkpoint to go on from, if any."""
        make_folder(self.folder)
        held.enter_context(locked(self.folder, wait=self.wait))
        found = None
        if self.resume and self.arm is not None:
            found, skipped = checkpoints.newest(self.folder / checkpoints.FOLDER, self.signature)
            self.prepared.notes += skipped
        kept = (checkpoints.FOLDER, "log.jsonl") if found else ()
        clear(self.folder, keep=(*LOCK_FILES, "log.txt", *kept))
        self.recipe.to_yaml(self.folder / "recipe.yaml")
        return found

    def _finished(self, data: dict[str, Any]) -> dict[str, Any]:
        write_json(self.folder / RUN_FILE, data)
        shutil.rmtree(self.folder / checkpoints.FOLDER, ignore_errors=True)  # only now is nothing to be resumed
        if self.data is None:  # a comparison writes the cards of its runs, once it has all their figures
            cards.write_run_card(Run(self.folder, data))
        return data

    def _arm_applied(self, base: nn.Module, new_weights: list[str]) -> tuple[nn.Module, Parameters]:
        if self.arm is None:
            from peft_recipes.architectures import parameters_by_component

            components = dict(parameters_by_component(base))
            return base, Parameters(0, 0, 0, sum(components.values()), components)
        model, parameters = apply_arm(
            base, self.arm, self.recipe.task, new_weights, self.arm_name, skip_checks=self.recipe.skip_checks
        )
        self.guard("trainable", checks.something_is_trainable, model, self.arm_name)
        if self.arm.peft is not None:
            self.guard("saved", checks.learns_are_saved, model, new_weights, self.arm_name)
        return model, parameters

    def _measured(self, model: nn.Module, parameters: Parameters) -> dict[str, Any]:
        at = self.checkpoint.step if self.checkpoint else 0
        with opened_log(self.folder / "log.jsonl", at) if processes.is_main() else no_log() as lines:
            trainer, meter = self._trainer(model, lines)
            figures = None
            if self.arm is not None:
                with self.watch("train"):
                    figures = self._fit(trainer, meter)
            log(lines, stage="evaluate")
            evaluations = self._evaluate(trainer)
            trained = self._trained(trainer)
            # The others wait for the main process, which has the trained model whole.
            return processes.from_main(lambda: self._stored(trained, evaluations, figures, parameters, lines))

    def _trainer(self, model: nn.Module, lines: TextIO) -> tuple[Trainer, StepMeter]:
        heeds = "finite-loss" not in self.recipe.skip_checks
        meter = StepMeter(self.hardware.device, lambda *step: log_step(lines, *step), finite_loss=heeds)
        keeper = CheckpointCallback(self.recipe.checkpoint_seconds, self.interruption)
        quiet = self.quiet or not processes.is_main()
        arguments = self.task.arguments(self.arm, self.seed, self.hardware, self.folder / checkpoints.FOLDER, quiet)
        trainer = self.task.trainer(model, self.prepared, arguments, [meter, keeper])
        trainer.whole_batch = self.recipe.training.get("per_device_train_batch_size", 8)
        trainer.remove_callback(_printer())  # its lines are in log.jsonl
        return trainer, meter

    def _fit(self, trainer: Trainer, meter: StepMeter) -> dict[str, Any]:
        processor = self.prepared.processor
        if processor is not None and hasattr(processor, "pad_token_id"):
            self.guard("padding", first_batch_is_padded_right, trainer, processor)
        fit = Fit(trainer, meter, self.guard, self.arm_name, self.signature, self.checkpoint, self.interruption)
        try:
            return fit.do()
        except FloatingPointError as error:
            if not processes.is_main():
                raise
            path = write_bad_batch(self.folder, trainer, self.prepared.ids["train"])
            raise FloatingPointError(f"{error} Its examples are in {path.name}.") from error

    def _evaluate(self, trainer: Trainer) -> dict[str, Evaluation]:
        splits = ["validation", "test", *(name for name in self.recipe.evaluate_also if name in self.prepared.ids)]
        with self.watch("evaluate"):
            return {split: self.task.evaluate(trainer, self.prepared, split) for split in splits}

    def _trained(self, trainer: Trainer) -> nn.Module | None:
        """The trained model, whole; where it was spread over processes, on a fresh base, in the main one alone."""
        # Without the wrapper that computes in lower precision: what is saved is checked as it will be loaded.
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        if not whole.is_spread(model):
            return model
        import transformers

        learnt = whole.learnt(model)
        if not processes.is_main():
            return None
        transformers.set_seed(self.seed)  # so that a new head of the untrained base is what it was
        quantise = self.arm.quantise if self.arm else None
        fresh, _ = self._arm_applied(*self.task.load_base(self.prepared, quantise))
        strange = fresh.load_state_dict(learnt, strict=False).unexpected_keys
        assert not strange, strange
        return fresh.to(self.hardware.device)

    def _stored(
        self,
        trained: nn.Module,
        evaluations: dict[str, Evaluation],
        figures: dict[str, Any] | None,
        parameters: Parameters,
        lines: TextIO,
    ) -> dict[str, Any]:
        """Writes what the run leaves but run.json, checks it, and returns what run.json says."""
        data = self._facts(parameters) | {"training": figures}
        data["metrics"] = {split: result.metrics for split, result in evaluations.items()}
        data["per_class"] = evaluations["test"].per_class
        write_predictions(self.folder, evaluations)
        with self.watch("answers"):
            data["answers"] = self.task.answer(trained, self.prepared)
        if self.arm is not None:
            log(lines, stage="save")
            data |= self._saved(trained)
        seconds = {**self.watch.seconds, "total": self.watch.total(), "guards": self.guard.seconds}
        data["checks"], data["seconds"] = self.guard.results, seconds
        return data

    def _saved(self, trained: nn.Module) -> dict[str, Any]:
        from peft_recipes import saving

        assert self.arm is not None
        with self.watch("save"):
            files = saving.save(trained, self.arm, self.recipe, self.folder, self.prepared.processor)
        if self.arm.peft is not None:
            names = [path.name for path in self.folder.iterdir()]
            self.guard("adapter-only", checks.folder_is_adapter_only, names)
        with self.watch("verify"):
            timings = saving.verify(self.task, self.prepared, self.arm, trained, self.folder, self.hardware, self.guard)
        return {"checkpoint_bytes": sum(files.values()), "checkpoint_files": files, **timings}

    def _facts(self, parameters: Parameters | None = None) -> dict[str, Any]:
        """What is known of a run whatever becomes of it."""
        return run_facts.facts(
            self.recipe,
            self.arm_name,
            self.seed,
            self.prepared,
            self.hardware,
            signature=self.signature,
            attention=self.attention,
            parameters=parameters,
        )


def _printer() -> type:
    from transformers import PrinterCallback

    return PrinterCallback
