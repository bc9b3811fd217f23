"""Plain data: reading and writing YAML, merging, and converting dataclasses and PeftConfigs."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError, unknown

if TYPE_CHECKING:
    from peft import PeftConfig

_BOOLEAN = re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*)\Z|0x[0-9a-fA-F]+\Z|0o[0-7]+\Z")
_DECIMAL = re.compile(
    r"[-+]?((0|[1-9][0-9_]*)\.[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?\Z|[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z"
)
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+\Z")


def read_yaml(path: Path) -> Any:
    """Read a YAML file with the safe loader, which constructs no objects. Raises RecipeError."""
    import yaml

    try:
        return from_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path} can't be read as YAML: {' '.join(str(error).split())}") from error


def from_yaml(text: str) -> Any:
    """Parse YAML text by the rules of YAML 1.2: 1e-3 is a number; `no`, 011, 12:30 and 2024-05-01 are text.

    Raises YAMLError, also for a key that a mapping has twice.
    """
    import yaml

    return yaml.load(text, _with_yaml_1_2_rules(yaml.SafeLoader))


def has_comment(text: str) -> bool:
    """Whether YAML would take a part of the text for a comment. Raises YAMLError."""
    import yaml

    end = 0
    for token in yaml.scan(text, yaml.SafeLoader):
        if "#" in text[end : token.start_mark.index]:
            return True
        end = token.end_mark.index
    return "#" in text[end:]


def to_yaml(data: Any) -> str:
    """Write plain data as YAML that `from_yaml` reads back unchanged; text that looks like a number is quoted."""
    import yaml

    return yaml.dump(data, Dumper=_with_yaml_1_2_rules(yaml.SafeDumper), sort_keys=False, allow_unicode=True, width=100)


_TAG = "tag:yaml.org,2002:"
# A loader gets its own rules for these; there are no times.
_NOT_IN_1_2 = (f"{_TAG}bool", f"{_TAG}int", f"{_TAG}float", f"{_TAG}timestamp")


@functools.cache
def _with_yaml_1_2_rules(base: type) -> type:
    """Return a subclass of PyYAML's loader or dumper that follows YAML 1.2 for booleans, numbers, times and keys."""
    reads = hasattr(base, "construct_mapping")
    left_out = _NOT_IN_1_2 if reads else _NOT_IN_1_2[:1]  # what is a number by either version is written in quotes
    resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag not in left_out]
        for first, rules in base.yaml_implicit_resolvers.items()
    }
    subclass = type(base.__name__, (base,), {"yaml_implicit_resolvers": resolvers})
    subclass.add_implicit_resolver(f"{_TAG}bool", _BOOLEAN, list("tTfF"))
    subclass.add_implicit_resolver(f"{_TAG}int", _WHOLE, list("-+0123456789"))
    subclass.add_implicit_resolver(f"{_TAG}float", _EXPONENT, list("-+.0123456789"))
    if reads:
        subclass.add_implicit_resolver(f"{_TAG}float", _DECIMAL, list("-+.0123456789"))
        subclass.add_constructor(f"{_TAG}map", _mapping)
        subclass.add_constructor(f"{_TAG}int", lambda loader, node: int(node.value.replace("_", ""), 0))
    return subclass


def _mapping(loader: Any, node: Any) -> dict[Any, Any]:
    """A mapping of YAML. Raises YAMLError for a key that it has twice, with both lines."""
    import yaml

    lines: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == f"{_TAG}merge":
            continue
        key, line = key_node.value, key_node.start_mark.line + 1
        if isinstance(key, str) and key in lines:
            raise yaml.constructor.ConstructorError(None, None, duplicate_key(key, lines[key], line))
        if isinstance(key, str):
            lines[key] = line
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


def duplicate_key(key: str, first: int, second: int) -> str:
    """The message for a key that a mapping has twice. first, second: its lines."""
    where = f"line {first}" if first == second else f"lines {first} and {second}"
    return f"the key '{key}' is given twice ({where}); keep one of them"


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Merge `new` into a copy of `old`: mappings are merged key by key, other values replaced."""
    merged = dict(old)
    for key, value in new.items():
        both_mappings = isinstance(value, dict) and isinstance(old.get(key), dict)
        merged[key] = merge(old[key], value) if both_mappings else value
    return merged


def key_problems(given: dict[str, Any], cls: type, where: str) -> list[str]:
    """Return one line for each key that the dataclass `cls` lacks, and for each required key that is missing."""
    fields = dataclasses.fields(cls)
    names = [f.name for f in fields]
    needed = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    problems = [unknown("key", str(key), names, where) for key in given if key not in names]
    return problems + [f"Missing key '{key}' in {where}." for key in needed if given.get(key) is None]


def dataclass_from_dict(given: Any, cls: type, where: str) -> tuple[Any, list[str]]:
    """Build the dataclass `cls` from plain data; return it (None if it can't be built) and the problems found."""
    if isinstance(given, cls):
        return given, []
    if isinstance(given, str) and where.startswith("dataset"):
        return cls(given), []  # short form: only the path
    if not isinstance(given, dict):
        return None, [f"{where}: expected a mapping, got {type(given).__name__}."]
    problems = key_problems(given, cls, where)
    if any(problem.startswith("Missing") for problem in problems):
        return None, problems
    names = [f.name for f in dataclasses.fields(cls)]
    return cls(**{k: v for k, v in given.items() if k in names}), problems


def peft_to_dict(config: PeftConfig) -> dict[str, Any]:
    """Convert a PeftConfig to plain data: peft_type and every value that differs from its default; sets are sorted."""
    plain = {"peft_type": config.peft_type.value}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if f.name not in ("peft_type", "peft_version", "runtime_config") and value != default:
            plain[f.name] = value
    return json.loads(json.dumps(plain, default=lambda v: sorted(v) if isinstance(v, set) else dataclasses.asdict(v)))


def peft_from_dict(given: Any, where: str = "peft") -> PeftConfig:
    """Build a PeftConfig from plain data. Raises RecipeError for an unknown method or key, or a value PEFT rejects."""
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if isinstance(given, PeftConfig):
        return given
    if not isinstance(given, dict) or "peft_type" not in given:
        raise RecipeError(f"{where}: expected a mapping with 'peft_type' (LORA, IA3, ...), got {given!r}.")
    peft_type = str(given["peft_type"]).upper()
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise RecipeError(unknown("peft_type", peft_type, [t.value for t in PEFT_TYPE_TO_CONFIG_MAPPING], where))
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    names = [f.name for f in dataclasses.fields(config_class)]
    if problems := [unknown("key", key, names, where) for key in given if key not in names]:
        raise RecipeError(*problems)
    try:
        return config_class(**{k: v for k, v in given.items() if k != "peft_type"})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}") from error
