"""Type checks of dataclass fields: one line for each value that is not of its annotated type."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

_SAID = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def type_problems(made: Any, where: str = "") -> list[str]:
    """One line for each field of a dataclass whose value is not of its annotated type (int does for float)."""
    hints = typing.get_type_hints(type(made))
    return [
        f"{where}{f.name}: expected {_said(hints[f.name])}, got {getattr(made, f.name)!r}."
        for f in dataclasses.fields(made)
        if not _fits(getattr(made, f.name), hints[f.name])
    ]


def _fits(value: Any, hint: Any) -> bool:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, inside[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inside[0]) and _fits(v, inside[1]) for k, v in value.items())
    if hint in (int, float):
        number = isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return isinstance(value, hint)


def _said(hint: Any) -> str:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_said(one) for one in inside))
    if origin is list:
        return f"a list of {_said(inside[0])}" if inside[0] is not Any else "a list"
    if origin is dict:
        return "a mapping" + (f" of names to {_said(inside[1])}" if inside[1] is not Any else "")
    return _SAID.get(hint, f"a {getattr(hint, '__name__', hint)}")
