"""The text of a drafted recipe: a Python module in the style of the shipped ones, with a comment on each choice."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft_recipes.drafting.arms import Fitted
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.dataset import Dataset
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.recipe.script_header import extras, script_header

WIDTH = 120  # characters in a line, as the shipped recipes have them


def module_text(recipe: Recipe, why: dict[str, str], made: Fitted, title: str, path: str) -> str:
    """The module. why: reasons by the name of what was chosen; made: has the expression of LoRA's layers."""
    configs = sorted({type(arm.peft).__name__ for arm in recipe.arms.values() if arm.peft is not None})
    uses_layers = any(_on_layers(arm.peft, made.layers) for arm in recipe.arms.values())
    names = ["Arm", "Dataset", "Recipe", "main"]
    names += ["targets"] if uses_layers and made.targets.startswith("targets(") else []
    lines = [
        *script_header(extras(recipe)).splitlines(),
        f'"""{title}',
        "",
        f"    peft-recipes data {path}",
        f"    peft-recipes plan {path}",
        f"    peft-recipes compare {path}",
        f"    python {path} --arm {next((name for name in recipe.arms if name.endswith('lora')), 'full')}",
        "",
        "Drafted by `peft-recipes new`: the comments say why. The learning rates are usual ones to start from;",
        f"`peft-recipes scan {path}` finds your own.",
        '"""',
        "",
        *([f"from peft import {', '.join(configs)}", ""] if configs else []),
        f"from peft_recipes import {', '.join(names)}",
        "",
    ]
    if uses_layers:
        lines += _targets_lines(made.targets, why)
    lines += [
        "",
        "recipe = Recipe(",
        *_fields(recipe, why, made.layers),
        ")",
        "",
        'if __name__ == "__main__":',
        "    main(recipe)",
        "",
    ]
    return "\n".join(lines)


def _targets_lines(targets: str, why: dict[str, str]) -> list[str]:
    comment = why.get("targets", "")
    line = f"LAYERS = {targets}"
    if len(line) > WIDTH:
        names = targets.strip("[]").split(", ")
        return _commented("LAYERS = [", comment, 0) + [f"    {name}," for name in names] + ["]"]
    return _commented(line, comment, 0)


def _fields(recipe: Recipe, why: dict[str, str], layers: Any) -> list[str]:
    lines = []
    for key in ("name", "title", "task", "model"):
        lines += _commented(f"{key}={_literal(getattr(recipe, key))},", why.get(key, ""), 4)
    lines += _dataset(recipe.dataset, why)
    default = _default_metric(recipe)
    if recipe.metric != default:
        lines += _commented(f"metric={_literal(recipe.metric)},", why.get("metric", ""), 4)
    if recipe.task != "image-classification":
        lines += _commented(f"max_length={recipe.max_length:_},", why.get("max_length", ""), 4)
    lines += _others(recipe)
    if recipe.training:
        lines.append("    training={")
        for key, value in recipe.training.items():
            lines += _commented(f"{_literal(key)}: {_literal(value)},", why.get(f"training.{key}", ""), 8)
        lines.append("    },")
    lines += _commented("arms={", why.get("arms", ""), 4)
    lines += _above(why.get("full", "") if "full" not in recipe.arms else "", 8)
    for name, arm in recipe.arms.items():
        lines += _arm(name, arm, why.get(f"arms.{name}", ""), layers)
    lines.append("    },")
    if recipe.embedded:
        lines += _nested("embedded", recipe.embedded, 4)
    return lines


def _default_metric(recipe: Recipe) -> str | None:
    from peft_recipes.recipe.options import metrics_of

    return metrics_of(recipe.task, recipe.dataset.problem_type)[0]


_WRITTEN = {"name", "title", "task", "model", "dataset", "metric", "max_length", "training", "arms", "embedded"}


def _others(recipe: Recipe) -> list[str]:
    """The fields that a flag (--set) has changed from their defaults."""
    lines = []
    for f in dataclasses.fields(Recipe):
        default = f.default if f.default is not dataclasses.MISSING else None
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        value = getattr(recipe, f.name)
        if f.name not in _WRITTEN and value != default:
            lines.append(f"    {f.name}={_literal(value)},")
    return lines


