"""Draft a recipe for a model and a dataset, and write it as a module."""

from __future__ import annotations

import dataclasses
import re
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_recipes.catalog.changes import apply_changes
from peft_recipes.catalog.recipes import load_recipe
from peft_recipes.data.prepared import Prepared
from peft_recipes.drafting import stand_ins
from peft_recipes.drafting.arms import BATCHES, Fitted, fitted
from peft_recipes.drafting.base import IMAGES, BaseFacts, read_base, tokenizer_of
from peft_recipes.drafting.choices import Choice, choose
from peft_recipes.drafting.columns import columns_of
from peft_recipes.drafting.finding import Asked, Data
from peft_recipes.drafting.module import module_text
from peft_recipes.drafting.sizes import longest, max_length_of, read_splits, split_fields
from peft_recipes.errors import RecipeError, unknown
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.dataset import Dataset
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import write_text
from peft_recipes.tasks.base import Task
from peft_recipes.tasks.registry import task_of

_LOOKED_AT = 2_000  # training rows whose length is measured
_SMALL = 5_000  # training rows: up to so many are seen three times, more than these once


@dataclass(frozen=True)
class Request:
    """What `peft-recipes new` is asked for; what is None or empty is chosen."""

    model: str
    dataset: str
    output: Path | None = None
    dataset_name: str | None = None
    train_split: str | None = None
    asked: Asked = dataclasses.field(default_factory=Asked)
    max_length: int | None = None
    batch: int | None = None
    ranks: list[int] = dataclasses.field(default_factory=list)
    changes: list[str] = dataclasses.field(default_factory=list)
    trust_remote_code: bool = False
    embedded: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Draft:
    """A recipe as it was written. why: the reason of each choice; notes: what the data's preparation says."""

    path: Path
    recipe: Recipe
    text: str
    why: dict[str, str]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """What `peft-recipes new --json` prints."""
        return {
            "path": str(self.path),
            "recipe": self.recipe.to_dict(),
            "why": self.why,
            "notes": self.notes,
            "next": [
                f"peft-recipes {command} {shlex.quote(str(self.path))}" for command in ("data", "plan", "compare")
            ],
        }


def draft(request: Request) -> Draft:
    """Look at the model's configuration and the data, choose what a recipe needs, and write it.

    Raises RecipeError for what can't be decided, with the flag to give, and where the file exists already.
    """
    path = request.output or Path(f"{_slug(request.model, '_')}_{_slug(request.dataset, '_')}.py")
    if path.suffix != ".py":
        raise RecipeError(f"--output {path}: a recipe is a Python module. Name a file that ends with .py.")
    if path.exists() and not request.overwrite:
        raise RecipeError(f"{path} exists already. Name another file with --output, or add --overwrite.")
    if not path.parent.is_dir():
        raise RecipeError(f"--output {path}: there is no folder {path.parent}.")
    base = read_base(request.model, request.trust_remote_code)
    source = Dataset(request.dataset, name=request.dataset_name)
    raw = read_splits(source)
    if request.train_split and request.train_split not in raw:
        raise RecipeError(unknown("split", request.train_split, raw, f"dataset '{request.dataset}'"))
    rows = raw.get(request.train_split or "train", next(iter(raw.values())))
    data = Data(request.dataset, columns_of(rows), rows)
    choice = choose(base, data, request.asked)
    label = choice.dataset.get("label")
    if request.train_split:
        raw = {"train": raw[request.train_split]} | {k: v for k, v in raw.items() if k != request.train_split}
    splits, why = split_fields(raw, label, request.dataset)
    if request.train_split:
        splits["train_split"] = request.train_split
    source = dataclasses.replace(source, **choice.dataset, **splits)
    recipe = Recipe(
        name=_slug(path.stem, "-"),
        title=f"{request.model.rstrip('/').split('/')[-1]} on {request.dataset.rstrip('/').split('/')[-1]}",
        task=choice.task,
        model=request.model,
        dataset=source,
        arms={"full": Arm()},
        trust_remote_code=request.trust_remote_code,
        **choice.recipe,
    )
    early = [change for change in request.changes if not change.startswith(("arms.", "training.", "max_length"))]
    recipe = apply_changes(recipe, early) if early else recipe  # a chat template, which the data may need
    recipe, prepared, task, reason = _with_length(recipe, base, request, len(rows))
    recipe = dataclasses.replace(recipe, training=_training(recipe, len(rows)))
    made = fitted(recipe, task.base_options(prepared), request.batch, request.ranks, _training_rows(recipe, len(rows)))
    recipe = made.recipe
    if request.embedded:
        recipe = dataclasses.replace(recipe, embedded=stand_ins.section(recipe))
    if request.changes:
        recipe = apply_changes(recipe, request.changes)
    reasons = _reasons(choice, why, made, reason, base, recipe)
    reasons |= {change.partition("=")[0].strip(): "as asked" for change in request.changes}
    text = module_text(recipe, reasons, made, _sentence(recipe, data), shlex.quote(path.as_posix()))
    unused = [name for name in data.columns if name not in choice.used]
    notes = list(prepared.notes)
    if unused and not any("not used" in note for note in notes):
        notes.append(f"Columns not used: {', '.join(unused)}.")
    _write(path, text, recipe)
    return Draft(path, recipe, text, reasons, notes)


