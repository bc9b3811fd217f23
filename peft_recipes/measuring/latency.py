"""Latency at batch size 1."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from peft_recipes.hardware.device import synchronise


def median_milliseconds(call: Callable[[Any], Any], inputs: list[Any], device: str, budget: float = 2.0) -> float:
    """The median time of `call` on one input, in milliseconds, after a warm-up of two calls.

    Times at least five inputs, and further ones while `budget` seconds last: a large model on a CPU is slow.
    """
    for value in inputs[:2]:
        call(value)
    times: list[float] = []
    for value in inputs:
        if len(times) >= 5 and sum(times) > budget:
            break
        synchronise(device)
        start = time.perf_counter()
        call(value)
        synchronise(device)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)
