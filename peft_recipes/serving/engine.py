"""The thread that answers: it takes waiting requests into lanes between two tokens, and lets finished ones leave.

An answer's place in the batch is free as soon as it ends, is cancelled or runs out of time, so a long answer holds one
place and the others go on around it.
"""

from __future__ import annotations

import collections
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from peft_recipes.errors import says_out_of_memory
from peft_recipes.serving.errors import ApiError
from peft_recipes.serving.lane import CHUNK, Lane, Row
from peft_recipes.serving.models import Models, Served
from peft_recipes.serving.sampling import Sampler, Sampling
from peft_recipes.serving.text import TextStream

# Tokens of prompts that are read between two steps of the batch.
_PROMPT_TOKENS = 2 * CHUNK


@dataclass(frozen=True)
class Limits:
    """batch_size: answers at a time. cache_tokens: positions in the cache of a batch, which bounds its memory.

    queue: requests that wait at most. timeout: seconds for a request, the waiting included.
    """

    batch_size: int = 16
    cache_tokens: int = 32_768
    queue: int = 64
    max_tokens: int = 1024
    timeout: float = 300.0


@dataclass(eq=False)
class Job:
    """A request that is answered. on_event is called in the engine's thread, with one of:

    ("text", a piece of the answer), ("done", "stop" or "length"), ("error", an ApiError).
    """

    served: Served
    prompt: list[int]
    sampling: Sampling
    on_event: Callable[[str, Any], None]
    generated: int = 0
    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.row: Row = self.served.row(self.prompt)
        self._sampler = Sampler(self.sampling, self.prompt)
        self._text = TextStream(self.served.tokenizer, self.sampling.stop)

    def take(self, logits: torch.Tensor) -> bool:
        """Choose the next token and pass its text on. Returns whether the answer has ended."""
        token = self.row.token = self._sampler.next(logits)
        self.generated += 1
        if self.first_token is None:
            self.first_token = time.monotonic()
        ended = token in self.served.ends
        text = "" if ended else self._text.push(token)
        cut = self.generated >= self.sampling.max_tokens
        if ended or cut:
            text += self._text.finish()
        if text:
            self.on_event("text", text)
        if ended or cut or self._text.stopped:
            self.on_event("done", "stop" if ended or self._text.stopped else "length")
            return True
        return False


