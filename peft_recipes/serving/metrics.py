"""What /metrics shows Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from peft_recipes.serving.engine import Job

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 64)
_PREFIX = "peft_recipes_"


class Metrics:
    """The counters of one server, in a registry of its own. A model that is not served counts as "unknown"."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            f"{_PREFIX}requests", "Requests answered, by model and HTTP status.", ["model", "status"],
            registry=registry,
        )  # fmt: skip
        self._tokens = {
            kind: Counter(f"{_PREFIX}{kind}_tokens", f"Tokens of {what}.", ["model"], registry=registry)
            for kind, what in (("prompt", "prompts"), ("generated", "answers"))
        }
        self._seconds = {
            kind: Histogram(f"{_PREFIX}{kind}_seconds", f"Seconds from the request to {what}.", ["model"],
                            buckets=_SECONDS, registry=registry)
            for kind, what in (("request", "the end of its answer"), ("first_token", "its first token"))
        }  # fmt: skip
        self._rows = Histogram(f"{_PREFIX}batch_rows", "Rows of a step.", buckets=_ROWS, registry=registry)

    def watch(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Show the length of the queue, and how many requests are being answered."""
        names = (("waiting", waiting, "Requests in the queue."), ("running", running, "Requests being answered."))
        for name, read, what in names:
            Gauge(f"{_PREFIX}{name}_requests", what, registry=self._registry).set_function(read)

    def step(self, rows: int) -> None:
        """Count a step of the batch."""
        self._rows.observe(rows)

    def answered(self, model: str, status: int) -> None:
        """Count a request. status 499: the client left before its answer was complete."""
        self._requests.labels(model, str(status)).inc()

    def finished(self, job: Job) -> None:
        """Count the tokens and the time of a job, also of one that was cancelled."""
        model = job.served.name
        self._tokens["prompt"].labels(model).inc(len(job.prompt))
        self._tokens["generated"].labels(model).inc(job.generated)
        if job.first_token is not None:
            self._seconds["first_token"].labels(model).observe(job.first_token - job.started)
            self._seconds["request"].labels(model).observe(time.monotonic() - job.started)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)
