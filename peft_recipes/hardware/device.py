"""Choose the device, the precision (by a measured trial on CPUs) and the number of threads."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_TRIAL = 256  # side of the square matrices of the bf16 trial: half a millisecond per product in fp32
_ROUNDS = 3
# Least speed-up of a CPU's matrix products at which bf16 training gains: weights stay fp32, so each step casts them,
# and everything between the products stays as slow as it was.
_BF16_PAYS = 4.0


@dataclass(frozen=True)
class Hardware:
    """device: "cuda", "mps" or "cpu". precision: of the computation, "bf16", "fp16" or "fp32"; weights stay fp32."""

    device: str
    device_name: str
    precision: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def autocast_dtype(self) -> Any:
        """The dtype of a computation in half precision; None in fp32."""
        import torch

        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)

    def autocast(self) -> Any:
        """Return the autocast context of training."""
        import torch

        dtype = self.autocast_dtype
        return torch.autocast(self.device, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def training_arguments(self) -> dict[str, Any]:
        """Return the TrainingArguments that follow from the device and the precision."""
        return {"use_cpu": self.device == "cpu", "bf16": self.precision == "bf16", "fp16": self.precision == "fp16"}


def choose(training: dict[str, Any] | None = None, threads: int | None = None) -> Hardware:
    """Choose CUDA, Apple's MPS or the CPU, in this order, unless the training options set `use_cpu`, `bf16` or `fp16`.

    A GPU without native bf16 (T4, V100) computes in fp16, with a loss scale, unless the options set `bf16`.
    threads: CPU threads of this process from now on; None keeps torch's default (or OMP_NUM_THREADS).
    """
    import torch

    training, device = training or {}, device_of(training)
    if threads is not None:
        torch.set_num_threads(threads)
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return Hardware(device, name, _precision(training, device), torch.get_num_threads())


def device_of(training: dict[str, Any] | None = None) -> str:
    """Return "cuda", "mps" or "cpu": where a recipe with these training options is trained."""
    import torch

    if (training or {}).get("use_cpu"):
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def visible_gpus() -> list[str]:
    """Return the CUDA GPUs that this process may use, by their names in CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else [str(number) for number in range(count)])[:count]


def cpu_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _precision(training: dict[str, Any], device: str) -> str:
    if training.get("fp16"):
        return "fp16"
    if training.get("bf16", _bf16_pays(device)):
        return "bf16"
    return "fp16" if device == "cuda" and not {"bf16", "fp16"} & set(training) else "fp32"


def _bf16_pays(device: str) -> bool:
    """Whether bf16 is faster: on a GPU with native support, on a CPU by a trial of a few milliseconds.

    A CPU without fast bf16 can be a hundred times slower in it (measured: 1.1 instead of 126 GFLOP/s).
    """
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and bf16_speedup() >= _BF16_PAYS


@functools.cache
def bf16_speedup() -> float:
    """Measure the speed of a bf16 matrix product relative to fp32 on this CPU, once per process.

    Returns the smallest ratio of a few rounds: another busy process can slow down either, and fp32 is the safe choice.
    The first product of a process starts threads and loads libraries, so it is not timed.
    """
    import torch

    pairs = [[torch.ones(_TRIAL, _TRIAL, dtype=dtype) for _ in range(2)] for dtype in (torch.float32, torch.bfloat16)]
    torch.mm(*pairs[0])
    return min(_best_seconds(*pairs[0]) / _best_seconds(*pairs[1]) for _ in range(_ROUNDS))


def _best_seconds(a: Any, b: Any) -> float:
    """Return the shortest time of six products, or of fewer if one takes more than 20 ms."""
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
        if best > 0.02:
            break
    return best


def _module(device: str) -> Any:
    """torch's module of a device: torch.cuda, torch.mps; None for the CPU."""
    import torch

    return None if device == "cpu" else getattr(torch, device)


def synchronise(device: str) -> None:
    """Wait until the device has finished its queued work, so that a clock measures it."""
    if (module := _module(device)) is not None:
        module.synchronize()


def release_memory(device: str) -> None:
    """Return the memory that the device's allocator holds without using it."""
    if (module := _module(device)) is not None:
        module.empty_cache()


def reset_peak_memory(device: str) -> None:
    """Let `peak_memory` begin anew. MPS has no such counter; its held memory only grows until it is released."""
    if device == "cuda":
        _module(device).reset_peak_memory_stats()


def peak_memory(device: str) -> tuple[int, str]:
    """Bytes of the device's memory, with the name of torch's counter: the peak since the last reset.

    On MPS what the driver has allocated, which includes memory that is held and unused.
    """
    if device == "cuda":
        return _module(device).max_memory_allocated(), "max_memory_allocated"
    return _module(device).driver_allocated_memory(), "driver_allocated_memory"


def random_state(device: str) -> Any:
    """The state of the device's random numbers; None for the CPU, whose state torch.get_rng_state gives."""
    return None if (module := _module(device)) is None else module.get_rng_state()


def set_random_state(device: str, state: Any) -> None:
    if state is not None:
        _module(device).set_rng_state(state)


@contextlib.contextmanager
def random_state_kept(device: str) -> Iterator[None]:
    """Restore the random states of the CPU and the device afterwards, so that a trial changes no draw."""
    import torch

    host, own = torch.get_rng_state(), random_state(device)
    try:
        yield
    finally:
        torch.set_rng_state(host)
        set_random_state(device, own)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
