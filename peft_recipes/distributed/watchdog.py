"""Turns a hang into an error: notices that every rank waits in a collective, and says which and where.

A thread of each rank samples the stack of the rank's main thread and publishes it in the process group's store. Ranks
that call different collectives wait for each other for ever: once all have waited longer than the timeout, the hang is
recorded as the run's failure, the other ranks exit, and rank 0, whose connections close, raises it. A rank that
computes, loads or saves does not wait, so rank 0 may evaluate and verify alone for as long as it needs.

Not noticed here: ranks that all wait within `backward` (a slow step looks the same) or for a GPU's kernels. The
timeout of Accelerate's process group ends these after `ddp_timeout` (30 minutes).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from peft_recipes.errors import RecipeError

TIMEOUT = "PEFT_RECIPES_HANG_SECONDS"  # environment variable: how long all ranks may wait at the same time
_DEFAULT = 600.0  # no collective of this package takes minutes
_INTERVAL = 5.0  # seconds between two samples
_SILENCE = 60.0  # seconds; a busy machine, or an import that holds the GIL, silences a rank for less
_GRACE = 20.0  # seconds for the ranks to end by themselves
_LEAVE = 5.0  # seconds for the thread to end with its process
_HANG = "RanksHang"
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_DISTRIBUTED = os.sep + os.path.join("torch", "distributed") + os.sep
_TORCH = os.sep + "torch" + os.sep


class RanksHang(RuntimeError):
    """The ranks of the run wait for each other in different operations."""


def timeout() -> float:
    """The seconds that all ranks may wait at the same time: $PEFT_RECIPES_HANG_SECONDS, or 600."""
    text = os.environ.get(TIMEOUT, str(_DEFAULT))
    with contextlib.suppress(ValueError):
        if (seconds := float(text)) > 0:
            return seconds
    raise RecipeError(f"{TIMEOUT}={text}: expected a number of seconds above 0; the default is {_DEFAULT:.0f}.")


def hang_of(failure: dict[str, Any] | None) -> RanksHang | None:
    """The error that a run's recorded failure stands for, where that is a hang."""
    return RanksHang(failure["error"]) if failure and failure["type"] == _HANG else None


def position(frame: FrameType) -> tuple[str, bool] | None:
    """The collective in which a thread with this innermost frame waits, and where it was called; None if it computes.

    The flag says whether it surely waits: `backward` waits for the other ranks only at its end.
    """
    inner = frame.f_code
    backward = inner.co_name == "_engine_run_backward"
    if not backward and _DISTRIBUTED not in inner.co_filename:
        return None
    operation = inner.co_name
    caller: FrameType | None = frame
    while caller is not None and _TORCH in caller.f_code.co_filename:
        # Past the wrappers, to the function that was called: `all_reduce`, not `wait`.
        if _DISTRIBUTED in caller.f_code.co_filename and caller.f_code.co_name != "wrapper":
            operation = caller.f_code.co_name
        caller = caller.f_back
    while caller is not None and caller.f_code.co_filename.startswith(str(Path(__file__).parent) + os.sep):
        operation, caller = caller.f_code.co_name, caller.f_back  # our own collective
    while caller is not None and caller.f_back is not None and _is_library(caller):
        caller = caller.f_back  # past Accelerate's and Transformers' own frames
    where = f" ({_place(caller)})" if caller is not None else ""
    return f"{'backward' if backward else operation}{where}", not backward


def _place(frame: FrameType) -> str:
    path = frame.f_code.co_filename
    path = path.removeprefix(_PACKAGE) if path.startswith(_PACKAGE) else Path(path).name
    return f"{path}:{frame.f_lineno}, in {frame.f_code.co_name}"


def _is_library(frame: FrameType) -> bool:
    path = frame.f_code.co_filename
    return "site-packages" in path and not path.startswith(_PACKAGE)


def _identity(frame: FrameType | None) -> tuple[tuple[int, int], ...]:
    """What changes when a thread goes on: the frames of its stack and their current instructions."""
    found = []
    while frame is not None:
        found.append((id(frame), frame.f_lasti))
        frame = frame.f_back
    return tuple(found)


