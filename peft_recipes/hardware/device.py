"""What this machine is and is fast at: device, precision by a measured trial, threads; and where figures came from."""

from __future__ import annotations

import functools
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_TRIAL = 256  # side of the matrices that precision is tried on: half a millisecond in fp32


@dataclass(frozen=True)
class Hardware:
    """device: "cuda", "mps" or "cpu". precision: of the computation ("bf16" or "fp32"); weights stay fp32."""

    device: str
    device_name: str
    precision: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def autocast(self) -> Any:
        """The context in which a model computes as it did in training."""
        import torch

        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def training_arguments(self) -> dict[str, Any]:
        """The TrainingArguments that follow from it."""
        return {"use_cpu": self.device == "cpu", "bf16": self.precision == "bf16", "fp16": False}


def choose(training: dict[str, Any] | None = None, threads: int | None = None) -> Hardware:
    """CUDA, then Apple's MPS, then the CPU; `use_cpu` and `bf16` in a recipe's training options decide first.

    threads: of the CPU, for this process from now on; None leaves torch's own choice (or OMP_NUM_THREADS).
    """
    import torch

    asked = training or {}
    if threads is not None:
        torch.set_num_threads(threads)
    device = "cpu"
    if not asked.get("use_cpu"):
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    precision = "bf16" if asked.get("bf16", bf16_pays(device)) else "fp32"
    return Hardware(device, name, precision, torch.get_num_threads())


# A CPU's matrix products must be this much faster in bf16 for training to gain: weights stay fp32, so each step casts
# them, and everything between the products stays as slow as it was.
_BF16_PAYS = 4.0


def bf16_pays(device: str) -> bool:
    """Whether bf16 is the precision to compute in, unless the recipe says otherwise.

    On a GPU that has it natively; on a CPU by a trial of a few milliseconds. One without fast bf16 can be a hundred
    times slower in it (seen: 1.1 against 126 GFLOP/s).
    """
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and bf16_speedup() >= _BF16_PAYS


_ROUNDS = 3


@functools.cache
def bf16_speedup() -> float:
    """How many times as fast a matrix product is in bf16 as in fp32 on this CPU, told once a process.

    The smallest of a few rounds: another process that takes the CPU for a moment makes either look slow, and fp32 is
    the choice that is never wrong. The very first product of a process starts threads and libraries, so it is not
    timed.
    """
    import torch

    pairs = [[torch.ones(_TRIAL, _TRIAL, dtype=kind) for _ in range(2)] for kind in (torch.float32, torch.bfloat16)]
    torch.mm(*pairs[0])
    return min(_best_seconds(*pairs[0]) / _best_seconds(*pairs[1]) for _ in range(_ROUNDS))


def _best_seconds(a: Any, b: Any) -> float:
    """The shortest of several products; where one is so slow that nothing more need be known, it is not repeated."""
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
        if best > 0.02:
            break
    return best


def synchronise(device: str) -> None:
    """Waits until the device has done what it was given, so that a clock reads the work and not its queueing."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
