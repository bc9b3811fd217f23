"""The code in a card that loads what a run saved, with plain PEFT and transformers. The code is in load.py.j2."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, Template

from peft_recipes.arms.apply import OWN_FILES
from peft_recipes.cards.metadata import kind_of
from peft_recipes.cards.redaction import is_local_path, short
from peft_recipes.data import formats
from peft_recipes.models import bases
from peft_recipes.recipe.dataset import CLASSES, EMBEDDED, REGRESSION
from peft_recipes.recipe.options import TASKS
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.reporting.facts import plain
from peft_recipes.runs.folder import BASE

_MOST_LABELS = 30  # more would dominate the code
# How a card refers to its own folder, in its code and in its commands; `for_repository` replaces both.
_HERE = '"."  # this folder, or its repository on the Hub'
FOLDER = "THIS_FOLDER"
_DTYPES = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}  # by the precision of the run


def loading_code(recipe: Recipe, data: dict[str, Any]) -> str | None:
    """Return Python code that loads the run's adapter, head or model and uses it once; None for the base.

    It runs in the run's folder; `for_repository` makes it load from the Hub.
    """
    kind = kind_of(data)
    if kind == BASE:
        return None
    auto, small_cnn = TASKS[recipe.task].auto_class, recipe.model == bases.SMALL_CNN
    quantise = None if kind == "full" else getattr(recipe.arms.get(data["arm"]), "quantise", None)
    image = recipe.task == "image-classification"
    classes = [auto, *(["BitsAndBytesConfig"] if quantise else [])]
    if not (image and small_cnn):
        classes.append("AutoImageProcessor" if image else "AutoTokenizer")
    if recipe.task == "token-classification":
        classes.append("pipeline")
    return _template().render(
        kind=kind,
        task=recipe.task,
        auto=auto,
        classes=sorted(classes),
        source={"full": "model_id", "part": "weights"}.get(kind, "adapter"),
        here=_HERE,
        small_cnn=small_cnn,
        embedded=recipe.model.startswith(EMBEDDED),
        image_size=_image_size(recipe.dataset.image_size),
        local=is_local_path(recipe.model),
        base=short(recipe.model) if is_local_path(recipe.model) else recipe.model,
        load_base=_call(f"base = {auto}.from_pretrained", ["base_id", *_options(recipe, data, quantise)]),
        remote_code=", trust_remote_code=True" if recipe.trust_remote_code else "",
        quantise=quantise,
        dtype=_DTYPES.get(data["environment"].get("precision"), "torch.float32"),
        weights_file=OWN_FILES.get(data["method"]),
        max_length=recipe.max_length,
        pairs=len(recipe.dataset.text_columns) > 1,
        problem_type=recipe.dataset.problem_type or CLASSES,
        prompt=recipe.prompts[0]["prompt"] if recipe.prompts else "Once upon a time",
        plain_prompt=formats.PLAIN_PROMPT,
    )


def _literal(text: object) -> str:
    """Return untrusted text as a Python string literal on one line."""
    shown = plain(text)
    return json.dumps(shown, ensure_ascii=not shown.isprintable())


def _options(recipe: Recipe, data: dict[str, Any], quantise: str | None) -> list[str]:
    """Return the arguments with which from_pretrained loads the base."""
    labels = (
        data.get("labels") or [row["label"] for row in data.get("per_class") or []] or list(recipe.dataset.labels or [])
    )
    names = ", ".join(f"{index}: {_literal(label)}" for index, label in enumerate(labels))
    options = [f"num_labels={len(labels)}"] if labels else []
    if (kind := recipe.dataset.problem_type) not in (None, CLASSES):
        options = [*(["num_labels=1"] if kind == REGRESSION else options), f'problem_type="{kind}"']
    options += [f"id2label={{{names}}}"] if 0 < len(labels) <= _MOST_LABELS else []
    options += ["num_labels=1"] if recipe.task == "reward" else []
    # A base with a head for other classes, such as ImageNet's: the trained head takes its place.
    options += (
        ["ignore_mismatched_sizes=True"]
        if recipe.task == "image-classification" and recipe.model != bases.SMALL_CNN
        else []
    )
    options += ["trust_remote_code=True"] if recipe.trust_remote_code else []
    return options + (["quantization_config=quantised"] if quantise else [])


def _image_size(side: int | None) -> str:
    """Return the arguments that set an image processor to the recipe's own size."""
    return f', size={{"height": {side}, "width": {side}}}, do_center_crop=False' if side else ""


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["literal"] = _literal
    return environment.get_template("load.py.j2")


def _call(function: str, arguments: list[str]) -> str:
    line = f"{function}({', '.join(arguments)})"
    return line if len(line) <= 110 else f"{function}(\n    " + ",\n    ".join(arguments) + ",\n)"


def for_repository(card: str, repo_id: str) -> str:
    """Return a card's text for a repository on the Hub instead of a folder."""
    return card.replace(_HERE, f"{_literal(repo_id)}  # its repository on the Hub").replace(FOLDER, repo_id)
