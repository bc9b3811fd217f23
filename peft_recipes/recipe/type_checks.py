"""Type checks of values against type annotations, with messages in plain words."""

from __future__ import annotations

import dataclasses
import enum
import math
import types
import typing
from typing import Any

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def type_problems(instance: Any, prefix: str = "") -> list[str]:
    """Return one line for each field of a dataclass instance whose value does not fit its annotation."""
    hints = typing.get_type_hints(type(instance))
    return [
        f"{prefix}{f.name}: expected {describe(hints[f.name])}, got {getattr(instance, f.name)!r}."
        for f in dataclasses.fields(instance)
        if not fits(getattr(instance, f.name), hints[f.name])
    ]


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value fits a type annotation.

    An int fits float, a bool fits neither, and a number must be finite. An enum takes its values as text. Annotations
    of another kind than unions, lists, dicts and classes fit everything.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is list:
        return isinstance(value, list) and all(fits(v, arguments[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(k, arguments[0]) and fits(v, arguments[1]) for k, v in value.items()
        )
    if hint in (int, float):
        is_number = isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    if hint is Any or not isinstance(hint, type):
        return True
    return isinstance(value, (hint, str) if issubclass(hint, enum.Enum) else hint)


def describe(hint: Any) -> str:
    """Return a type annotation in words: "a whole number or null"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(option) for option in arguments))
    if origin is list:
        return f"a list of {describe(arguments[0])}" if arguments[0] is not Any else "a list"
    if origin is dict or hint is dict:
        return "a mapping" + (f" of names to {describe(arguments[1])}" if arguments and arguments[1] is not Any else "")
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "text"
    return _WORDS.get(hint, f"a {getattr(hint, '__name__', hint)}")
