"""What a training step costs beside its matrix products: waiting for the device, batches, and LoRA's small products."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from gpu import workspace
from gpu.measures import about, given_for, without_environment

_SYNCHRONISING = "called a synchronizing CUDA operation"  # torch's words
_WAITING = ("aten::item", "aten::is_nonzero")  # what would be one on a GPU, where there is none


def waiting(result: Any, shape: str, tasks: tuple[str, ...]) -> None:
    """How often the host waits for the device in an optimizer step of each task, and in which lines."""
    result.data |= {"shape": shape}
    for task in tasks:
        result.cell(task, lambda: _waits(result, shape, task), task=task)  # noqa: B023


def loading(result: Any, shape: str, rows: str, batch: int) -> None:
    """SFT steps with batches that are collated in the training process, and ahead of it in workers."""
    import sft_throughput

    result.data |= {"shape": shape}
    workers = [] if result.device == "cuda" else ["training.dataloader_num_workers=1"]
    for how, changes in (("in-process", ["training.dataloader_num_workers=0"]), ("in-workers", workers)):
        given = given_for(result, rows, batch, shape, "lora", "peft-recipes")
        given.changes = changes
        result.cell(f"{rows}-batch{batch}-{how}", lambda: without_environment(sft_throughput.measure(given)),  # noqa: B023
                    **about(rows, batch, how=how))  # fmt: skip


def lora(result: Any, shape: str, cells: list[tuple[str, int]], ways: tuple[str, ...]) -> None:
    """SFT steps with LoRA's layers by PEFT, by one autograd operation (lora_linear.py) and by torch.compile."""
    import sft_throughput

    result.data |= {"shape": shape}
    for rows, batch in cells:
        for way in ways:
            given = given_for(result, rows, batch, shape, "lora", "peft-recipes")
            given.one_operation = way == "one operation"
            given.changes = ["training.torch_compile=true"] if way == "torch.compile" else []
            result.cell(f"{rows}-batch{batch}-{way}", lambda: without_environment(sft_throughput.measure(given)),  # noqa: B023
                        **about(rows, batch, way=way))  # fmt: skip


def sharing(result: Any, shape: str, jobs: tuple[int, ...]) -> None:
    """A comparison's runs so many at a time on the same device: seconds of all of them, and each arm's test loss."""
    import peft_recipes

    result.data |= {"shape": shape}
    file = workspace.recipe_file(result.work, shape, "alpaca", 160, result.device, result.tiny)
    changes = ["training.max_steps=20", "training.per_device_train_batch_size=8", "training.eval_strategy=no"]

    def compared(count: int) -> dict[str, Any]:
        recipe = peft_recipes.load_recipe(file, changes=changes)
        recipe.name, start = f"sharing-{count}", time.perf_counter()
        options = {"output": result.work / "sharing", "jobs": count, "overwrite": True}
        made = peft_recipes.compare(recipe, ["full", "lora"], (0, 1), **options)
        seconds, arms = time.perf_counter() - start, made.data["arms"]
        losses = {name: arm["metrics"]["test"]["loss"] for name, arm in arms.items() if arm["status"] == "ok"}
        return {"seconds": seconds, "arms": {name: arm["status"] for name, arm in arms.items()}, "test_losses": losses}

    for count in jobs:
        result.cell(f"jobs-{count}", lambda: compared(count), jobs=count)  # noqa: B023


def _waits(result: Any, shape: str, task: str) -> dict[str, Any]:
    """Of three optimizer steps the last two, whose kernels and caches are there."""
    import torch
    from transformers import TrainerCallback

    counted, lines = [], Counter()

    class Watch(TrainerCallback):
        """Count between a step's beginning and its end."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                return
            if result.device == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            else:
                self.profile = torch.autograd.profiler.profile()
                self.profile.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                return
            if result.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
                found = [one for one in caught if _SYNCHRONISING in str(one.message)]
                lines.update(result.without_paths(f"{one.filename}:{one.lineno}") for one in found)
                counted.append(len(found))
                caught.clear()
            else:
                self.profile.__exit__(None, None, None)
                counted.append(sum(map(_would_wait, self.profile.function_events)))

    trainer = _trainer(_recipe(result, shape, task), result.work / "waiting", Watch())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return {"waits_a_step": sum(counted) / len(counted), "steps": len(counted), "lines": dict(lines)}


def _would_wait(event: Any) -> bool:
    """Whether an operation on the CPU reads a tensor's value or counts its elements, outside of other operations."""
    outer = event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::")
    return (event.name in _WAITING and outer) or event.name == "aten::nonzero"


def _recipe(result: Any, shape: str, task: str) -> Any:
    from peft_recipes import Dataset, load_recipe

    name, _, padded = task.partition(" ")
    pairs = name in ("dpo", "kto", "reward")
    file = workspace.recipe_file(
        result.work, shape, "alpaca", 24, result.device, result.tiny, "dpo" if pairs else "sft"
    )
    changes = ["training.max_steps=3", "training.per_device_train_batch_size=8", "training.eval_strategy=no"]
    recipe = load_recipe(file, changes=[*changes, *(["batches=padded"] if padded else [])])
    recipe = dataclasses.replace(recipe, arms={"lora": recipe.arms["lora"]})
    if name == "text-classification":
        rows = [json.loads(line) for line in Path(recipe.dataset.path).read_text(encoding="utf-8").splitlines()]
        data = result.work / f"{shape}-labelled.jsonl"
        data.write_text("".join(json.dumps({"text": row["prompt"], "label": f"l{i % 2}"}) + "\n"
                                for i, row in enumerate(rows)))  # fmt: skip
        return dataclasses.replace(
            recipe, task=name, metric=None, dataset=Dataset(str(data), train=24, validation=8, test=8)
        )
    return recipe if name in ("sft", "dpo") else dataclasses.replace(recipe, task=name)


def _trainer(recipe: Any, folder: Path, callback: Any) -> Any:
    """The trainer of a recipe's arm `lora`, as a run makes it."""
    from peft_recipes.arms.apply import apply_arm
    from peft_recipes.training.resolve import resolve

    resolved = resolve(recipe, ["lora"])
    task, recipe = resolved.task, resolved.recipe
    base, new_weights = task.load_base(resolved.prepared)
    task.use_base(base, resolved.prepared)
    model, _ = apply_arm(base, recipe.arms["lora"], recipe.task, new_weights)
    arguments = task.arguments(recipe.arms["lora"], 0, resolved.hardware, folder, True)
    return task.trainer(model, resolved.prepared, arguments, [callback])
