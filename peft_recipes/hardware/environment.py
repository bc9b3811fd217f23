"""The environment that figures come from: processor, memory, versions, git commit."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peft_recipes.hardware.device import Hardware, bf16_speedup

_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "evaluate", "bitsandbytes")


def environment(hardware: Hardware) -> dict[str, Any]:
    """Where figures came from: device, threads, precision, versions, the code's own state. No path, no host name."""
    return {
        **hardware.to_dict(),
        "python": platform.python_version(),
        "platform": platform.system(),
        "memory_bytes": device_memory_bytes(hardware.device),
        "bf16_speedup": round(bf16_speedup(), 2) if hardware.device == "cpu" else None,
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "peft_recipes": code_version(),
        "git_commit": _git_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return None


# What only shows, uses or starts runs: a change there makes no run's figures old.
_SHOWING = (
    "cards", "catalog", "cli", "comparison", "inference", "publishing", "reporting", "search", "statistics",
)  # fmt: skip


@functools.cache
def code_version() -> str:
    """The package's version and a hash of the sources that make a run's figures."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if place.parts[0] not in (*_SHOWING, "recipes"):
            digest.update(f"{place.as_posix()}\n".encode() + path.read_bytes())
    return f"{_version('peft_recipes') or '0'}+{digest.hexdigest()[:10]}"


@functools.cache
def _git_commit() -> str | None:
    """The commit of the checkout the package stands in, with "-dirty" where files differ; None outside one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        ask = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, timeout=10)
        commit = ask(["git", "rev-parse", "--short=12", "HEAD"])
        dirty = ask(["git", "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "") if commit.returncode == 0 else None


def device_memory_bytes(device: str) -> int | None:
    """The memory that training has, in bytes: the GPU's, or the machine's; None where it can't be told."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_properties(0).total_memory
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    return min(whole, _container_limit() or whole)


def _container_limit() -> int | None:
    """The memory that a container may use (control groups, version 2 or 1); None where nothing limits it."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(path).read_text())
        except (OSError, ValueError):
            continue
    return None
