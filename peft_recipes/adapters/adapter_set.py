"""Many adapters on one base in one process: load, switch by name, mix in one batch, unload.

adapters = AdapterSet("HuggingFaceTB/SmolLM2-135M-Instruct")
adapters.load("runs/alpaca/lora/seed-0", "alpaca")
adapters.load("runs/code/lora/seed-0", "code")
adapters.use("code").generate(...)
adapters.ask(inputs, ["alpaca", "code", None])  # a batch of three, one forward pass; None is the base
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_recipes.adapters.check import Finding, check_fit
from peft_recipes.adapters.embeddings import fit_vocabulary, replaces_embeddings
from peft_recipes.adapters.open import OpenedAdapter, open_adapter
from peft_recipes.adapters.saved import read_adapter
from peft_recipes.errors import RecipeError, unknown
from peft_recipes.models import bases
from peft_recipes.models.virtual_tokens import read_last_token

_BASE = "__base__"  # PEFT's name for a row without an adapter


class AdapterSet:
    """One base with adapters of one PEFT method, all in evaluation mode.

    base: a Hub id, a folder or "embedded:NAME", whose weights are loaded with the first adapter (it determines the
    model class); or a model that is loaded already.
    """

    def __init__(self, base: str | Path | nn.Module, *, trust_remote_code: bool = False):
        self._by_name = isinstance(base, (str, Path))
        self.base = str(base) if self._by_name else str(base.config.name_or_path or type(base).__name__)
        self._base_model: Any = None if self._by_name else base.eval()
        self.trust_remote_code = trust_remote_code
        self.model: Any = None  # the PeftModel, once an adapter is loaded
        self.adapters: dict[str, OpenedAdapter] = {}
        self.active: str | None = None
        self._replaced = False  # whether the one adapter here has replaced weights of the base
        self._peft_names: dict[str, str] = {}
        self._count = 0
        self._layers: list[Any] = []  # the layers that switch between adapters

    @classmethod
    def of(cls, adapters: dict[str, OpenedAdapter], base: nn.Module | None = None) -> AdapterSet:
        """Make a set of opened adapters on the first one's base. base: that base, if it is loaded already."""
        first = next(iter(adapters.values()))
        adapter_set = cls(first.load_base() if base is None else base)
        adapter_set.base = first.base_name
        for name, adapter in adapters.items():
            adapter_set.load(adapter, name)
        return adapter_set

    @property
    def names(self) -> list[str]:
        """The loaded adapters, in the order of loading."""
        return list(self.adapters)

    def peft_name(self, name: str) -> str:
        """Return the name of an adapter within PEFT, which allows no dot and no part of its own prefixes ("lora_")."""
        self._check_name(name)
        return self._peft_names[name]

    def fits(self, adapter: str | Path) -> Finding:
        """Check whether a saved adapter fits this base, from its files and the base's configuration, without weights.

        ok is False if its method differs from that of the adapters here, or a tensor does not fit this base; None if
        all tensors fit but the adapter names another base.
        """
        try:
            return self._check_fit(self._open(adapter))
        except RecipeError as error:
            return Finding("fits", False, str(error))

    def _open(self, folder: str | Path) -> OpenedAdapter:
        """Open an adapter on this set's base; on its own if that is a small CNN, which only its recipe can train."""
        own_base = not self._by_name or read_adapter(folder).config.base_model_name_or_path == bases.SMALL_CNN
        return open_adapter(folder, None if own_base else self.base, trust_remote_code=self.trust_remote_code)

    def _check_fit(self, adapter: OpenedAdapter) -> Finding:
        saved, named = adapter.saved, adapter.saved.config.base_model_name_or_path
        if self.model is not None and self.model.peft_type != saved.config.peft_type:
            methods = f"{saved.folder} is {saved.method}, the others here are {self.model.peft_type.value}"
            return Finding("fits", False, f"{methods}: PEFT keeps one method on a model")
        checked = adapter.generates and adapter.base_name == self.base  # on this base, when it was opened
        if self._base_model is not None and not checked:
            # The model in memory may have another head than the base on disk.
            config = getattr(self._base_model, "peft_original_config", self._base_model.config)
            fit = check_fit(saved, adapter.task, copy.deepcopy(config))
            if fit.ok is False:
                return fit
        message = f"{len(saved.tensors)} tensors, on {self.base}"
        if named in (None, self.base):
            return Finding("fits", True, message)
        return Finding("fits", None, f"{message}; it was made for '{named}'")

    def load(self, adapter: str | Path | OpenedAdapter, name: str | None = None) -> str:
        """Load a saved adapter, make it the active one, and return its name (that of its folder, if none is given).

        Raises RecipeError: no adapter there, it does not fit, the name is taken.
        """
        opened = adapter if isinstance(adapter, OpenedAdapter) else self._open(adapter)
        name = name or opened.folder.resolve().name
        if name in self.adapters:
            raise RecipeError(f"There is an adapter named '{name}' already ({self.adapters[name].folder}).")
        if self._base_model is None:
            self._base_model = opened.load_base()
        fit = self._check_fit(opened)
        if fit.ok is False:
            raise RecipeError(f"{opened.folder} can't be loaded here: {fit.message}.")
        self._add_to_model(opened, name)
        self.use(name)
        return name

    def _add_to_model(self, adapter: OpenedAdapter, name: str) -> None:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        # PEFT takes a name that ends with that of a module for this module, allows no dot, and re-initialises the
        # weights of one that is part of a prefix ("lora").
        peft_name = f"adapter{self._count}_"
        self._count += 1
        options = {"low_cpu_mem_usage": not (_is_prompt(adapter) or adapter.saved.initialised_from_base)}
        self._check_base_weights(adapter)
        if self.model is None:
            fit_vocabulary(adapter.saved, self._base_model)
            self.model = PeftModel.from_pretrained(self._base_model, adapter.folder, adapter_name=peft_name, **options)
            read_last_token(self.model)
        else:
            device = str(next(self._base_model.parameters()).device)
            self._enable_layers(True)
            try:
                self.model.load_adapter(str(adapter.folder), peft_name, torch_device=device, **options)
            except (KeyError, ValueError, TypeError, RuntimeError) as error:
                raise RecipeError(
                    f"{adapter.folder}: PEFT can't load it next to {', '.join(self.names)}, as they store different "
                    f"modules ({' '.join(str(error).split())[:120]}). Use it by itself."
                ) from error
        self.model.eval().requires_grad_(False)
        self._layers = [m for m in self.model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        # The model holds the tensors now: without this, each adapter would be in memory twice.
        without_tensors = dataclasses.replace(adapter.saved, tensors={})
        self.adapters[name] = dataclasses.replace(adapter, saved=without_tensors)
        self._peft_names[name] = peft_name

    def _check_base_weights(self, adapter: OpenedAdapter) -> None:
        """Raise RecipeError where an adapter would replace weights of the base that other adapters use."""
        base = self._base_model if self.model is None else self.model.get_base_model()
        replaces = adapter.saved.changes_base or replaces_embeddings(adapter.saved, base)
        if self.adapters and (replaces or self._replaced):
            owner = adapter if replaces else next(iter(self.adapters.values()))
            brings = _what_it_replaces(owner)
            raise RecipeError(f"{owner.folder} {brings} for the other adapters as well. Use it by itself.")
        self._replaced = replaces

    def use(self, name: str | None) -> Any:
        """Make an adapter the active one (None: the base alone) and return the model to call.

        Sets the active adapter of each adapted layer only. PEFT's own set_adapter also walks through all modules and
        the parameters of all adapters to freeze and unfreeze them, and here nothing is trained.
        """
        self._check_name(name)
        self.active = name
        if name is None and self._replaced:
            raise RecipeError("The adapter has replaced weights of the base: load the base by itself.")
        if name is None:
            self._enable_layers(False)
            return self._base_model if self.model is None else self.model.get_base_model()
        peft_name = self._peft_names[name]
        for layer in self._layers:
            layer._active_adapter, layer._disable_adapters = [peft_name], False
        self.model.active_adapter = peft_name
        if not _is_prompt(self.adapters[name]):
            self.model.base_model.active_adapter = peft_name
        return self.model

    def _enable_layers(self, enabled: bool) -> None:
        for layer in self._layers:
            layer._disable_adapters = not enabled

    def unload(self, name: str) -> None:
        """Remove an adapter from memory; if it was the active one, the base alone is active."""
        self._check_name(name)
        self._enable_layers(True)
        active = None if self.active == name else self.active
        peft_name = self._peft_names.pop(name)
        del self.adapters[name]
        if self.adapters:
            self.model.delete_adapter(peft_name)
            self.model.requires_grad_(False)
        elif self._replaced:  # by which the base is no longer what it was
            self._base_model, self.model, self._layers, self._replaced = None, None, [], False
        else:  # the last one: restore the base
            is_prompt = self.model.active_peft_config.is_prompt_learning
            self._base_model = self.model.get_base_model() if is_prompt else self.model.unload()
            self.model, self._layers = None, []
        self.use(active)

    def mixes(self, name: str) -> bool:
        """Whether PEFT can give this adapter to single rows of a batch: a LoRA that is no DoRA."""
        self._check_name(name)
        saved = self.adapters[name].saved
        return saved.method == "LORA" and not saved.config.use_dora

    def ask(self, inputs: dict[str, torch.Tensor], adapters: Sequence[str | None]) -> Any:
        """Run a batch whose rows use different adapters (None: the base) in one forward pass, and return its output.

        inputs: of the model's forward, [rows, ...] each. adapters: one per row. Raises RecipeError for an unknown name,
        a count that differs from the rows', and a method or a head that PEFT can't mix within a batch.
        """
        with self._mixed_batch(inputs, adapters) as names, torch.no_grad():
            return self.model(**inputs, adapter_names=names)

    def generate(self, inputs: dict[str, torch.Tensor], adapters: Sequence[str | None], **options: Any) -> torch.Tensor:
        """Generate for such a batch, padded on the left. options: those of transformers' `generate`."""
        with self._mixed_batch(inputs, adapters) as names, torch.no_grad():
            return self.model.generate(**inputs, adapter_names=names, **options)

    @contextlib.contextmanager
    def _mixed_batch(self, inputs: dict[str, torch.Tensor], adapters: Sequence[str | None]) -> Iterator[list[str]]:
        """Yield PEFT's names for the rows of a batch, with the layers set up for it."""
        self._check_mix(inputs, adapters)
        active, names = self.active, [_BASE if name is None else self._peft_names[name] for name in adapters]
        self._enable_layers(True)
        for layer in self._wrapped_heads():  # PEFT would use the base's head if the active adapter had none
            layer._active_adapter = [next(iter(layer._adapters))]
        try:
            yield names
        finally:
            self._remove_row_hooks()
            self.use(active)

    def _wrapped_heads(self) -> list[Any]:
        return [layer for layer in self._layers if hasattr(layer, "_adapters")]

    def _check_mix(self, inputs: dict[str, torch.Tensor], adapters: Sequence[str | None]) -> None:
        for name in adapters:
            self._check_name(name)
        rows = len(next(iter(inputs.values())))
        if len(adapters) != rows:
            raise RecipeError(f"{len(adapters)} adapters are named for {rows} rows; name one a row.")
        if self.model is None:
            raise RecipeError("No adapter is loaded.")
        hint = "Use one adapter at a time: use(name)."
        for name in {name for name in adapters if name is not None}:
            if not self.mixes(name):
                saved = self.adapters[name].saved
                method = "DoRA" if saved.method == "LORA" else saved.method
                raise RecipeError(f"Adapter '{name}' is {method}, which PEFT can't mix within a batch. {hint}")
            if any(self._peft_names[name] not in layer._adapters for layer in self._wrapped_heads()):
                raise RecipeError(f"Adapter '{name}' has no head of its own and others here have: they can't share a "
                                  f"batch. {hint}")  # fmt: skip

    def _remove_row_hooks(self) -> None:
        """Remove the hooks that give each layer the adapter of each row: PEFT leaves them behind if a pass fails."""
        for layer in self._layers:
            for key, hook in list(layer._forward_pre_hooks.items()):
                if isinstance(hook, partial) and "adapter_names" in hook.keywords:
                    del layer._forward_pre_hooks[key]
                    layer._forward_pre_hooks_with_kwargs.pop(key, None)

    def _check_name(self, name: str | None) -> None:
        if name is not None and name not in self.adapters:
            raise RecipeError(unknown("adapter", name, self.adapters))


def _what_it_replaces(adapter: OpenedAdapter) -> str:
    if adapter.saved.trains_biases:
        return "brings biases of its own, which would replace the base's"
    if adapter.saved.changes_base:
        init = adapter.saved.config.init_lora_weights
        return f"begins at a part of the base's weights ({init}), which it subtracts from them"
    return "brings embeddings of its own, which would replace the base's"


def _is_prompt(adapter: OpenedAdapter) -> bool:
    return bool(adapter.saved.config.is_prompt_learning)
