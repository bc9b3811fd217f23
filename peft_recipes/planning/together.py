"""Memory of several runs at a time on one device: which of them fit next to each other, by their estimates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from peft_recipes.distributed.jobs import AUTO, Jobs
from peft_recipes.errors import RecipeError
from peft_recipes.hardware import environment
from peft_recipes.hardware.device import cpu_cores, visible_gpus

# Bytes of a GPU that each process takes beside its tensors: the CUDA context and the kernels loaded into it. A context
# of torch 2.10 with CUDA 13 took 426 MiB on an RTX 6000 Ada (unslothai/unsloth-zoo#1053); "around 400MB" is expected
# since CUDA 11.7 loads kernels lazily (pytorch/pytorch#109888). The rest is for the kernels loaded later.
CUDA_CONTEXT = 600 * 10**6
# Torch's allocator holds blocks that it does not use, which other processes can't have: this share of what is in use.
_HELD = 0.1


class Room:
    """The memory of one device of a kind, for runs at a time. needs: their estimates in bytes, without a context."""

    def __init__(self, device: str):
        self.device, self.available = device, environment.device_memory_bytes(device)
        self.devices = len(visible_gpus()) or 1 if device == "cuda" else 1

    def taken(self, needs: Iterable[int]) -> int:
        """Bytes of the device that runs at a time take, by their estimates."""
        if self.device == "cpu":
            return sum(needs)
        context = CUDA_CONTEXT if self.device == "cuda" else 0
        return sum(int((1 + _HELD) * need) + context for need in needs)

    def fits(self, need: int, running: Sequence[int]) -> bool:
        """Whether a run fits next to those running on the same device. Alone it always does: its own plan was made."""
        return not running or not self.available or self.taken([need, *running]) < self.available

    def most(self, needs: Sequence[int]) -> int:
        """The largest number of runs at a time that fit, whichever they are; on several devices, spread evenly."""
        ordered = sorted(needs, reverse=True)
        each = next((n for n in range(1, len(ordered)) if not self.fits(ordered[n], ordered[:n])), len(ordered))
        return max(min(each * self.devices, len(ordered)), 1)


def jobs_for(jobs: Jobs, needs: Sequence[int], device: str) -> int:
    """How many of these runs are trained at a time: `jobs`, or for AUTO as many as fit, at most one for each CPU core.

    On a GPU a run keeps about one core busy with starting kernels; on a CPU it is given one.
    """
    return min(Room(device).most(needs), max(cpu_cores(), 1)) if jobs == AUTO else int(jobs)


def check_together(jobs: int, needs: Sequence[int], device: str) -> None:
    """Raise RecipeError where so many of the runs at a time may not fit; it names the largest number that does."""
    room = Room(device)
    if min(jobs, len(needs)) <= (most := room.most(needs)):
        return
    largest = sorted(needs, reverse=True)[: math.ceil(min(jobs, len(needs)) / room.devices)]
    raise RecipeError(
        f"--jobs {jobs}: {len(largest)} runs at a time need up to {room.taken(largest) / 1e9:.1f} GB of one "
        f"{'GPU' if device != 'cpu' else 'machine'}, which has {room.available / 1e9:.1f} GB. At most: --jobs {most}. "
        "To try all the same: --set skip_checks=[memory]."
    )
