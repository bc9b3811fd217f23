"""The one exception for a user's mistake, and the words that point at the nearest valid name."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class RecipeError(Exception):
    """A mistake in what the user gave: a recipe, a name, a file, a setting.

    The command line shows its message alone, without a traceback, and exits with 2. The message says what happened,
    where, and what to do about it; `problems` holds one line a problem when there are several.
    """

    def __init__(self, *problems: str):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def nearest(name: str, names: Iterable[str]) -> str:
    """The words " Did you mean 'x'?" for the closest of `names`, or an empty string when none is close."""
    close = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown(kind: str, name: str, names: Iterable[str], where: str = "") -> str:
    """One line for a name that is not among `names`: the nearest, then all that are valid."""
    valid = sorted(names)
    place = f" in {where}" if where else ""
    return f"Unknown {kind} '{name}'{place}.{nearest(name, valid)} Valid: {', '.join(valid) or 'none'}."


@contextlib.contextmanager
def within(place: str) -> Iterator[None]:
    """Puts a place ("mine.yaml") before every problem that is raised within it."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(*(p if place in p else f"{place}: {p}" for p in error.problems)) from error


def says_out_of_memory(text: str) -> bool:
    """Whether an error's words say that memory ran out, on a GPU or in the CPU's allocator."""
    text = text.lower()
    return any(words in text for words in ("out of memory", "can't allocate memory", "cannot allocate memory"))


class Terminated(BaseException):
    """SIGTERM, as an exception: what KeyboardInterrupt is to SIGINT, so that what is open is closed on the way out."""
