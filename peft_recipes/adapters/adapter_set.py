"""Many adapters on one base in one process: loaded, switched by name, asked together in one batch, unloaded.

adapters = AdapterSet("HuggingFaceTB/SmolLM2-135M-Instruct")
adapters.load("runs/alpaca/lora/seed-0", "alpaca")
adapters.load("runs/code/lora/seed-0", "code")
adapters.use("code").generate(...)
adapters.ask(inputs, ["alpaca", "code", None])  # a batch of three rows, one forward pass; None is the base
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.adapters.check import Finding
from peft_recipes.adapters.open import Served, open_adapter
from peft_recipes.errors import RecipeError, unknown

if TYPE_CHECKING:
    import torch
    import torch.nn as nn

_BASE = "__base__"  # how PEFT names a row without an adapter


class AdapterSet:
    """One base and adapters of one PEFT method on it, all in evaluation mode.

    base: a Hub id, a folder or "embedded:NAME" (its weights are loaded with the first adapter, which tells what kind of
    model it is), or a model that is loaded already.
    """

    def __init__(self, base: str | Path | nn.Module, *, trust_remote_code: bool = False):
        given = isinstance(base, (str, Path))
        self.base = str(base) if given else str(base.config.name_or_path or type(base).__name__)
        self._loaded: Any = None if given else base.eval()
        self._given = given
        self.trust_remote_code = trust_remote_code
        self.model: Any = None
        self.served: dict[str, Served] = {}
        self.active: str | None = None
        self._inner: dict[str, str] = {}
        self._count = 0
        self._layers: list[Any] = []

    @classmethod
    def of(cls, served: dict[str, Served], base: nn.Module | None = None) -> AdapterSet:
        """A set of adapters that are open already, on the base of the first (or on `base`, which is its weights)."""
        first = next(iter(served.values()))
        made = cls(first.load_base() if base is None else base)
        made.base = first.model
        for name, adapter in served.items():
            made.load(adapter, name)
        return made

    @property
    def names(self) -> list[str]:
        """The adapters that are loaded, in the order they came."""
        return list(self.served)

    def peft_name(self, name: str) -> str:
        """What PEFT calls an adapter here: its own names hold no dot and are no part of its prefixes ("lora_")."""
        self._known(name)
        return self._inner[name]

    def fits(self, adapter: str | Path) -> Finding:
        """Whether a saved adapter fits this base, told from its files and the base's configuration, without weights.

        ok is False where its method is another than that of the adapters here, or a tensor has no place on this base;
        None where all have theirs but it was made for a base of another name.
        """
        try:
            served = open_adapter(adapter, self._base_of(adapter), trust_remote_code=self.trust_remote_code)
        except RecipeError as error:
            return Finding("fits", False, str(error))
        return self._fits(served)

    def _base_of(self, adapter: str | Path) -> str | None:
        """What the adapter is held against; a base that is trained here is known by the adapter's recipe alone."""
        from peft_recipes.adapters.saved import read_adapter
        from peft_recipes.models import bases

        named = read_adapter(adapter).config.base_model_name_or_path
        return None if not self._given or named == bases.SMALL_CNN else self.base

    def _fits(self, served: Served) -> Finding:
        kind, made_for = served.saved.config.peft_type, served.saved.config.base_model_name_or_path
        if self.model is not None and self.model.peft_type != kind:
            here = self.model.peft_type.value
            said = f"{served.folder} is {kind.value}, the others here are {here}: PEFT keeps one method on a model"
            return Finding("fits", False, said)
        known = served.generates and served.model == self.base  # it was held against this very base when it was opened
        if self._loaded is not None and not known and (wrong := _no_place(served, self._loaded)):
            return Finding("fits", False, wrong)
        said = f"{len(served.saved.tensors)} tensors, on {self.base}"
        same = made_for in (None, self.base)
        return Finding("fits", True if same else None, said if same else f"{said}; it was made for '{made_for}'")

    def load(self, adapter: str | Path | Served, name: str | None = None) -> str:
        """Loads a saved adapter under a name (its folder's, unless given), makes it the active one, returns the name.

        Raises RecipeError: no adapter there, it does not fit, the name is taken.
        """
        served = adapter
        if not isinstance(served, Served):
            served = open_adapter(adapter, self._base_of(adapter), trust_remote_code=self.trust_remote_code)
        name = name or served.folder.resolve().name
        if name in self.served:
            raise RecipeError(f"There is an adapter named '{name}' already ({self.served[name].folder}).")
        if self._loaded is None:
            self._loaded = served.load_base()
        fits = self._fits(served)
        if fits.ok is False:
            raise RecipeError(f"{served.folder} can't be loaded here: {fits.said}.")
        self._put_on(served, name)
        self.use(name)
        return name

    def _put_on(self, served: Served, name: str) -> None:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        from peft_recipes.models.virtual_tokens import read_last_token

        # PEFT's own names hold no dot, and one that is part of a prefix ("lora") would be drawn anew while loading.
        inner = f"a{self._count}_" + re.sub(r"\W", "_", name)
        self._count += 1
        if self.model is None:
            self.model = PeftModel.from_pretrained(
                self._loaded, served.folder, adapter_name=inner, low_cpu_mem_usage=not _learns_prompts(served)
            )
            read_last_token(self.model)
        else:
            device = str(next(self._loaded.parameters()).device)
            self._all_on(True)
            self.model.load_adapter(
                str(served.folder), inner, torch_device=device, low_cpu_mem_usage=not _learns_prompts(served)
            )
        self.model.eval().requires_grad_(False)
        self._layers = [m for m in self.model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        # Its tensors are in the model now; what was read to hold it against the base would be kept a second time.
        kept = dataclasses.replace(served.saved, tensors={})
        self._inner[name], self.served[name] = inner, dataclasses.replace(served, saved=kept)

    def use(self, name: str | None) -> Any:
        """Makes an adapter the one that answers (None: the base alone), and returns the model that does.

        It only sets what each adapted layer calls active: PEFT's own set_adapter walks through all modules and through
        the parameters of all adapters to freeze and thaw them, and here nothing learns.
        """
        self._known(name)
        self.active = name
        if name is None:
            self._all_on(False)
            return self._loaded if self.model is None else self.model.get_base_model()
        inner = self._inner[name]
        for layer in self._layers:
            layer._active_adapter, layer._disable_adapters = [inner], False
        self.model.active_adapter = inner
        if not _learns_prompts(self.served[name]):
            self.model.base_model.active_adapter = inner
        return self.model

    def _all_on(self, on: bool) -> None:
        for layer in self._layers:
            layer._disable_adapters = not on

    def unload(self, name: str) -> None:
        """Takes an adapter out of memory; where it was the active one, the base alone answers from then on."""
        self._known(name)
        self._all_on(True)
        active = None if self.active == name else self.active
        inner = self._inner.pop(name)
        del self.served[name]
        if self.served:
            self.model.delete_adapter(inner)
            self.model.requires_grad_(False)
        else:  # PEFT's last one: the base as it was
            learns_prompts = self.model.active_peft_config.is_prompt_learning
            self._loaded = self.model.get_base_model() if learns_prompts else self.model.unload()
            self.model, self._layers = None, []
        self.use(active)

    def ask(self, inputs: dict[str, torch.Tensor], adapters: Sequence[str | None]) -> Any:
        """The model's output for a batch whose rows ask for different adapters (None: the base), in one forward pass.

        inputs: what the model's forward takes, [rows, ...] each. adapters: one a row. Raises RecipeError for a name
        that is not here, another count than the rows', and a method or a head that PEFT can't mix within a batch.
        """
        import torch

        with self._mixed(inputs, adapters) as names, torch.no_grad():
            return self.model(**inputs, adapter_names=names)

    def generate(self, inputs: dict[str, torch.Tensor], adapters: Sequence[str | None], **options: Any) -> torch.Tensor:
        """What a causal model writes for such a batch, padded on the left: transformers' `generate`, its options."""
        import torch

        with self._mixed(inputs, adapters) as names, torch.no_grad():
            return self.model.generate(**inputs, adapter_names=names, **options)

    @contextlib.contextmanager
    def _mixed(self, inputs: dict[str, torch.Tensor], adapters: Sequence[str | None]) -> Iterator[list[str]]:
        self._check_mix(inputs, adapters)
        active, names = self.active, [_BASE if name is None else self._inner[name] for name in adapters]
        self._all_on(True)
        for layer in self._layers:  # a wrapped head answers for itself alone where the active adapter has none
            if hasattr(layer, "_adapters"):
                layer._active_adapter = [next(iter(layer._adapters))]
        try:
            yield names
        finally:
            self._forget_rows()
            self.use(active)

    def _check_mix(self, inputs: dict[str, torch.Tensor], adapters: Sequence[str | None]) -> None:
        for name in adapters:
            self._known(name)
        rows = len(next(iter(inputs.values())))
        if len(adapters) != rows:
            raise RecipeError(f"{len(adapters)} adapters are named for {rows} rows; name one a row.")
        if self.model is None:
            raise RecipeError("No adapter is loaded.")
        kind = self.model.peft_type.value
        for name in {name for name in adapters if name is not None}:
            config = self.served[name].saved.config
            if kind != "LORA" or config.use_dora:
                what = "DoRA" if kind == "LORA" else kind
                raise RecipeError(f"Adapter '{name}' is {what}, whose rows PEFT can't mix with others' in a batch. Ask "
                                  "one adapter at a time: use(name).")  # fmt: skip
            wrapped = [layer for layer in self._layers if hasattr(layer, "_adapters")]
            if any(self._inner[name] not in layer._adapters for layer in wrapped):
                raise RecipeError(f"Adapter '{name}' has no head of its own and others here have: they can't share a "
                                  "batch. Ask one adapter at a time: use(name).")  # fmt: skip

    def _forget_rows(self) -> None:
        """Takes out the hooks by which PEFT tells each layer whose row is whose: it leaves them where a pass fails."""
        for layer in self._layers:
            for key, hook in list(layer._forward_pre_hooks.items()):
                if isinstance(hook, partial) and "adapter_names" in hook.keywords:
                    del layer._forward_pre_hooks[key]
                    layer._forward_pre_hooks_with_kwargs.pop(key, None)

    def _known(self, name: str | None) -> None:
        if name is not None and name not in self.served:
            raise RecipeError(unknown("adapter", name, self.served))


def twin(model: nn.Module) -> nn.Module:
    """A second model on the same weights, which take no memory twice: what is put on one is not on the other."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def _learns_prompts(served: Served) -> bool:
    return bool(served.saved.config.is_prompt_learning)


def _no_place(served: Served, base: nn.Module) -> str:
    """Why the adapter has no place on a model that is loaded already; empty where it has. A head that is the adapter's
    own must be as large as the model's."""
    from peft_recipes.adapters.check import fit

    config = copy.deepcopy(getattr(base, "peft_original_config", base.config))
    found = fit(served.saved, served.task, config)
    return found.said if found.ok is False else ""
