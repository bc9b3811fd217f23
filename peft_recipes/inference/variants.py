"""The models to compare, by name: the base alone, each adapter on it, and each adapter merged into it."""

from __future__ import annotations

import copy

from torch import nn

from peft_recipes.adapters.adapter_set import AdapterSet
from peft_recipes.adapters.embeddings import replaces_embeddings
from peft_recipes.adapters.open import OpenedAdapter
from peft_recipes.arms.merge import embedding_layers
from peft_recipes.arms.merge import merged as merged_model
from peft_recipes.errors import RecipeError, unknown

BASE, MERGED = "base", "-merged"
# Groups of one adapter, by its name.
_OWN = "own "
_OWN_EMBEDDINGS, _OWN_BASE, _OWN_TOKENS = f"{_OWN}embeddings: ", f"{_OWN}base: ", f"{_OWN}tokens: "
_OWN_MODULES = f"{_OWN}modules: "


class Variants:
    """The base and its adapters as models, with the base's weights in memory once.

    Adapters of one PEFT method share one model; another method, or an adapter that brings its own embeddings, gets a
    second model on the same weights; one that changes the base's weights (PiSSA, biases) gets a copy of them. A merged
    model has weights of its own, so it is made when it is first used, and only the latest is kept.
    """

    def __init__(self, adapters: dict[str, OpenedAdapter], merged: bool = False):
        self.adapters = adapters
        self.first = next(iter(adapters.values()))
        self.base = self.first.load_base()
        groups: dict[str, dict[str, OpenedAdapter]] = {}
        self._group_of: dict[str, str] = {}
        for name, adapter in adapters.items():
            self._group_of[name] = _group(name, adapter, self.base)
            groups.setdefault(self._group_of[name], {})[name] = adapter
        self._sets = {key: AdapterSet.of(group, _copy_for(key, self.base)) for key, group in groups.items()}
        self._merged: tuple[str, nn.Module] | None = None
        self.names = [BASE, *adapters, *(f"{name}{MERGED}" for name in adapters if merged)]

    def model(self, name: str) -> nn.Module:
        """Return the model of a variant, in evaluation mode. An adapter's is valid until the next call."""
        if name not in self.names:
            raise RecipeError(unknown("adapter", name, self.names))
        if name == BASE:
            return self.base
        if name in self.adapters:
            return self._sets[self._group_of[name]].use(name)
        if self._merged is None or self._merged[0] != name:
            self._merged = None  # its memory is free before the next is made
            self._merged = (name, self._merge(self.adapter(name)))
        return self._merged[1]

    def adapter(self, name: str) -> OpenedAdapter:
        """Return the adapter of a variant; of the base the first one."""
        return self.adapters.get(name.removesuffix(MERGED), self.first)

    def adapter_set(self, name: str) -> AdapterSet:
        """Return the set that an adapter is in, with the others that share its model."""
        return self._sets[self._group_of[name]]

    def has_own_model(self, name: str) -> bool:
        """Whether an adapter is in a set by itself, for what it brings besides its method's weights."""
        return self._group_of[name].startswith(_OWN)

    def _merge(self, adapter: OpenedAdapter) -> nn.Module:
        base = adapter.load_base(dequantise=True) if adapter.quantise else copy.deepcopy(self.base)
        model = merged_model(adapter.attach(base))
        if model is None:
            raise RecipeError(f"{adapter.folder} is {adapter.saved.method}, which can't be merged; leave out --merged.")
        return model.eval()


def _group(name: str, adapter: OpenedAdapter, base: nn.Module) -> str:
    if adapter.saved.changes_base:
        return f"{_OWN_BASE}{name}"
    if getattr(adapter.saved.config, "trainable_token_indices", None):  # PEFT loads no other adapter next to it
        return f"{_OWN_TOKENS}{name}"
    if replaces_embeddings(adapter.saved, base):
        return f"{_OWN_EMBEDDINGS}{name}"
    if adapter.generates and getattr(adapter.saved.config, "modules_to_save", None):
        return f"{_OWN_MODULES}{name}"  # PEFT mixes no rows with and without an LM head of their own
    return adapter.saved.method


def _copy_for(group: str, base: nn.Module) -> nn.Module:
    if group.startswith(_OWN_BASE):
        return copy.deepcopy(base)
    return _sharing_weights(base, embeddings=not group.startswith(_OWN_EMBEDDINGS))


def _sharing_weights(model: nn.Module, embeddings: bool) -> nn.Module:
    """Copy a model's modules but not its weights: an adapter on the copy is not on the original.

    embeddings: False copies the weights of embedding and LM head too, for an adapter that replaces them.
    """
    own = set() if embeddings else {id(layer.weight) for layer in embedding_layers(model)}
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()] if id(tensor) not in own}
    return copy.deepcopy(model, shared)
