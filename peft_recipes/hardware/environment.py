"""The environment recorded with figures: processor, memory, package versions, version of the code."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peft_recipes.hardware.device import Hardware, bf16_speedup

_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "evaluate", "bitsandbytes")
# Packages that only show, use or start runs: changing them does not outdate a run's figures.
_SHOWING = {
    "cards", "catalog", "cli", "cluster", "comparison", "inference", "publishing", "reporting", "search", "statistics",
}  # fmt: skip


def environment(hardware: Hardware) -> dict[str, Any]:
    """Return device, threads, precision, versions and the state of the code. No path and no host name."""
    return {
        **hardware.to_dict(),
        "python": platform.python_version(),
        "platform": platform.system(),
        "memory_bytes": device_memory_bytes(hardware.device),
        "bf16_speedup": round(bf16_speedup(), 2) if hardware.device == "cpu" else None,
        "versions": {name: installed for name in _PACKAGES if (installed := _version(name))},
        "peft_recipes": code_version(),
        "git_commit": _git_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return None


@functools.cache
def code_version() -> str:
    """Return the package's version and a hash of the sources that determine a run's figures."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if path.parts[0] not in _SHOWING | {"recipes"}:
            digest.update(f"{path.as_posix()}\n".encode() + file.read_bytes())
    return f"{_version('peft_recipes') or '0'}+{digest.hexdigest()[:10]}"


@functools.cache
def _git_commit() -> str | None:
    """Return the commit of the package's checkout, with "-dirty" if tracked files differ; None outside of one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() if described.returncode == 0 else None


def free_memory_bytes() -> int:
    """Return the bytes of the machine's memory that a process can still take, within the limit of a container."""
    import psutil

    free = [psutil.virtual_memory().available]
    for folder, limit, used, cached in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, taken = (int(Path(folder, name).read_text()) for name in (limit, used))
            counts = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
            free.append(most - taken + int(counts.get(cached, 0)))  # the page cache gives way
        except (OSError, ValueError):
            continue  # no container, or "max"
    return max(min(free), 0)


def device_memory_bytes(device: str) -> int:
    """Return the memory for training in bytes: the GPU's, or the machine's within the limit of a container."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_properties(0).total_memory
    import psutil

    limits = [psutil.virtual_memory().total]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # version 2, version 1
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):
            continue  # no container, or "max"
    return min(limits)