class Engine:
    """Answers jobs in its thread. on_step: called with the number of rows of each step."""

    def __init__(self, models: Models, limits: Limits, on_step: Callable[[int], None] = lambda rows: None):
        self.models, self.limits, self._on_step = models, limits, on_step
        self._changed = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._reading: list[Job] = []  # in a lane's place, but the prompt is not read yet
        self._running: dict[Row, Job] = {}
        self._draining = self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that have no place yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return len(self._reading) + len(self._running)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to answer."""
        return not (self._waiting or self._reading or self._running)

    @property
    def alive(self) -> bool:
        """Whether the thread runs and takes requests."""
        return self._thread.is_alive() and not self._draining

    def submit(self, job: Job) -> None:
        """Put a job into the queue. Raises ApiError: 429 if the queue is full, 503 while the server ends."""
        with self._changed:
            if self._draining or not self._thread.is_alive():
                raise ApiError(503, "The server is shutting down.", code="shutting_down")
            if len(self._waiting) >= self.limits.queue:
                waiting = f"{len(self._waiting)} requests wait already; try again later."
                raise ApiError(429, waiting, code="queue_full", retry_after=1 + len(self._waiting) // 16)
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Give a job's place to another: nobody reads its answer any more."""
        job.cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            self._changed.notify()

    def drain(self) -> None:
        """Take no more requests; those that are here are answered."""
        self._draining = True

    def stop(self, seconds: float = 10.0) -> None:
        """End the thread; what is not answered yet ends with a 503."""
        with self._changed:
            self._draining = self._ended = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._end_cancelled()
                self._admit()
                self._read_prompts()
                for lane in self.models.lanes:
                    if lane.rows:
                        self._guarded(lane, self._step)
        finally:
            self._draining = True
            error = ApiError(503, "The server is shutting down.", code="shutting_down")
            with self._changed:
                left = [*self._waiting, *self._reading, *self._running.values()]
                self._waiting.clear()
            for job in left:
                job.on_event("error", error)
            self._reading, self._running = [], {}

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not self._ended and self.idle:
                self._changed.wait()
        return not self._ended

    def _end_cancelled(self) -> None:
        """Let jobs leave that are cancelled or out of time."""
        too_old = time.monotonic() - self.limits.timeout
        with self._changed:
            gone = [job for job in self._all() if job.cancelled or job.started < too_old]
            for job in gone:
                if job in self._waiting:
                    self._waiting.remove(job)
        self._remove(gone)
        late = ApiError(504, f"The answer was not complete after {self.limits.timeout:g} seconds.", code="timeout")
        for job in gone:
            if not job.cancelled:
                job.on_event("error", late)

    def _all(self) -> Iterator[Job]:
        yield from [*self._waiting, *self._reading, *self._running.values()]

    def _remove(self, jobs: list[Job]) -> None:
        self._reading = [job for job in self._reading if job not in jobs]
        for job in jobs:
            if self._running.pop(job.row, None) is not None:
                job.served.lane.leave([job.row])

    def _admit(self) -> None:
        """Give places to waiting jobs, first come, first served within a lane: a full lane does not block another."""
        full: set[Lane] = set()
        with self._changed:
            for job in list(self._waiting):
                if job.served.lane not in full and self._fits(job):
                    self._waiting.remove(job)
                    self._reading.append(job)
                else:
                    full.add(job.served.lane)

    def _fits(self, job: Job) -> bool:
        if self.running >= self.limits.batch_size:
            return False
        lane, tokens = job.served.lane, len(job.prompt) + job.sampling.max_tokens
        beside = [j for j in (*self._reading, *self._running.values()) if j.served.lane is lane]
        if lane.exclusive or not beside:
            return not beside
        longest = max([tokens, *(len(j.prompt) + j.sampling.max_tokens for j in beside)])
        return (len(beside) + 1) * longest <= self.limits.cache_tokens

    def _read_prompts(self) -> None:
        """Read prompts, a chunk at a time, up to what may keep the running answers waiting; at least one chunk."""
        budget = _PROMPT_TOKENS
        while self._reading and budget > 0:
            job = self._reading[0]
            budget -= min(len(job.prompt) - job.row.read, CHUNK)
            self._guarded(job.served.lane, self._read_chunk, job)

    def _read_chunk(self, lane: Lane, job: Job) -> None:
        logits = lane.read_prompt(job.row)
        if logits is None:
            self._reading.append(self._reading.pop(0))  # the next one's turn, after a chunk of a long prompt
            return
        self._reading.remove(job)
        if not _take(job, logits):
            lane.join(job.row)
            self._running[job.row] = job

    def _step(self, lane: Lane) -> None:
        self._on_step(len(lane.rows))
        rows = list(lane.rows)
        ended = [row for row, logits in zip(rows, lane.step(), strict=True) if _take(self._running[row], logits)]
        for row in ended:
            del self._running[row]
        lane.leave(ended)

    def _guarded(self, lane: Lane, action: Callable[..., None], *args: Any) -> None:
        """Run an action on a lane. If it fails, its requests end with a 500 and the others go on."""
        try:
            action(lane, *args)
        except Exception as error:
            out_of_memory = says_out_of_memory(str(error)) or isinstance(error, MemoryError)
            reason = "Memory ran out." if out_of_memory else "The model failed."
            print(f"{reason} {type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr, flush=True)
            failed = [job for job in (*self._reading, *self._running.values()) if job.served.lane is lane]
            self._reading = [job for job in self._reading if job not in failed]
            for job in failed:
                self._running.pop(job.row, None)
            lane.clear()
            for job in failed:
                job.on_event("error", ApiError(500, f"{reason} See the server's log.", code="generation_failed"))


def _take(job: Job, logits: torch.Tensor) -> bool:
    """Job.take, where an error ends this answer alone."""
    try:
        return job.take(logits)
    except Exception as error:
        print(f"An answer failed. {type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        job.on_event("error", ApiError(500, "The answer failed. See the server's log.", code="generation_failed"))
        return True
