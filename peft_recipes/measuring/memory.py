"""Peak memory of a phase: allocated on a GPU, resident on a CPU."""

from __future__ import annotations

from pathlib import Path

from peft_recipes.hardware.device import peak_memory, release_memory, reset_peak_memory
from peft_recipes.kernels import allocator


class PeakMemory:
    """The peak of a phase, in bytes: allocated on the device (CUDA, MPS), or resident on the CPU.

    On the CPU this is VmHWM, reset through /proc/self/clear_refs. Where that is not allowed, it is the resident set
    sampled at each `read`, and `method` says so.
    """

    def __init__(self, device: str):
        self.device, self.peak = device, 0
        if device != "cpu":
            _, self.method = peak_memory(device)
        else:
            self.method = "VmHWM" if _reset_hwm() else "resident set sampled"

    def reset(self) -> None:
        """Start a new phase, without loading or the evaluation before it."""
        if self.device != "cpu":
            reset_peak_memory(self.device)
        elif self.method == "VmHWM":
            _reset_hwm()

    def release(self) -> None:
        """Return freed memory to the system, so that no peak includes loading or evaluation."""
        if self.device != "cpu":
            release_memory(self.device)
        elif self.method == "VmHWM":
            allocator.give_back()

    def read(self) -> int:
        """Update the peak with the memory since the last reset, and return it."""
        if self.device != "cpu":
            current, _ = peak_memory(self.device)
        elif self.method == "VmHWM":
            status = Path("/proc/self/status").read_text().splitlines()
            current = next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")), 0)
        else:
            import psutil

            current = psutil.Process().memory_info().rss
        self.peak = max(self.peak, current)
        return self.peak


def _reset_hwm() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False
