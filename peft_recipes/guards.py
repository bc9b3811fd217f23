"""The guards by name, and what each looks for. All are on but those that a recipe's `skip_checks` names."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

GUARDS = {
    "memory": "an arm whose estimated peak is beyond the machine's memory is refused before the start",
    "classes": "more than one class in the train split",
    "duplicates": "no example stands in train and in a later split: such examples are taken out of train",
    "labelled-tokens": "every example keeps a token to learn after the cut; those that do not are left out",
    "end-token": "an end-of-text token carries a label in sft, or the model never learns to stop",
    "padding": "the padding token is set in tokenizer and model, and padding carries no label",
    "targets": "every target name hits a module",
    "trainable": "something learns",
    "saved": "whatever learns or is new (a task head) is stored with the adapter",
    "finite-loss": "a loss that is not finite stops the run",
    "learning": "after the first steps an adapter's weights have moved",
    "frozen": "the frozen weights are after training what they were before",
    "reload": "what was saved, loaded onto a fresh base, gives the same outputs",
    "fresh-process": "in a comparison, each adapter loaded once in a process that did not train it answers the same",
    "merge": "the merged model gives the same outputs",
    "adapter-only": "the folder holds the adapter and not the base",
}


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
