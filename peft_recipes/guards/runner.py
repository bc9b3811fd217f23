"""The guards by name, and what each looks for. All are on but those that a recipe's `skip_checks` names."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

from peft_recipes.recipe.options import GUARDS


class Guards:
    """Calls guards by name, leaves out those that are to be skipped, and keeps what they found and their time.

    results: name -> what the check returned (True for nothing), or "skipped". seconds: of all of them together.
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
            found = check(*arguments)
        finally:
            self.seconds += time.perf_counter() - start
        self.results[name] = True if found is None else found
        return found
