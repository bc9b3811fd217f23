"""Peak memory of a phase: allocated on a GPU, resident on a CPU."""

from __future__ import annotations

from pathlib import Path

from peft_recipes.kernels import allocator


class PeakMemory:
    """The peak of a phase, in bytes: allocated on the GPU, or resident on the CPU.

    On the CPU VmHWM, reset through /proc/self/clear_refs where that is allowed; otherwise the resident set as it was
    at the end of each step, and `method` says so.
    """

    def __init__(self, device: str):
        self.device, self.peak = device, 0
        self.method = (
            "max_memory_allocated" if device == "cuda" else "VmHWM" if _reset_hwm() else "resident set sampled"
        )

    def reset(self) -> None:
        """Forgets what came before (loading, an evaluation between steps)."""
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        elif self.method == "VmHWM":
            _reset_hwm()

    def release(self) -> None:
        """Gives back to the system what was freed but is still held, so that no peak holds loading or evaluation."""
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()
        elif self.method == "VmHWM":
            allocator.give_back()

    def read(self) -> int:
        """Takes the peak since the last reset into account, and returns the largest so far."""
        if self.device == "cuda":
            import torch

            now = torch.cuda.max_memory_allocated()
        elif self.method == "VmHWM":
            now = _status_bytes("VmHWM")
        else:
            import psutil

            now = psutil.Process().memory_info().rss
        self.peak = max(self.peak, now)
        return self.peak


def _reset_hwm() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0
