"""Time of an epoch of classification: a plain Trainer script with its defaults, and this project's arms.

    python benchmarks/classification_throughput.py                     # both recipes, embedded stand-ins
    python benchmarks/classification_throughput.py --recipe distilbert-imdb --epochs 5 --arms head

The plain script uses Trainer's defaults: random order, each text padded to the longest of its batch. Each arm runs in a
fresh process, with the same model, examples, batch size and number of steps; seconds are those of the optimiser steps
(for a linear probe also of caching its features). Prints the result as JSON; --keep writes a file in
benchmarks/classification_throughput/.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from harness import count_waiting, disable_speedups, disturbed, in_fresh_process, result_parser, write_result

RECIPES = ["distilbert-imdb", "gpt2-sms-spam"]
WAYS = ["plain-trainer", "peft-recipes"]


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("--recipe", choices=RECIPES, action="append")
    parser.add_argument("--arms", default="full,head,lora")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--hub", action="store_true", help="use the recipe's own data and model instead of stand-ins")
    parser.add_argument("--set", dest="changes", action="append", default=[])
    parser.add_argument("--one", nargs=3, metavar=("RECIPE", "ARM", "WAY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(_one(given)))
        return
    measured: dict[str, Any] = {}
    for recipe in given.recipe or RECIPES:
        for arm in given.arms.split(","):
            rows = {way: _in_fresh_process(recipe, arm, way, given) for way in WAYS}
            plain, ours = (rows[way]["seconds"] for way in WAYS)
            busy = any(disturbed(row) for row in rows.values())
            measured[f"{recipe}/{arm}"] = {"ratio": None if busy else plain / ours, **rows}
            ratio = "disturbed" if busy else f"{plain / ours:5.2f} times"
            print(f"{recipe:16} {arm:5} {plain:8.1f} s plain {ours:8.1f} s ours   {ratio}", flush=True)
    environment = next(iter(measured.values()))["peft-recipes"]["environment"]
    for row in measured.values():
        for way in WAYS:
            row[way].pop("environment")
    document = {"epochs": given.epochs, "embedded": not given.hub, "found": measured, "environment": environment}
    name = "-".join([*(given.recipe or ["all"]), *given.arms.split(","), f"{given.epochs}-epochs"])
    ratios = {name: row["ratio"] for name, row in measured.items()}
    write_result(given, Path(__file__).with_suffix("") / f"{name}.json", document, {"ratios": ratios})


def _in_fresh_process(recipe: str, arm: str, way: str, given: argparse.Namespace) -> dict[str, Any]:
    words = ["--one", recipe, arm, way, "--epochs", str(given.epochs), *(["--hub"] if given.hub else [])]
    words += [word for change in given.changes for word in ("--set", change)]
    return in_fresh_process(__file__, words)


def _one(given: argparse.Namespace) -> dict[str, Any]:
    from peft_recipes.distributed.quiet import quiet_libraries

    quiet_libraries()
    import transformers

    from peft_recipes import load_recipe
    from peft_recipes.arms.apply import apply_arm
    from peft_recipes.hardware.device import choose
    from peft_recipes.hardware.environment import environment
    from peft_recipes.kernels import allocator
    from peft_recipes.measuring.steps import StepMeter
    from peft_recipes.tasks.registry import task_of

    name, arm, way = given.one
    if way == "plain-trainer":
        disable_speedups()
    else:
        allocator.set_for_training()
    changes = [f"training.num_train_epochs={given.epochs}", "training.eval_strategy=no", *given.changes]
    recipe = load_recipe(name, embedded=not given.hub, changes=changes)
    task = task_of(recipe)
    prepared = task.prepare()
    transformers.set_seed(0)
    base, new = task.load_base(prepared)
    model, _ = apply_arm(base, recipe.arms[arm], recipe.task, new)
    hardware = choose(recipe.training)
    meter = StepMeter(hardware.device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = task.arguments(recipe.arms[arm], 0, hardware, Path(folder), True)
        if way == "plain-trainer":
            arguments.train_sampling_strategy = "random"
            trainer = transformers.Trainer(
                model=model, args=arguments, train_dataset=prepared.splits["train"], callbacks=[meter],
                data_collator=transformers.DataCollatorWithPadding(prepared.processor),
            )  # fmt: skip
            count_waiting(trainer, meter)
            trainer.train()
            first = 0.0
        else:
            trainer = task.trainer(model, prepared, arguments, [meter])
            count_waiting(trainer, meter)
            trainer.train()
            first = (getattr(trainer, "pass_figures", None) or {"seconds": 0.0})["seconds"]
    return {
        "seconds": sum(meter.steps) + first,
        "first_pass_seconds": first,
        "disturbance": meter.disturbance.figures(hardware.device),
        "steps": len(meter.steps),
        "losses": [loss for _, loss in meter.losses],
        "peak_memory_bytes": meter.memory.peak,
        "environment": environment(hardware),
    }


if __name__ == "__main__":
    main()
