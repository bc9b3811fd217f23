"""A recipe's options for scored answers: the user's own score, the pattern of an answer, and how it is generated."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_recipes.errors import RecipeError, nearest, unknown
from peft_recipes.recipe.metrics import ANSWER_METRICS, METRICS, PREFERENCE
from peft_recipes.recipe.type_checks import describe, fits

_FUNCTION = re.compile(r".+:[^\W\d]\w*\Z")
# The options of GenerationConfig that can be set, those that need nothing but the model: type, least and most.
_GENERATION: dict[str, tuple[Any, float, float]] = {
    "max_new_tokens": (int, 1, math.inf),
    "min_new_tokens": (int, 0, math.inf),
    "do_sample": (bool, 0, 1),
    "temperature": (float, 1e-6, math.inf),
    "top_k": (int, 0, math.inf),
    "top_p": (float, 1e-6, 1),
    "min_p": (float, 0, 1),
    "typical_p": (float, 1e-6, 1),
    "epsilon_cutoff": (float, 0, 1),
    "eta_cutoff": (float, 0, 1),
    "repetition_penalty": (float, 1e-6, math.inf),
    "no_repeat_ngram_size": (int, 0, math.inf),
    "num_beams": (int, 1, math.inf),
    "length_penalty": (float, -math.inf, math.inf),
    "early_stopping": (bool, 0, 1),
}


def function_path(function: Callable[..., Any], field: str = "score") -> str:
    """Return where a function is defined, as `load_function` finds it again: "module:function" or "file.py:function".

    Raises RecipeError for a lambda or a function inside another, which no other process can import.
    """
    name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", None)
    if name.isidentifier() and module in sys.modules and module != "__main__":
        return f"{module}:{name}"
    try:  # a recipe module has no name to import it by
        file = inspect.getsourcefile(function)
    except TypeError:
        file = None
    if not (name.isidentifier() and file and Path(file).is_file()):
        raise RecipeError(
            f"{field}: {name or repr(function)} can't be imported by the runs' processes. Define it with `def` at the "
            "top level of a module."
        )
    return f"{Path(file).resolve()}:{name}"


def load_function(path: str, field: str) -> Callable[..., Any]:
    """Import the function at "module:function" or "file.py:function". Raises RecipeError, which names the `field`.

    It runs the module's code: never call it for a recipe that was downloaded.
    """
    source, _, name = path.rpartition(":")
    try:
        module = _from_file(Path(source)) if source.endswith(".py") else _from_name(source)
    except FileNotFoundError as error:
        raise RecipeError(f"{field}: there is no file {source}.") from error
    except Exception as error:  # whatever the user's module raises
        raise RecipeError(f"{field}: {source} can't be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RecipeError(f"{field}: {source} has no function '{name}'.{nearest(name, names)}")
    return function


def _from_name(name: str) -> Any:
    """Import a module, also one of the current folder, where `python -m` and scripts would find it."""
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(os.getcwd())


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(path)
    spec = importlib.util.spec_from_file_location(f"peft_recipes_user.{path.stem}", path)
    assert spec is not None and spec.loader is not None  # None only if the suffix is not Python's
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def source_hash(path: str) -> str:
    """Return a hash of the file that defines the function at `path`; "" where it is not found."""
    source, _, _ = path.rpartition(":")
    try:
        if not source.endswith(".py"):
            beside = Path(f"{source.replace('.', '/')}.py")  # in the current folder
            source = str(beside) if beside.is_file() else importlib.util.find_spec(source).origin
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()
    except (ImportError, AttributeError, TypeError, OSError, ValueError):
        return ""


def answer_problems(recipe: Any) -> list[str]:
    """Return every problem of a Recipe's options for scored answers, one line each."""
    problems = []
    if recipe.metric == "score" and not recipe.score:
        problems.append("score: the metric 'score' needs the function that scores an answer, as 'module:function'.")
    given = {"score": recipe.score, "answer_pattern": recipe.answer_pattern}
    for field, metric in (("score", "score"), ("answer_pattern", "regex")):
        if given[field] is not None and recipe.metric != metric:
            problems.append(f"{field}: no effect with the metric '{recipe.metric}'. Set metric: {metric}, or leave it "
                            "out.")  # fmt: skip
    if recipe.answer_pattern is not None:
        try:
            re.compile(recipe.answer_pattern)
        except re.error as error:
            problems.append(f"answer_pattern: not a regular expression: {error}.")
    for field in ("score", "reward"):
        if (path := getattr(recipe, field)) is not None and not _FUNCTION.match(path):
            problems.append(f"{field}: expected 'module:function' or 'file.py:function', got '{path}'.")
    return problems + _reward_problems(recipe) + _generation_problems(recipe.generation)


def _reward_problems(recipe: Any) -> list[str]:
    """Check that grpo has a reward, and no other task."""
    if recipe.task != "grpo":
        return ["reward: no effect: it is for the task grpo."] if recipe.reward is not None else []
    if recipe.reward is None and recipe.metric in ("reward", PREFERENCE):
        names = ", ".join(name for name in ANSWER_METRICS if METRICS[name].needs is None)
        return [f"reward: grpo needs one: reward: 'module:function', or as metric one that scores answers: {names}."]
    return []


def _generation_problems(generation: dict[str, Any]) -> list[str]:
    """Check names, types and ranges, and with transformers' GenerationConfig what contradicts each other."""
    if not generation:
        return []
    problems = [unknown("key", key, _GENERATION, "generation") for key in generation if key not in _GENERATION]
    for key, (kind, least, most) in _GENERATION.items():
        value = generation.get(key)
        if value is None:
            continue
        if not fits(value, kind):
            problems.append(f"generation.{key}: expected {describe(kind)}, got {value!r}.")
        elif not least <= value <= most:
            above = f"{least:g} or more" if least != 1e-6 else "a number above 0"
            upto = "" if most == math.inf else f", at most {most:g}"
            problems.append(f"generation.{key}: expected {above}{upto}, got {value!r}.")
    if problems:
        return problems
    from transformers import GenerationConfig

    try:
        GenerationConfig(**generation).validate(strict=True)
    except (ValueError, TypeError) as error:
        problems.append(f"generation: {' '.join(str(error).split())}")
    return problems