def verdict(states: Sequence[dict[str, Any]], silent: Sequence[float], limit: float) -> str | None:
    """The message of a hang; None where the ranks make progress.

    states: for each rank `waited` (seconds in the same call), `operation` and `sure`; empty for a rank that computes.
    silent: seconds since each rank was last heard of.
    """
    dead = [number for number, seconds in enumerate(silent) if seconds >= max(limit, _SILENCE)]
    if any(seconds >= limit / 2 for number, seconds in enumerate(silent) if number not in dead):
        return None  # what is known of that rank is too old
    living = [(number, state) for number, state in enumerate(states) if number not in dead]
    if not living or any(state.get("waited", 0) < limit for _, state in living):
        return None
    if not any(state["sure"] for _, state in living):
        return None
    parts = [f"process {number} for {state['waited']:.0f} s in {state['operation']}" for number, state in living]
    parts += [f"nothing was heard of process {number} for {silent[number]:.0f} s" for number in dead]
    return (f"The processes of the run wait for each other: {'; '.join(parts)}. Each has to call the same operations "
            f"in the same order. (All waited longer than {TIMEOUT}={limit:g}.)")  # fmt: skip


class Watchdog:
    """The watching thread of one rank; `start` it once the process group exists.

    store: the process group's; key: where the failure of the current run is recorded. on_hang: called on rank 0 before
    the other ranks exit, whose end makes the launcher send it SIGTERM.
    """

    def __init__(self, store: Any, rank: int, count: int, key: Callable[[], str]) -> None:
        self.on_hang: Callable[[], None] = lambda: None
        self._store, self._rank, self._count, self._key = store, rank, count, key
        self._limit, self._thread = timeout(), threading.get_ident()
        self._since, self._last = time.monotonic(), ()
        self._heard: dict[int, tuple[int, float]] = {}
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start watching the calling thread, until the process exits."""
        self._watcher.start()
        # A thread that calls the store while Python exits aborts the process: it is ended within C++ code.
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the watching thread."""
        self._stop.set()
        self._watcher.join(_LEAVE)

    def _watch(self) -> None:
        beat = 0
        try:
            while not self._stop.wait(min(_INTERVAL, self._limit / 4)):
                beat += 1
                if self._hangs(beat):
                    return self._end()
        except Exception:  # the store is gone with the process that served it, which ends this one too
            return None

    def _hangs(self, beat: int) -> bool:
        self._store.set(self._name(self._rank), json.dumps({"beat": beat} | self._sample()))
        if self._store.check([self._key()]):
            return hang_of(self._failure()) is not None
        states, silent = [], []
        for number in range(self._count):
            state = self._read(self._name(number)) or {"beat": 0}
            now = time.monotonic()
            if self._heard.get(number, (-1, 0.0))[0] != state["beat"]:
                self._heard[number] = (state["beat"], now)
            states.append(state)
            silent.append(now - self._heard[number][1])
        message = verdict(states, silent, self._limit)
        if message is None:
            return False
        failure = {"process": 0, "type": _HANG, "error": message}
        return hang_of(json.loads(self._store.compare_set(self._key(), "", json.dumps(failure)))) is not None

    def _sample(self) -> dict[str, Any]:
        frame, now = sys._current_frames().get(self._thread), time.monotonic()
        if (identity := _identity(frame)) != self._last:
            self._last, self._since = identity, now
        if frame is None or (found := position(frame)) is None:
            return {}
        return {"waited": now - self._since, "operation": found[0], "sure": found[1]}

    def _end(self) -> None:
        """End this rank: rank 0 by the error that its closed connections raise, or at last at once."""
        stack = "".join(traceback.format_stack(sys._current_frames().get(self._thread)))
        print(f"Process {self._rank} waits here:\n{stack}", file=sys.stderr, flush=True)
        acknowledged = self._key() + "/acknowledged"
        if self._rank == 0:
            self.on_hang()
            self._store.set(acknowledged, "1")
        until, before = time.monotonic() + _GRACE, self._last
        while time.monotonic() < until:
            if self._stop.is_set():
                return  # the process exits by itself
            if self._rank and self._store.check([acknowledged]):
                break
            if self._rank == 0 and _identity(sys._current_frames().get(self._thread)) != before:
                return  # it raises the hang
            time.sleep(0.05)
        else:
            print(f"The run failed: {(self._failure() or {}).get('error')}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)

    def _failure(self) -> dict[str, Any] | None:
        return self._read(self._key())

    def _read(self, key: str) -> dict[str, Any] | None:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _name(self, number: int) -> str:
        return f"peft_recipes/watchdog/{number}"
