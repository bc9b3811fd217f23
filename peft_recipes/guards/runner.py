"""Run guards by name, except those in a recipe's `skip_checks`, and read their results in run.json."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from peft_recipes.errors import RecipeError
from peft_recipes.recipe.options import GUARDS

NOT_RUN = "not run"  # how the result of a check starts that could not be made, and says why


def failed_checks(checks: dict[str, Any] | None) -> dict[str, str]:
    """The failed checks among the `checks` of a run.json, each with the words it failed with."""
    results = (checks or {}).items()
    return {name: result["error"] for name, result in results if isinstance(result, dict) and "error" in result}


def error_words(error: BaseException) -> str:
    """An exception in one line: a guard's message as it is, any other with the exception's type before it."""
    message = " ".join(str(error).split())
    if message and type(error) in (RuntimeError, RecipeError):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


class Guards:
    """Calls guards by name, skips those that are turned off, and records results and time.

    results: name -> what the check returned (True for None), "skipped", "not run: ..." or {"error": ...} for a check
    that failed after training. seconds: total time of all checks.
    """

    def __init__(self, skipped: Collection[str] = ()):
        self.skipped, self.results, self.seconds = frozenset(skipped), {}, 0.0

    def __call__(self, name: str, check: Callable[..., Any], *arguments: Any) -> Any:
        assert name in GUARDS, name
        if name in self.skipped:
            self.results[name] = "skipped"
            return None
        start = time.perf_counter()
        try:
            result = check(*arguments)
        finally:
            self.seconds += time.perf_counter() - start
        self.results[name] = True if result is None else result
        return result

    @contextlib.contextmanager
    def recorded(self, name: str) -> Iterator[None]:
        """Record an exception of the block as a failed check, and continue after the block.

        For all that follows training: the weights and the figures of a run are kept, whatever fails afterwards.
        """
        try:
            yield
        except Exception as error:
            self.results[name] = {"error": error_words(error)}
        else:
            return
        gc.collect()  # the block's models, which the exception kept alive
        _empty_device_cache()


def _empty_device_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