def _with_length(recipe: Recipe, base: BaseFacts, request: Request, rows: int) -> tuple[Recipe, Prepared, Task, str]:
    """The recipe with its max_length, its data as prepared from some of the rows, and why that length."""
    looked = dataclasses.replace(recipe.dataset, train=_LOOKED_AT) if rows > 2 * _LOOKED_AT else recipe.dataset
    limit = 2 if base.kind == IMAGES else longest(base.positions, tokenizer_of(recipe))
    if request.max_length and request.max_length > limit and base.kind != IMAGES:
        raise RecipeError(f"--max-length {request.max_length:,}: model '{base.model}' has {limit:,} positions.")
    probe = dataclasses.replace(recipe, dataset=looked, max_length=request.max_length or limit, training=_PROBE.get(
        recipe.task, {}))  # fmt: skip
    task = task_of(probe)
    prepared = task.prepare()
    if base.kind == IMAGES:
        return recipe, prepared, task, ""
    length, why = (request.max_length, "as asked") if request.max_length else max_length_of(prepared, limit)
    return dataclasses.replace(recipe, max_length=length), prepared, task, why


_PROBE = {"kto": {"per_device_train_batch_size": 2}, "grpo": {"per_device_train_batch_size": 4, "num_generations": 4}}


def _training_rows(recipe: Recipe, rows: int) -> int:
    """About how many rows are left to train on."""
    source = recipe.dataset
    for split in ("validation", "test"):
        size = getattr(source, split)
        if getattr(source, f"{split}_split") is None and size is not None:
            rows -= int(rows * size) if size < 1 else int(size)
    return rows


def _training(recipe: Recipe, rows: int) -> dict[str, Any]:
    """The training options, without the batch."""
    if recipe.task in ("dpo", "kto", "reward", "grpo"):
        answers = {"num_generations": 4} if recipe.task == "grpo" else {}
        return {"num_train_epochs": 1, "warmup_steps": 0.1, "eval_strategy": "steps", "eval_steps": 0.25, **answers}
    if recipe.task in BATCHES:
        order = {} if recipe.task == "image-classification" else {"train_sampling_strategy": "group_by_length"}
        return {"num_train_epochs": 3, **order}
    if rows > _SMALL:
        return {"num_train_epochs": 1, "eval_strategy": "steps", "eval_steps": 0.25}
    return {"num_train_epochs": 3}


def _reasons(
    choice: Choice, splits: dict[str, str], made: Fitted, length: str, base: BaseFacts, recipe: Recipe
) -> dict[str, str]:
    """The reasons by the line of the module that they belong to."""
    training, why = recipe.training, choice.why
    epochs = f"{'few' if training.get('num_train_epochs') != 1 else 'enough'} rows" if recipe.task in (
        "sft", "language-modeling", "seq2seq") else ""  # fmt: skip
    reasons = {
        "task": why.get("task"),
        "model": f"{'an' if base.kind[0] in 'aei' else 'a'} {base.kind}",
        "metric": why.get("metric"),
        "max_length": length,
        "targets": "every linear layer in the blocks" if "all-linear" in made.targets or made.targets[0] == "[" else "",
        "training.num_train_epochs": epochs and f"{epochs} ({_SMALL:,} or fewer are seen three times)",
        "training.eval_steps": "four times per run" if "eval_steps" in training else "",
        "training.train_sampling_strategy": "less padding",
        "training.per_device_train_batch_size": made.why.get("batch"),
        "training.gradient_accumulation_steps": made.why.get("accumulation"),
        "arms": made.why.get("rates") and f"learning rates: {made.why['rates']}",
        "full": made.why.get("full"),
        "arms.lora": made.why.get("lora"),
        "arms.qlora": made.why.get("qlora"),
        "arms.head": "the new head alone, on features of the frozen base",
        **{f"arms.{name}": "whether another rank is better" for name in recipe.arms if name.startswith("lora-r")},
        **{f"dataset.{key}": why.get(key) for key in ("text", "label", "problem_type", "format")},
        "columns": why.get("columns"),
        "dataset.prompt": why.get("columns") if recipe.dataset.prompt != "prompt" else None,
        **{f"dataset.{key}": value for key, value in splits.items()},
    }
    return {key: value for key, value in reasons.items() if value}


def _sentence(recipe: Recipe, data: Data) -> str:
    what = {
        "text-classification": "classify the texts", "token-classification": "tag the words",
        "image-classification": "classify the images", "sft": "answer the prompts", "seq2seq": "turn inputs to targets",
        "language-modeling": "continue the texts", "dpo": "prefer the chosen answers", "reward": "score the answers",
        "kto": "prefer the desirable answers", "grpo": "answer the prompts for a reward",
    }[recipe.task]  # fmt: skip
    return f"Fine-tune {recipe.model} to {what} of {data.path}.".replace("\\", "/")


def _write(path: Path, text: str, recipe: Recipe) -> None:
    """Write the module, once it is known to give the same recipe."""
    with tempfile.TemporaryDirectory() as folder:
        tried = Path(folder) / path.name
        tried.write_text(text, encoding="utf-8")
        read, drafted = load_recipe(tried).to_dict(), recipe.to_dict()
    if differing := [key for key, value in drafted.items() if read[key] != value]:
        raise RecipeError(
            f"--set: what it changes in {', '.join(differing)} can't be written in a module. Leave it out here, and "
            "set it in the file."
        )
    write_text(path, text)


def _slug(text: str, joint: str) -> str:
    """A name for files and recipes: the last part of a path or id, in small letters, digits and `joint`."""
    last = text.rstrip("/").split("/")[-1].removeprefix("embedded:")
    last = re.sub(r"\.(csv|tsv|jsonl?|ndjson|parquet|py|gz|zst)\b", "", last, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", joint, last.lower()).strip(joint) or "mine"
