"""Step times, training memory and throughput of a run, as the report defines them."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from peft_recipes.distributed import processes
from peft_recipes.guards.checks import loss_is_finite
from peft_recipes.hardware.device import synchronise
from peft_recipes.measuring.disturbance import Disturbance
from peft_recipes.measuring.memory import PeakMemory

if TYPE_CHECKING:
    from peft_recipes.data.packing import Counts

WARMUP_STEPS = 3  # the first steps fill caches and are reported separately


class Stopwatch:
    """Seconds of named phases: `with watch("load"): ...` adds to watch.seconds["load"]."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add the phases of an earlier stopwatch, and its total as the entry "total"."""
        for name, earlier in seconds.items():
            if name == "total":
                self._start -= earlier
            else:
                self.seconds[name] = self.seconds.get(name, 0.0) + earlier

    def total(self) -> float:
        """Seconds since this stopwatch was made, and those of the earlier ones."""
        return time.perf_counter() - self._start


class StepMeter(TrainerCallback):
    """Time every optimiser step, the device synchronised at both ends; record peak memory and losses.

    A step's time includes waiting for its batches (`add_data_seconds`), which are collated before it begins.
    Evaluations between steps count in neither. on_step: called after every step with (step, of, loss). finite_loss:
    raise FloatingPointError for a loss that is not finite.
    """

    def __init__(
        self, device: str, on_step: Callable[[int, int, float | None], None] | None = None, finite_loss: bool = True
    ):
        self.device, self.memory, self.finite_loss = device, PeakMemory(device), finite_loss
        self.disturbance = Disturbance()
        self.steps: list[float] = []
        self.data_seconds = 0.0  # the part of the steps that is waiting for batches
        self.losses: list[list[float]] = []
        self.validation: list[dict[str, float]] = []
        self._on_step, self._start, self._waited = on_step, 0.0, 0.0
        self._release_memory = True  # after loading, and after each evaluation

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        synchronise(self.device)
        if self._release_memory:
            self.memory.release()
            self._release_memory = False
        self.memory.reset()
        self.disturbance.begin()
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        synchronise(self.device)
        self.steps.append(time.perf_counter() - self._start + self._waited)
        self.disturbance.end(warmup=len(self.steps) <= WARMUP_STEPS)
        self.data_seconds, self._waited = self.data_seconds + self._waited, 0.0
        self.memory.read()
        if self._on_step is not None:
            self._on_step(state.global_step, state.max_steps, self.losses[-1][1] if self.losses else None)

    def add_data_seconds(self, seconds: float) -> None:
        """Count the time that the next step waited for its batches."""
        self._waited += seconds

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._release_memory = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            if self.finite_loss:
                loss_is_finite(float(logs["loss"]), state.global_step)
            self.losses.append([state.global_step, float(logs["loss"])])
        elif any(key.startswith("eval_") for key in logs):
            point = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_")}
            self.validation.append({"step": state.global_step, **point})

    def state(self) -> dict[str, Any]:
        """The measurements so far, for the run state of a checkpoint."""
        return {
            "steps": self.steps,
            "data_seconds": self.data_seconds,
            "losses": self.losses,
            "validation": self.validation,
            "peak": self.memory.peak,
            "disturbance": self.disturbance.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the measurements of a checkpoint."""
        self.steps, self.losses, self.validation = state["steps"], state["losses"], state["validation"]
        self.data_seconds = state["data_seconds"]
        self.memory.peak = state["peak"] if processes.is_rank_zero() else 0  # rank 0's peak
        if processes.is_rank_zero():
            self.disturbance.restore(state["disturbance"])

    def figures(
        self, counts: list[Counts], first_pass: dict[str, Any] | None = None, tokens_each: list[int] | None = None
    ) -> dict[str, Any]:
        """The training figures of run.json. counts: of each step, in order; tokens_each: the tokens of each rank.

        seconds, tokens_per_second and examples_per_second leave out the 3 warm-up steps (unless there are no others);
        warmup_seconds holds them. computed_tokens is below tokens where a shared prefix is computed once;
        padding_share is padding among the computed positions. Both are None for images.
        first_pass: seconds and peak_memory_bytes of a pass before the first step (the features of a frozen backbone,
        reference log-probabilities). It is part of training, so it counts in seconds and throughput.

        With several ranks, counts are of all together; seconds are the slowest rank's, and give the throughput;
        peak_memory_bytes is the largest of one rank, peak_memory_bytes_sum the sum over ranks (their peaks may come at
        different times; pages that CPU processes share count in each); processes has the figures of each rank.
        """
        skip = WARMUP_STEPS if len(self.steps) > WARMUP_STEPS else 0
        before = first_pass or {"seconds": 0.0, "peak_memory_bytes": 0}
        each = processes.all_gather(
            {
                "seconds": sum(self.steps[skip:]) + before["seconds"],
                "peak_memory_bytes": max(self.memory.peak, before["peak_memory_bytes"]),
            }
        )
        for process, own in zip(each, tokens_each or [], strict=False):
            process["tokens"] = own or None
        seconds = max(process["seconds"] for process in each)
        tokens, computed, examples = ([getattr(c, n) for c in counts] for n in ("tokens", "computed", "examples"))

        def per_second(each: list[int]) -> float | None:
            return sum(each[skip:]) / seconds if any(each) and seconds else None

        return {
            "steps": len(self.steps),
            "seconds": seconds,
            "warmup_steps": skip,
            "warmup_seconds": sum(self.steps[:skip]),
            "data_seconds": self.data_seconds,
            "median_step_seconds": statistics.median(self.steps) if self.steps else None,
            "tokens": sum(tokens) or None,
            "computed_tokens": sum(computed) or None,
            "padding_share": sum(c.padding for c in counts) / sum(computed) if any(computed) else None,
            "examples": sum(examples),
            "tokens_per_second": per_second(tokens),
            "examples_per_second": per_second(examples),
            "first_pass_seconds": first_pass and first_pass["seconds"],
            "peak_memory_bytes": max(process["peak_memory_bytes"] for process in each),
            "peak_memory_bytes_sum": sum(process["peak_memory_bytes"] for process in each),
            "processes": each,
            "peak_memory_method": self.memory.method,
            "disturbance": self.disturbance.figures(self.device),
            "losses": self.losses,
            "validation": self.validation,
        }
