"""Threads that take turns and meet: several runs in one process, one at a time, each with random numbers of its own.

A run is written as if it had its process to itself: it seeds, draws and reads global states. Here only the thread that
holds the turn runs, and what is global in a run is exchanged whenever the turn passes on. The turn passes on where a
run waits for the others, and nowhere else.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState

from peft_recipes.hardware.device import random_state, set_random_state


class MeetingFailed(BaseException):
    """What all members computed together failed, so none of them can go on. Not an Exception: no run has failed."""


@dataclass
class ProcessState:
    """What is global in a process and belongs to one run: its random states, and Accelerate's accumulation flag."""

    device: str = "cpu"
    states: tuple[Any, ...] = ()

    def store(self) -> None:
        """Take the states of the process."""
        device, synchronised = random_state(self.device), GradientState().sync_gradients
        self.states = (random.getstate(), np.random.get_state(), torch.get_rng_state(), device, synchronised)

    def load(self) -> None:
        """Give the process these states."""
        python, numpy, host, device, synchronised = self.states
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(host)
        set_random_state(self.device, device)
        GradientState().sync_gradients = synchronised

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """Draw from these states within the block."""
        outer = ProcessState(self.device)
        outer.store()
        self.load()
        try:
            yield
        finally:
            self.store()
            outer.load()


@dataclass
class _Request:
    """What a member waits with. kind: of the requests that are answered together."""

    kind: int
    value: Any
    answered: bool = False
    answer: Any = None


@dataclass
class Lockstep:
    """Members that meet: a request is answered when every member has one, those of the lowest kind first.

    compute: takes the kind and the values of the requests by member; returns their answers.
    """

    compute: Callable[[int, dict[Any, Any]], dict[Any, Any]]
    states: dict[Any, ProcessState] = field(default_factory=dict)
    failure: BaseException | None = None
    _turn: threading.Condition = field(default_factory=threading.Condition)
    _members: set[Any] = field(default_factory=set)
    _requests: dict[Any, _Request] = field(default_factory=dict)

    def add(self, member: Any, device: str = "cpu") -> None:
        """Let the others wait for this member from now on."""
        self._members.add(member)
        self.states[member] = ProcessState(device)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Run this thread within the block, and no other."""
        with self._turn:
            yield

    def leave(self, member: Any) -> None:
        """Let the others wait no longer for a member that holds the turn. It may go on, by itself."""
        self._members.discard(member)
        self._turn.notify_all()

    def meet(self, member: Any, kind: int, value: Any = None) -> Any:
        """Wait with a request until all members have one, and return the answer. Raises MeetingFailed."""
        request = self._requests[member] = _Request(kind, value)
        own = self.states[member]
        own.store()
        while not request.answered:
            if self.failure is None and self._members <= set(self._requests):
                self._answer()
                self._turn.notify_all()
            elif self.failure is None:
                self._turn.wait()
            if self.failure is not None:
                raise MeetingFailed(str(self.failure)) from self.failure
        own.load()
        return request.answer

    def _answer(self) -> None:
        kind = min(request.kind for request in self._requests.values())
        met = {member: request for member, request in self._requests.items() if request.kind == kind}
        try:
            answers = self.compute(kind, {member: request.value for member, request in met.items()})
        except Exception as error:
            self.failure = error
            return
        for member, request in met.items():
            request.answer, request.answered = answers.get(member), True
            del self._requests[member]
