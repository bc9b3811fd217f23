"""Whether a machine did something else while the steps of a run were measured."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft_recipes.distributed import processes

_TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds: what /proc counts a machine's time in
_TICKS_OF_NOISE = 5  # of a sum over few short steps, below which it says nothing

# Trials on two cores (docs/concepts/measurements.md): threads of a quiet run wait 0.4 % of their time at most. Another
# process on 5 % of a core makes it 3 % and the step 14 % longer; one on a core that no thread needs 1 % and 0 to 3 %
# longer, or 1.7 % and 14 % longer where it streams through memory.
WAITED = 0.01  # share of the time of a run's threads that they waited for a core
OTHERS = 0.1  # CPU cores that others took from the run, where waiting can't be read
STOLEN = 0.02  # CPU cores that the host of a virtual machine gave to others

_BUSY = "The machine was busy at the start"
_NAMES = ("seconds", "own", "machine", "stolen", "waited", "pressure", "switches")


class Disturbance:
    """Sum, over the measured steps, what this process and all others took of the machine.

    begin and end are called outside the timed part of a step. Where the system has no /proc, the machine's and this
    process's time still come from psutil and Python; waiting and pressure stay unknown.
    """

    def __init__(self) -> None:
        self.steps, self._before = 0, self._zero()
        self.warmup, self.rest = self._zero(), self._zero()

    @staticmethod
    def _zero() -> dict[str, float]:
        return dict.fromkeys(_NAMES, 0.0)

    def begin(self) -> None:
        """Read the counters before a step."""
        self._before = read_counters()

    def end(self, warmup: bool) -> None:
        """Add what changed since `begin` to the sum of the warm-up steps or of the others."""
        after, total = read_counters(), self.warmup if warmup else self.rest
        for name in _NAMES:
            total[name] += max(after[name] - self._before[name], 0.0)
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """The sums so far, for the run state of a checkpoint."""
        return {"steps": self.steps, "warmup": self.warmup, "rest": self.rest}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the sums of a checkpoint."""
        self.steps, self.warmup, self.rest = state["steps"], dict(state["warmup"]), dict(state["rest"])

    def figures(self, device: str) -> dict[str, Any] | None:
        """The entry `training.disturbance` of run.json: verdict, why, and the figures behind them. None without steps.

        Without the warm-up steps, unless there are no others. With several ranks on this machine, their own time is
        summed: they are no disturbance of each other.
        """
        total = self.rest if self.rest["seconds"] else self.warmup
        each = processes.all_gather(total)
        if not total["seconds"]:
            return None
        own = sum(rank["own"] for rank in each) * processes.local_count() / processes.count()
        return judged(total, own, self.steps, device, gpu_processes() if device == "cuda" else None)


def judged(
    total: Mapping[str, float], own: float, steps: int, device: str, others_on_gpu: int | None = None
) -> dict[str, Any]:
    """Return the verdict on the counters' changes over `steps` steps. own: CPU seconds of the run's ranks here."""
    seconds = total["seconds"]
    noise = _TICK * max(_TICKS_OF_NOISE, 2 * steps**0.5)
    figures = {
        "other_cores": max(total["machine"] - own - noise, 0.0) / seconds,
        "own_cores": own / seconds,
        "waited_share": total["waited"] / max(total["own"] + total["waited"], 1e-9) if _waiting_is_known() else None,
        "stolen_cores": max(total["stolen"] - noise, 0.0) / seconds,
        "pressure_share": total["pressure"] / seconds,
        "involuntary_switches_per_second": total["switches"] / seconds,
    }
    why = _why(figures, device, others_on_gpu)
    rounded = {name: value if value is None else round(value, 4) for name, value in figures.items()}
    verdict = "disturbed" if why else "quiet"
    return {"verdict": verdict, "why": why, **rounded, "other_processes_on_gpu": others_on_gpu}


