"""Run guards by name, except those in a recipe's `skip_checks`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

from peft_recipes.recipe.options import GUARDS


class Guards:
    """Calls guards by name, skips those that are turned off, and records results and time.

    results: name -> what the check returned (True for None), or "skipped". seconds: total time of all checks.
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