def _dataset(source: Dataset, why: dict[str, str]) -> list[str]:
    lines = ["    dataset=Dataset(", f"        {_literal(source.path)},"]
    for f in dataclasses.fields(Dataset):
        value = getattr(source, f.name)
        explained = f.name in ("text", "label") and f"dataset.{f.name}" in why
        written = f.name in ("train", "validation", "test") or explained or value != f.default
        if f.name == "path" or not written or (f.name == "train" and value is None):
            continue
        lines += _commented(f"{f.name}={_literal(value)},", why.get(f"dataset.{f.name}", ""), 8)
    return [*lines, "    ),"]


def _arm(name: str, arm: Arm, comment: str, layers: Any) -> list[str]:
    options = [f"learning_rate={_rate(arm.learning_rate)}"]
    options += [f"{key}={_literal(getattr(arm, key))}" for key in ("quantise", "lora_plus_ratio", "optim")
                if getattr(arm, key) is not None]  # fmt: skip
    if arm.peft is not None:
        options.insert(0, _peft(arm.peft, layers))
    elif arm.method != "full":
        options.insert(0, _literal(arm.method))
    line = f"{_literal(name)}: Arm({', '.join(options)}),"
    if len(line) + 8 > WIDTH:
        inner = [f"            {option}," for option in options]
        return [*_above(comment, 8), f"        {_literal(name)}: Arm(", *inner, "        ),"]
    return _commented(line, comment, 8)


def _on_layers(config: Any, layers: Any) -> bool:
    """Whether a PeftConfig adapts the layers that the module names once, as LAYERS."""
    own = getattr(config, "target_modules", None)
    return own is not None and own == (layers if isinstance(layers, str) else set(layers))


def _peft(config: Any, layers: Any) -> str:
    """A PeftConfig with the options that differ from PEFT's defaults; a LoRA always with its rank and alpha."""
    from peft_recipes.recipe.serialization import peft_to_dict

    default = peft_to_dict(type(config)())
    given = {key: getattr(config, key) for key in ("r", "lora_alpha") if hasattr(config, key)}
    given |= {key: value for key, value in peft_to_dict(config).items() if value != default.get(key)}
    given.pop("peft_type", None)
    on_layers = _on_layers(config, layers) and given.pop("target_modules", None)
    options = [f"{key}={_literal(value)}" for key, value in given.items()]
    return f"{type(config).__name__}({', '.join([*options, *(['target_modules=LAYERS'] if on_layers else [])])})"


def _nested(key: str, value: dict[str, Any], indent: int) -> list[str]:
    pad = " " * indent
    lines = [f"{pad}{key}={{" if indent == 4 else f"{pad}{_literal(key)}: {{"]
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            lines += _nested(name, inner, indent + 4)
        else:
            lines.append(f"{pad}    {_literal(name)}: {_literal(inner)},")
    return [*lines, f"{pad}}},"]


def _rate(value: float) -> str:
    """1e-04 as 1e-4."""
    mantissa, _, exponent = f"{value:e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _literal(value: Any) -> str:
    """A Python literal with double quotes."""
    if isinstance(value, str):
        text = repr(value)
        return text if '"' in value or text[0] == '"' else f'"{text[1:-1]}"'.replace("\\'", "'")
    if isinstance(value, bool) or value is None:
        return repr(value)
    if isinstance(value, int):
        return f"{value:_}" if abs(value) >= 1_000 else str(value)
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_literal, value))
        return f"[{inner}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(inner)}" for key, inner in value.items()) + "}"
    return repr(value)


def _commented(line: str, comment: str, indent: int) -> list[str]:
    """A line with its comment behind it, or above where both are too long for one line."""
    pad = " " * indent
    if not comment:
        return [pad + line]
    if indent + len(line) + 4 + len(comment) <= WIDTH:
        return [f"{pad}{line}  # {comment}"]
    return [*_above(comment, indent), pad + line]


def _above(comment: str, indent: int) -> list[str]:
    import textwrap

    pad = " " * indent + "# "
    return textwrap.wrap(comment, WIDTH, initial_indent=pad, subsequent_indent=pad) if comment else []