def _why(figures: Mapping[str, float | None], device: str, others_on_gpu: int | None) -> str | None:
    cores, others, waited = _cores(), figures["other_cores"], figures["waited_share"]
    facts = processes.facts()
    if facts["jobs"] > 1 and device != "cuda":
        return f"{facts['jobs']} runs at a time shared the {'processor' if device == 'cpu' else 'GPU'}"
    if facts["device_jobs"] > 1:
        return f"{facts['device_jobs']} runs at a time shared the GPU"
    if others_on_gpu:
        return f"{others_on_gpu} other process{'es' if others_on_gpu > 1 else ''} used the GPU"
    if figures["stolen_cores"] > STOLEN:
        return f"the virtual machine's host gave {figures['stolen_cores']:.2f} of its CPU cores to others"
    if waited is None:
        taken = others - max(cores - figures["own_cores"], 0.0) if device == "cpu" else 0.0
        return f"other processes used {others:.1f} of {cores} CPU cores" if taken > OTHERS else None
    if waited > WAITED and _threads() <= cores:  # with more threads than cores they wait for each other
        return f"its threads waited {100 * waited:.2g} % of their time for a CPU core"
    return None


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads() -> int:
    """Threads that compute on this machine in all ranks of the run."""
    import torch

    return torch.get_num_threads() * processes.local_count()


def _waiting_is_known() -> bool:
    return Path("/proc/self/schedstat").exists()


def read_counters() -> dict[str, float]:
    """Seconds since some fixed time: of the clock, of this process's CPU time, and of the machine's.

    own: with its child processes that have ended, and the data loader's. machine: busy in all processes. stolen: taken
    by a virtual machine's host. waited: by this process's threads, runnable, for a core. pressure: in which any process
    waited for a core. switches: how often a thread of this process lost its core.
    """
    machine, stolen = _machine_seconds()
    children, running = os.times(), map(_cpu_seconds, multiprocessing.active_children())
    return {
        "seconds": time.perf_counter(),
        "own": time.process_time() + children.children_user + children.children_system + sum(running),
        "machine": machine,
        "stolen": stolen,
        "waited": _waited_seconds(),
        "pressure": _pressure_seconds(),
        "switches": float(resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw),
    }


def _machine_seconds() -> tuple[float, float]:
    """Busy and stolen CPU seconds of the whole machine."""
    try:
        with Path("/proc/stat").open() as file:
            user, nice, system, _, _, interrupts, soft, *more = (int(word) for word in file.readline().split()[1:])
        return (user + nice + system + interrupts + soft) * _TICK, more[0] * _TICK if more else 0.0
    except (OSError, ValueError):
        import psutil

        times = psutil.cpu_times()
        return times.user + times.system, 0.0


def _waited_seconds() -> float:
    """Seconds that the threads of this process waited for a core; those of a thread that has ended are lost."""
    total = 0
    try:
        for task in os.scandir("/proc/self/task"):
            with open(f"{task.path}/schedstat", encoding="ascii") as file:
                total += int(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return total / 1e9


def _pressure_seconds() -> float:
    try:
        with Path("/proc/pressure/cpu").open() as file:
            return int(file.readline().rpartition("total=")[2]) / 1e6
    except (OSError, ValueError):
        return 0.0


def _cpu_seconds(process: Any) -> float:
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK
    except (OSError, ValueError, IndexError):
        return 0.0


def gpu_processes() -> int | None:
    """How many processes beside the ranks of this run use this process's GPU; None where that can't be known."""
    import subprocess

    import torch

    number = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    command = ["nvidia-smi", f"--id=GPU-{number}", "--query-compute-apps=pid", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return max(len(found) - 1, 0) if found else None  # within a container none may be listed


def told_once(notes: Iterable[str]) -> list[str]:
    """The notes without all but the first that `busy_since` gave: each process of a comparison looks by itself."""
    kept: list[str] = []
    for note in notes:
        if not (note.startswith(_BUSY) and any(earlier.startswith(_BUSY) for earlier in kept)):
            kept.append(note)
    return kept


def busy_since(before: Mapping[str, float], least_seconds: float = 0.1) -> str | None:
    """Say what else has used the processor since `before` was read; None where nothing has.

    Sleeps until `least_seconds` have passed, since the machine's time is counted in steps of 10 ms.
    """
    time.sleep(max(before["seconds"] + least_seconds - time.perf_counter(), 0.0))
    after = read_counters()
    seconds = after["seconds"] - before["seconds"]
    busy, own = after["machine"] - before["machine"], after["own"] - before["own"]
    others = (busy - own - _TICKS_OF_NOISE * _TICK) / seconds
    if others <= OTHERS:
        return None
    return (
        f"{_BUSY}: other processes used {others:.1f} of its {os.cpu_count()} CPU cores. "
        "Steps that have to wait for a core are marked as disturbed, and no ratio of their times is shown."
    )
