"""Plain data, as YAML takes it: read, merged, checked for unknown keys, and PEFT's configurations to it and back."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError, unknown

_BOOLEAN = re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+\Z")

if TYPE_CHECKING:
    from peft import PeftConfig


def read_yaml(path: Path) -> Any:
    """Plain data of a YAML file, by the safe loader: no object is ever constructed. Raises RecipeError."""
    import yaml

    try:
        return from_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path} can't be read as YAML: {' '.join(str(error).split())}") from error


def from_yaml(text: str) -> Any:
    """Plain data of YAML text, read as YAML 1.2 says: 1e-3 is a number, and `no` is text. Raises YAMLError."""
    import yaml

    return yaml.load(text, _like_yaml_1_2(yaml.SafeLoader))


def to_yaml(data: Any) -> str:
    """YAML text of plain data, which `from_yaml` reads back the same: what it would take for a number is quoted."""
    import yaml

    return yaml.dump(data, Dumper=_like_yaml_1_2(yaml.SafeDumper), sort_keys=False, allow_unicode=True, width=100)


@functools.cache
def _like_yaml_1_2(base: type) -> type:
    resolvers = {
        first: [(tag, pattern) for tag, pattern in kinds if tag != "tag:yaml.org,2002:bool"]
        for first, kinds in base.yaml_implicit_resolvers.items()
    }
    made = type(base.__name__, (base,), {"yaml_implicit_resolvers": resolvers})
    made.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOLEAN, list("tTfF"))
    made.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
    return made


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` laid over `old`: mappings are merged key by key, everything else is replaced."""
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(old.get(key), dict)
        merged[key] = merge(old[key], value) if both else value
    return merged


def key_problems(given: dict[str, Any], kind: type, where: str) -> list[str]:
    """One line for each key of `given` that the dataclass `kind` lacks, and for each that it needs and is not there."""
    fields = dataclasses.fields(kind)
    names = [f.name for f in fields]
    needed = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    problems = [unknown("key", str(key), names, where) for key in given if key not in names]
    return problems + [f"Missing key '{key}' in {where}." for key in needed if given.get(key) is None]


def part(given: Any, kind: type, where: str) -> tuple[Any, list[str]]:
    """The dataclass `kind` made of plain data (None where that can't be), and what is wrong with the data."""
    if isinstance(given, kind):
        return given, []
    if isinstance(given, str) and where == "dataset":
        return kind(given), []  # the short form: only where the data lies
    if not isinstance(given, dict):
        return None, [f"{where}: expected a mapping, got {type(given).__name__}."]
    problems = key_problems(given, kind, where)
    names = [f.name for f in dataclasses.fields(kind)]
    if any(problem.startswith("Missing") for problem in problems):
        return None, problems
    return kind(**{k: v for k, v in given.items() if k in names}), problems


def peft_to_dict(config: PeftConfig) -> dict[str, Any]:
    """A PeftConfig as plain data: peft_type and every value that differs from its class's default; sets are sorted."""
    plain = {"peft_type": config.peft_type.value}
    for f in dataclasses.fields(config):
        if f.name in ("peft_type", "peft_version", "runtime_config"):
            continue
        value = getattr(config, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if value == default:
            continue
        plain[f.name] = _plain(value)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return getattr(value, "value", value) if type(value).__module__.startswith("peft") else value


def peft_from_dict(given: Any, where: str = "peft") -> PeftConfig:
    """The PeftConfig of plain data. Raises RecipeError: an unknown method or key (with the nearest), a wrong value."""
    from peft import PeftConfig, PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if isinstance(given, PeftConfig):
        return given
    if not isinstance(given, dict) or "peft_type" not in given:
        raise RecipeError(f"{where}: expected a mapping with 'peft_type' (LORA, IA3, ...), got {given!r}.")
    kind = str(given["peft_type"]).upper()
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise RecipeError(unknown("peft_type", kind, [k.value for k in PEFT_TYPE_TO_CONFIG_MAPPING], where))
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    names = [f.name for f in dataclasses.fields(config_class)]
    problems = [unknown("key", key, names, where) for key in given if key not in names]
    if problems:
        raise RecipeError(*problems)
    try:
        return config_class(**{k: v for k, v in given.items() if k != "peft_type"})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}") from error
