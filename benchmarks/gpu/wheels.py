"""What a machine that has torch and transformers lacks to run on_gpu.py: the packages of constraints.txt, as pins."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

ROOT = Path(__file__).parents[2]
THERE = ("torch", "transformers")
EXTRAS = ("bitsandbytes", "pytest")  # beside the package's own dependencies


def wheels(python: str, have: Iterable[str] = THERE) -> list[str]:
    """NAME==VERSION of what the benchmarks need beyond `have` and what that needs itself. python: "3.12"."""
    from packaging.requirements import Requirement

    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux",
                   "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix",
                   "implementation_name": "cpython", "platform_python_implementation": "CPython"}  # fmt: skip

    def closure(names: Iterable[str]) -> set[str]:
        seen, left = set(), [_name(name) for name in names]
        while left:
            if (name := left.pop()) in seen:
                continue
            seen.add(name)
            try:
                needed = [Requirement(text) for text in requires(name) or []]
            except PackageNotFoundError:
                continue
            left += [_name(one.name) for one in needed
                     if one.marker is None or one.marker.evaluate({**environment, "extra": ""})]  # fmt: skip
        return seen

    own = [Requirement(text) for text in _dependencies()]
    names = [one.name for one in own if one.marker is None or one.marker.evaluate({**environment, "extra": ""})]
    needed = closure([*names, *EXTRAS]) - closure(have)
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if "==" in line and not line.startswith("#"):
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate({**environment, "extra": ""}):
                pins[_name(one.name)] = f"{one.name}{one.specifier}"
    return [pins[name] for name in sorted(needed) if name in pins]


def _dependencies() -> list[str]:
    """The dependencies in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
    return re.findall(r'^\s*"(.+)",$', block, re.MULTILINE)


def _name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
