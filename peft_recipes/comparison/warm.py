"""A worker process that trains one chunk after another, as the comparison's process sees it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_recipes.comparison.orders import Order
from peft_recipes.comparison.processes import start
from peft_recipes.comparison.worker import ORDERS, needs_bitsandbytes
from peft_recipes.hardware.environment import free_memory_bytes


def takes_turns(order: Order) -> bool:
    """Whether the order may be given to a process that trains others as well.

    A launched run has several processes. A quantised base is not kept, and bitsandbytes is imported only where needed.
    """
    return order.turns and order.launch is None and not needs_bitsandbytes(order.yaml, order.job[0])


class WarmProcess:
    """Such a process. folder: for the file that it writes to when a chunk is done."""

    def __init__(self, folder: Path, log: Path, environment: Mapping[str, str], fork: bool):
        handle, name = tempfile.mkstemp(dir=folder)
        os.close(handle)
        self._answers, self._number = Path(name), 0
        self.ends = False  # after an error, though it may still be there
        command = [sys.executable, "-m", "peft_recipes.comparison.worker", ORDERS, name]
        self.process = start(command, log, environment, fork=fork)

    def has_room_for(self, order: Order, device: str) -> bool:
        """Whether it runs and the order's run fits in memory next to it; on a GPU it returns what it took there."""
        runs = not self.ends and self.process.poll() is None
        return runs and (device != "cpu" or free_memory_bytes() >= order.memory_bytes)

    def give(self, order: Order) -> Turn:
        """Let it train an order. Raises OSError where it has ended."""
        self._number += 1
        arm, seed = order.job
        log = order.folder / "log.txt"
        log.touch()  # the process may be killed before it opens it
        request = {
            "number": self._number,
            "recipe_file": str(order.yaml.absolute()),
            "arm": arm,
            "seed": seed,
            "output": str(order.output.absolute()),
            "data": str(order.data.absolute()) if order.data else None,
            "pause_at": order.pause_at,
            "memory_bytes": order.memory_bytes,
            "log": str(log.absolute()),
        }
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        return Turn(self, self._number)

    def code_of(self, number: int) -> int | None:
        """The exit code of an order that is done."""
        for line in self._answers.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n") and (answer := json.loads(line))["number"] == number:
                return answer["code"]
        return None

    def end(self) -> None:
        """Let it end, which it does when nothing is left to do."""
        with contextlib.suppress(OSError):  # it was killed with an order unread
            self.process.stdin.close()
        self.process.wait()


class Turn:
    """One order of a warm process, with what is used here of a process: its end is that of the order."""

    def __init__(self, warm: WarmProcess, number: int):
        self._warm, self._number = warm, number
        self.returncode: int | None = None
        self.stdin: Any = self

    def poll(self) -> int | None:
        if self.returncode is None:
            ended = self._warm.process.poll()  # before the answer is looked for, which it writes before it ends
            code = self._warm.code_of(self._number)
            self.returncode = ended if code is None else code
            self._warm.ends = self.returncode not in (None, 0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the process, for it is only waited for when it was interrupted."""
        self._warm.process.wait(timeout)
        return self.poll() or 0

    def send_signal(self, number: int) -> None:
        self._warm.process.send_signal(number)

    def kill(self) -> None:
        self._warm.process.kill()

    def close(self) -> None:
        """The process goes on with the next order."""
