"""A base and its adapters side by side: the base alone, each adapter on it, and each merged, by name."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from peft_recipes.adapters.adapter_set import AdapterSet, twin
from peft_recipes.adapters.open import Served
from peft_recipes.arms.merge import merged
from peft_recipes.errors import RecipeError, unknown

if TYPE_CHECKING:
    import torch.nn as nn

BASE, MERGED = "base", "-merged"


class Forms:
    """The forms of adapters of one base, whose weights are in memory once.

    Adapters of one PEFT method share one model; those of another get a second model on the same weights. A merged form
    has weights of its own, so it is made when it is asked for, and one at a time is kept.
    """

    def __init__(self, opened: dict[str, Served], merged: bool = False):
        self.opened = opened
        self.first = next(iter(opened.values()))
        self.base = self.first.load_base()
        kinds: dict[str, dict[str, Served]] = {}
        for name, served in opened.items():
            kinds.setdefault(served.saved.config.peft_type.value, {})[name] = served
        self._sets = {kind: AdapterSet.of(group, twin(self.base)) for kind, group in kinds.items()}
        self._kept: tuple[str, nn.Module] | None = None
        with_merged = [f"{name}{MERGED}" for name in opened] if merged else []
        self.names = [BASE, *opened, *with_merged]

    def model(self, name: str) -> nn.Module:
        """The model of a form, in evaluation mode; that of an adapter answers until another is asked for."""
        if name not in self.names:
            raise RecipeError(unknown("adapter", name, self.names))
        if name == BASE:
            return self.base
        if name in self.opened:
            return self._sets[self.opened[name].saved.config.peft_type.value].use(name)
        return self._merged(name)

    def served(self, name: str) -> Served:
        """The adapter that a form belongs to; of the base the first."""
        return self.opened.get(name.removesuffix(MERGED), self.first)

    def _merged(self, name: str) -> nn.Module:
        if self._kept is None or self._kept[0] != name:
            served, self._kept = self.served(name), None
            base = served.load_base(whole=True) if served.quantise else copy.deepcopy(self.base)
            whole = merged(served.on(base))
            if whole is None:
                kind = served.saved.config.peft_type.value
                raise RecipeError(f"{served.folder} is {kind}, which has no merged form; leave out --merged.")
            self._kept = (name, whole.eval())
        return self._kept[1]
