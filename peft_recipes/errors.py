"""RecipeError, the exception for user errors, and messages that suggest the nearest valid name."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class RecipeError(ValueError):
    """An error in the user's input: a recipe, a name, a file, a setting.

    The command line prints the message without a traceback and exits with 2. The message says what happened, where,
    and what to do; `problems` holds one line per problem.
    """

    def __init__(self, *problems: str):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what caused it or was being handled, and so on; each once, as an error may be its own cause."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def root_cause(error: BaseException) -> str:
    """The message of the error that an error was raised from first, in one line with a full stop."""
    seen: set[int] = set()
    while error.__cause__ is not None and id(error) not in seen:
        seen.add(id(error))
        error = error.__cause__
    return f"{' '.join(str(error).split())[:300] or type(error).__name__}."


class JudgeError(RuntimeError):
    """A judge that can't be asked. The message says why; runs and replies until then are kept."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest of `names`, or "" when none is close."""
    close = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown(kind: str, name: str, names: Iterable[str], where: str = "") -> str:
    """Return the one-line message for a name that is not among `names`: the nearest one, then all valid ones."""
    valid = sorted(names)
    location = f" in {where}" if where else ""
    return f"Unknown {kind} '{name}'{location}.{nearest(name, valid)} Valid: {', '.join(valid) or 'none'}."


@contextlib.contextmanager
def within(location: str) -> Iterator[None]:
    """Prefix every problem of a RecipeError raised in the block with its location, e.g. "mine.yaml"."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(*(p if location in p else f"{location}: {p}" for p in error.problems)) from error


def says_out_of_memory(text: str) -> bool:
    """Return whether an error message reports that a GPU's or the CPU's memory ran out."""
    text = text.lower()
    return any(words in text for words in ("out of memory", "can't allocate memory", "cannot allocate memory"))


class Terminated(BaseException):
    """SIGTERM as an exception, like KeyboardInterrupt for SIGINT, so that open files are closed on the way out."""
