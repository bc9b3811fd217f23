"""Pretrain a base that is not on the Hub: here, on its own data, once; every arm then starts from it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from peft_recipes.distributed import processes
from peft_recipes.embedded.cache import cache_dir
from peft_recipes.errors import RecipeError
from peft_recipes.hardware.device import choose
from peft_recipes.hardware.environment import code_version
from peft_recipes.recipe.options import TASKS

if TYPE_CHECKING:
    from peft_recipes.data.prepared import Prepared
    from peft_recipes.recipe.recipe import Recipe
    from peft_recipes.tasks.base import Task


def trained_base(task: Task, prepared: Prepared) -> Path:
    """Return the folder of the recipe's base; pretrain it on the `pretrain` split on first use.

    It is cached; of two processes at once one trains. Plain Adam at a
    constant learning rate, as in the write-up that mnist-shift reproduces.
    """
    recipe = task.recipe
    if recipe.pretraining is None or "pretrain" not in prepared.splits:
        raise RecipeError(
            f"model '{recipe.model}' has no pretrained weights: the recipe needs `pretraining` and `dataset.pretrain`."
        )
    from filelock import FileLock

    key = [recipe.model, asdict(recipe.pretraining), prepared.fingerprint, code_version()]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    folder = cache_dir() / "bases" / f"{recipe.model}-{digest}"
    if processes.count() > 1 and not (folder / "config.json").is_file():
        _train_in_one_process(recipe)  # the ranks must not train it together
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder) + ".lock"):
            if not (folder / "config.json").is_file():
                with _random_states_kept():
                    _train(task, prepared, folder)
    return folder


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """Restore all random states afterwards: a run that pretrains its base must draw the same adapter as any other."""
    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def _train_in_one_process(recipe: Recipe) -> None:
    """Pretrain the base in a process outside the launcher. Raises RuntimeError with its last line."""
    with tempfile.TemporaryDirectory() as temporary:
        yaml = Path(temporary) / "recipe.yaml"
        recipe.to_yaml(yaml)
        command = [sys.executable, "-m", "peft_recipes.tasks.pretraining", str(yaml)]
        done = subprocess.run(
            command, env=processes.environment_without_launcher(), capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"The base could not be trained: {done.stderr.strip().splitlines()[-1:]}")


def _train(task: Task, prepared: Prepared, folder: Path) -> None:
    import transformers

    from peft_recipes.models import bases

    options, hardware = task.recipe.pretraining, choose(task.recipe.training)
    transformers.set_seed(options.seed)
    config = bases.load_config(task.recipe, **task.base_options(prepared))
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        trainer = transformers.Trainer(
            model=getattr(transformers, TASKS[task.recipe.task].auto_class).from_config(config),
            args=transformers.TrainingArguments(
                output_dir=temporary,
                num_train_epochs=options.num_train_epochs,
                per_device_train_batch_size=options.batch_size,
                learning_rate=options.learning_rate,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=0.0,  # plain Adam: no clipping
                seed=options.seed,
                data_seed=options.seed,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
                dataloader_pin_memory=hardware.device == "cuda",
                remove_unused_columns=False,
                **hardware.training_arguments(),
            ),
            train_dataset=prepared.splits["pretrain"],
            data_collator=task.collator(prepared),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        base = Path(temporary) / "base"
        trainer.model.save_pretrained(base)
        shutil.move(base, folder)


def main(yaml: str) -> None:
    """`python -m peft_recipes.tasks.pretraining RECIPE.yaml`: pretrain a recipe's base if it is not cached."""
    from peft_recipes.distributed.quiet import quiet_libraries
    from peft_recipes.runs.folder import resolved_recipe
    from peft_recipes.tasks.registry import task_of

    quiet_libraries()
    task = task_of(resolved_recipe(Path(yaml)))
    trained_base(task, task.prepare())


if __name__ == "__main__":
    main(sys.argv[1])
