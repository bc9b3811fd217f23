"""Several runs at a time on one machine: how many, and which GPU and how many threads each gets."""

from __future__ import annotations

import math
import os

from peft_recipes.distributed.processes import DEVICE_JOBS, JOBS
from peft_recipes.errors import RecipeError
from peft_recipes.hardware.device import cpu_cores, device_of, visible_gpus

AUTO = "auto"

Jobs = int | str  # a number, or AUTO


def read_jobs(text: str) -> Jobs:
    """Parse the value of --jobs: a whole number of 1 or more, or "auto". Raises RecipeError."""
    return check_jobs(AUTO if text.strip().lower() == AUTO else int(text) if text.strip().isdigit() else text)


def check_jobs(jobs: Jobs) -> Jobs:
    """Return `jobs`; raise RecipeError for anything but a whole number of 1 or more, or "auto"."""
    if jobs != AUTO and (isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1):
        raise RecipeError(f"--jobs {jobs}: expected a whole number of 1 or more, or auto.")
    return jobs


def job_environments(jobs: int, device: str | None = None) -> list[dict[str, str]]:
    """The environment variables of each of `jobs` runs at a time: its GPU, and its share of the CPU threads.

    Each run has a GPU of its own where there are enough; else the GPUs are shared evenly. device: that the runs are
    trained on; None for the one that `hardware.device.device_of` finds.
    """
    if jobs == 1:
        return [{}]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(cpu_cores() // jobs, 1)))
    gpus = visible_gpus() if (device or device_of()) == "cuda" else []
    if not gpus:
        return [{JOBS: str(jobs), "OMP_NUM_THREADS": threads} for _ in range(jobs)]
    sharing = math.ceil(jobs / len(gpus))
    common = {DEVICE_JOBS: str(sharing), "OMP_NUM_THREADS": threads} if sharing > 1 else {}
    return [{JOBS: str(jobs), **common, "CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} for job in range(jobs)]
