"""Batches that are halved until they fit in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def halve_until_it_fits(run: Callable[[int], Result], batch_size: int) -> Result:
    """Call `run(batch_size)`, again with half of it each time a batch does not fit in memory. It continues its work.

    Not Accelerate's `find_executable_batch_size`, which collects garbage before the first try: 0.06 to 0.5 s with the
    libraries' objects in memory, for each of the few prompts of a run.
    """
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    while True:
        try:
            return run(batch_size)
        except RuntimeError as error:
            if batch_size == 1 or not should_reduce_batch_size(error):
                raise
        batch_size //= 2
        clear_device_cache(garbage_collection=True)  # here the exception no longer keeps the batch alive
