"""Requests to a running comparison, from `peft-recipes stop` and `add`: files in its folder that its process answers.

A comparison that takes requests has the file `.changes/open`. A request is a file of its own there, written under
another name and renamed. The comparison takes it by renaming it once more, and answers with a file next to it. To
withdraw a request is to delete it. Renaming and deleting exclude each other, so a request is either taken or withdrawn,
and the lock of the comparison's folder says whether its process still lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_recipes.errors import RecipeError
from peft_recipes.runs.files import write_json, write_text
from peft_recipes.runs.lock import is_locked

FOLDER = ".changes"
_OPEN = "open"
_POLL_SECONDS = 0.1
_SILENT_SECONDS = 2  # before the user reads what is waited for
_UNREAD_SECONDS = 600  # after which the answer to a command that was killed is deleted

ENDED = "The comparison ended before it took up the request: nothing was changed."


class Unanswered(RuntimeError):
    """The comparison ended, or was killed, before it answered. The message says whether something was changed."""


@dataclass
class Request:
    """A request that the comparison has taken; `data` is what `ask` was given."""

    data: dict[str, Any]
    _path: Path

    def answer(self, said: str | None = None, problems: list[str] | None = None) -> None:
        """Answer in one line, or with everything that is wrong."""
        write_json(self._path.with_suffix(".answer"), {"schema": 1, "said": said, "problems": problems or []})
        self._path.unlink(missing_ok=True)


class Inbox:
    """Where a comparison finds requests while its runs are trained."""

    def __init__(self, folder: Path):
        self._place = folder / FOLDER

    def open(self) -> None:
        """Take requests from now on. What an earlier comparison left is answered: it was not done."""
        self._place.mkdir(exist_ok=True)
        for path in self._place.glob("*.answer"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _UNREAD_SECONDS:
                    path.unlink()
        for path in self._place.glob("*.taken"):
            Request({}, path).answer(problems=[_killed(self._place.parent)])
        self._refuse(ENDED)
        write_text(self._place / _OPEN, f"process {os.getpid()}\n")

    def close(self) -> None:
        """Take no more requests; answer those that were not taken."""
        (self._place / _OPEN).unlink(missing_ok=True)
        self._refuse(ENDED)
        with contextlib.suppress(OSError):  # an answer that was not read yet
            self._place.rmdir()

    def take(self) -> Iterator[Request]:
        """Yield each request in the order in which they were made."""
        for path in sorted(self._place.glob("*.request")):
            taken = path.with_suffix(".taken")
            try:
                os.rename(path, taken)
            except FileNotFoundError:  # withdrawn
                continue
            try:
                data = json.loads(taken.read_text(encoding="utf-8"))
                if not isinstance(data, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                Request({}, taken).answer(problems=[f"The request can't be read: {error}."])
                continue
            yield Request(data, taken)

    def _refuse(self, why: str) -> None:
        for request in self.take():
            request.answer(problems=[why])


@contextlib.contextmanager
def taking_requests(folder: Path) -> Iterator[Inbox]:
    """An inbox that is open within the block. The caller holds the folder's lock."""
    inbox = Inbox(folder)
    inbox.open()
    try:
        yield inbox
    finally:
        inbox.close()


def ask(folder: Path, request: dict[str, Any], on_wait: Callable[[], None] = lambda: None) -> str:
    """Ask the comparison that runs in a folder; return its answer, one line.

    on_wait: called once where the answer takes more than two seconds. Raises RecipeError where no comparison takes
    requests there, or with what is wrong with this one; Unanswered where the comparison ends first; and
    KeyboardInterrupt after a Ctrl-C, with what became of the request as its argument.
    """
    place = folder / FOLDER
    if not takes_requests(folder):
        raise RecipeError(f"The comparison in {folder} takes no changes now: it prepares its data, or its runs ended.")
    path = place / f"{time.time_ns()}-{os.getpid()}-{secrets.token_hex(4)}.request"
    answer = path.with_suffix(".answer")
    try:
        write_json(path, {"schema": 1, **request})
        _wait(folder, path, answer, on_wait)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_interrupted(path, answer)) from None
    except FileNotFoundError:  # the comparison closed its inbox meanwhile
        raise Unanswered(ENDED) from None
    reply = json.loads(answer.read_text(encoding="utf-8"))
    answer.unlink(missing_ok=True)
    if not is_locked(folder):
        with contextlib.suppress(OSError):
            place.rmdir()
    if reply["problems"]:
        if reply["problems"] == [ENDED]:
            raise Unanswered(ENDED)
        raise RecipeError(*reply["problems"])
    return reply["said"]


def check_running(folder: Path, instead: str) -> None:
    """Raise RecipeError unless a comparison runs in a folder. instead: what to do then."""
    if is_locked(folder):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RecipeError(f"{folder} can't be written, and a request is a file in it. Ask as its user.")
        return
    if not folder.is_dir():
        raise RecipeError(f"There is no folder {folder}.{_running_near(folder)}")
    raise RecipeError(f"No comparison runs in {folder}.{_running_near(folder) or f' {instead}'}")


def _running_near(folder: Path) -> str:
    """Return " One runs in adapters/x." for the comparisons that run next to a folder or in it, or ""."""
    opened = [*folder.glob(f"*/{FOLDER}/{_OPEN}"), *folder.parent.glob(f"*/{FOLDER}/{_OPEN}")]
    running = sorted({str(path.parents[1]) for path in opened if is_locked(path.parents[1])})
    return f" {'One runs' if len(running) == 1 else 'Some run'} in {', '.join(running)}." if running else ""


def takes_requests(folder: Path) -> bool:
    """Whether a comparison runs in a folder and takes requests."""
    return (folder / FOLDER / _OPEN).is_file() and is_locked(folder)


def _wait(folder: Path, path: Path, answer: Path, on_wait: Callable[[], None]) -> None:
    """Return once there is an answer. Raises Unanswered."""
    start, said = time.monotonic(), False
    while not answer.is_file():
        alive, takes = is_locked(folder), (folder / FOLDER / _OPEN).is_file()
        if answer.is_file():  # written before its process ended
            return
        if not (alive and takes) and _withdrawn(path):
            raise Unanswered(ENDED)
        if not alive and not path.exists() and not answer.is_file():
            path.with_suffix(".taken").unlink(missing_ok=True)
            raise Unanswered(_killed(folder))
        if not said and time.monotonic() - start > _SILENT_SECONDS:
            said = True
            on_wait()
        time.sleep(_POLL_SECONDS)


def _withdrawn(path: Path) -> bool:
    """Withdraw a request; whether that was possible, which it is until the comparison takes it."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _interrupted(path: Path, answer: Path) -> str:
    if _withdrawn(path):
        return "Interrupted. The request is withdrawn: nothing was changed."
    if path.with_suffix(".taken").exists() or answer.exists():
        answer.unlink(missing_ok=True)
        return "Interrupted. The comparison has taken up the request: it stays."
    return "Interrupted."


def _killed(folder: Path) -> str:
    return (
        f"The comparison was killed while it took up the request. {folder / 'changes.json'} says what was changed; the "
        "same command of `compare` goes on with it."
    )
