"""The driver's pool: processes are submitted one at a time, run on any node, and are reported as they end.

A process that is lost with its node is started again, from the last checkpoint that can be reached: on a shared disk
its own; else the last one that its node has sent. What a lost start still sends is ignored.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tarfile import TarError
from typing import Any

from peft_recipes.cluster import node
from peft_recipes.cluster.attempts import Attempts
from peft_recipes.cluster.node import Driver, Sent
from peft_recipes.cluster.nodes import Lost, Nodes
from peft_recipes.cluster.packing import digest, pack, receive, receive_parts
from peft_recipes.cluster.work import Outcome, Work
from peft_recipes.errors import RecipeError, Terminated
from peft_recipes.hardware.environment import code_version
from peft_recipes.runs.subprocesses import GRACE_SECONDS

OnEvent = Callable[[str, Any], None]
_POLL_SECONDS = 0.5
_UNPLACED_SECONDS = 60


@dataclass
class _Submitted:
    """A process between `submit` and its end. number: of its current start, over all processes."""

    work: Work
    on_event: OnEvent
    attempts: Attempts = field(default_factory=Attempts)
    number: int = 0
    task: Any = None
    shared: bool | None = None  # whether the node of the current start sees the driver's disk


class Pool:
    """Runs processes on the nodes of a cluster. Leaving its `with` block by an error ends them all.

    The first interruption lets them write a checkpoint; a second one ends them at once.
    """

    def __init__(self, nodes: Nodes):
        self.nodes, self._running, self._numbers = nodes, {}, itertools.count(1)
        self._content, self._marks = secrets.token_hex(8), {}
        self._sent: dict[Path | str, Any] = {}  # what the object store holds for nodes without the driver's disk
        self._sending, self._unplaced_since = False, time.monotonic()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is not None:
                self._end_all()
        finally:
            for mark in self._marks.values():
                mark.unlink(missing_ok=True)
            if self._sending:
                self.nodes.clean(self._content)

    def submit(self, work: Work, on_event: OnEvent = lambda kind, content: None) -> None:
        """Start a process on any node, as soon as one has room.

        on_event: called from `finished` with "started" (facts of the node), "line" (of the log), "lost" (a reason),
        "waiting" (twice a second), "unplaced" (no process has been placed for a minute; to one of them).
        """
        submitted = _Submitted(work, on_event)
        submitted.attempts.start()
        self._start(submitted)

    def finished(self) -> Iterator[tuple[Work, Outcome] | None]:
        """Yield each process as it ends, until none is left; more may be submitted meanwhile.

        None is yielded while none has ended, about twice a second.

        Raises RecipeError where a node can't run them.
        """
        while self._running:
            by_task = {one.task: one for one in self._running.values()}
            ended = self.nodes.wait(list(by_task), _POLL_SECONDS)
            self._take_events()
            if not ended:
                yield None
            for one in [by_task[task] for task in ended]:
                if one.number not in self._running:  # cancelled while an earlier one was reported
                    continue
                if (outcome := self._conclude(one)) is not None:
                    del self._running[one.number]
                    yield one.work, outcome

    def cancel(self, work: Work, *, keep: bool = False) -> None:
        """End a process that is no longer needed; it is not reported. keep: wait for its last checkpoint."""
        for number, one in list(self._running.items()):
            if one.work is work:
                self.nodes.cancel(one.task, force=False)
                if keep and one.shared is not None:  # it has started
                    self._await([one])
                del self._running[number]

    def _start(self, one: _Submitted) -> None:
        self._running.pop(one.number, None)
        one.number, one.shared = next(self._numbers), None
        one.task = self.nodes.start(one.work, one.number, self._to_send(one.work), self._driver(one.work))
        self._running[one.number] = one

    def _driver(self, work: Work) -> Driver:
        if work.base not in self._marks:
            folder = work.inputs[0].parent if work.inputs else work.base
            mark = folder / f".driver-{self._content}"
            mark.write_text(self._content, encoding="utf-8")
            self._marks[work.base] = mark
        return Driver(self._marks[work.base], self._content, os.getcwd(), code_version(), node.versions())

    def _to_send(self, work: Work) -> Sent | None:
        """What a node without the driver's disk is sent; None until one has asked for it."""
        if not self._sending or not work.module:
            return None
        inputs = tuple(self._stored(path) for path in work.inputs)
        needed = {one.place: (self._digest(one.path), self._stored(one.path)) for one in work.needed}
        return Sent(inputs, needed, self._own(work))

    def _own(self, work: Work) -> list[Any] | None:
        if not (work.folder / work.checkpoints).is_dir():
            return None
        names = [name for name in (work.checkpoints, work.log) if (work.folder / name).exists()]
        return self.nodes.put(pack(work.folder, names))

    def _stored(self, path: Path) -> list[Any]:
        if path not in self._sent:
            self._sent[path] = self.nodes.put(pack(path.parent, [path.name]))
        return self._sent[path]

    def _digest(self, path: Path) -> str:
        key = f"digest {path}"
        if key not in self._sent:
            self._sent[key] = digest(path)
        return self._sent[key]

    def _take_events(self) -> None:
        for number, kind, content in self.nodes.events():
            one = self._running.get(number)
            if one is None:  # of a start that was lost, or has ended
                continue
            if kind == "checkpoint":
                self._keep_checkpoint(one.work, content)
                continue
            if kind == "started":
                one.shared = content["shared"]
            one.on_event(kind, content)
        for one in self._running.values():
            if one.shared is not None:
                one.on_event("waiting", None)
        self._notice_missing_room()

    def _notice_missing_room(self) -> None:
        """Tell, once, that no process has been placed for a while: no node may have what they ask for."""
        if any(one.shared is not None for one in self._running.values()):
            self._unplaced_since = None
        elif self._unplaced_since is None:
            self._unplaced_since = time.monotonic()
        elif time.monotonic() - self._unplaced_since > _UNPLACED_SECONDS:
            self._unplaced_since = float("inf")
            for one in list(self._running.values())[:1]:
                one.on_event("unplaced", None)

    def _keep_checkpoint(self, work: Work, content: dict[str, Any]) -> None:
        """Store a checkpoint that a node has sent, in place of the earlier ones."""
        folder = work.folder / work.checkpoints
        earlier = [path for path in folder.glob("*") if f"{work.checkpoints}/{path.name}" not in content["names"]]
        with contextlib.suppress(Lost, OSError, TarError):
            receive_parts(self.nodes.fetch(content["pieces"]), work.folder, content["names"], earlier)

    def _conclude(self, one: _Submitted) -> Outcome | None:
        """How a process ended; None where it is started again."""
        try:
            result = self.nodes.result(one.task)
            if "refused" in result:
                raise RecipeError(result["refused"])
            if "send" in result:
                self._sending = True
                self._start(one)
                return None
            if "pieces" in result:
                receive(self.nodes.fetch(result["pieces"]), one.work.folder, last=one.work.result)
            return Outcome(result["code"], attempts=one.attempts.number)
        except Lost as lost:
            if one.attempts.lost(str(lost)):
                one.on_event("lost", str(lost))
                one.attempts.start()
                self._start(one)
                return None
            return Outcome(None, one.attempts.summary, lost.out_of_memory, one.attempts.number)

    def _end_all(self) -> None:
        """Interrupt all processes and keep the checkpoints that they write; end them at once when asked again."""
        running = list(self._running.values())
        try:
            for one in running:
                self.nodes.cancel(one.task, force=False)
            running = self._await(running)
        except (KeyboardInterrupt, Terminated):
            pass
        finally:
            for one in running:
                self.nodes.cancel(one.task, force=True)
            self._running.clear()

    def _await(self, ending: list[_Submitted]) -> list[_Submitted]:
        """Wait until these have ended, and take the checkpoints that they send; return those that have not."""
        deadline = time.monotonic() + GRACE_SECONDS
        while ending and time.monotonic() < deadline:
            ended = set(self.nodes.wait([one.task for one in ending], _POLL_SECONDS))
            self._take_events()
            ending = [one for one in ending if one.task not in ended]
        self._take_events()
        return ending
