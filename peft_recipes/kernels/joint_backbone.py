"""One forward and backward pass of a backbone for the batches of several models that share its weights.

The models are views of one base (`view`): module trees of their own on the same frozen tensors, each with its own
adapter. Their backbones are the same but for the modules that an adapter has replaced. So one pass can serve them all:
the batches are joined row by row, every shared module computes all rows, and an adapted one is each model's own, on the
rows of its batch. What follows the backbone (LM head, classifier, loss) stays each model's: it gets its rows as a leaf
tensor, runs its own backward pass down to it, and then one backward pass of the joint backbone takes these gradients on
to the adapters. No row depends on another, so each adapter gets the gradients that its model alone would give it, up to
rounding.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_recipes.kernels import onednn_linear, packed_attention
from peft_recipes.kernels.joint_batches import Inputs, joined, kind, padded
from peft_recipes.kernels.lora_linear import plain_adapter

Drawing = Callable[[Hashable], contextlib.AbstractContextManager[None]]
_OF_ATTENTION, _OF_HEADS = re.compile("att.*drop"), re.compile("classif|summary|cls")  # options of a dropout
_routed_attention: set[str] = set()


def view(model: nn.Module) -> nn.Module:
    """A copy of a model on the same parameters; buffers and configuration are its own."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@dataclass(frozen=True)
class Share:
    """Where the batch of one model is in the joint one: its rows, and its number of columns. mask: its own."""

    owner: Hashable
    rows: slice
    length: int
    mask: Any = None

    def of(self, x: torch.Tensor, has_columns: bool = True) -> torch.Tensor:
        """Its part of a tensor [all rows, longest length, ...] or [all rows, ...], contiguous as modules expect it."""
        return x[self.rows, : self.length].contiguous() if has_columns else x[self.rows]


@dataclass(frozen=True)
class _Pass:
    """A joint pass whose backward pass is to come: the backbone's outputs by name, and the leaves of each model."""

    outputs: dict[str, torch.Tensor]
    shares: list[Share]
    leaves: dict[Hashable, dict[str, torch.Tensor]]


class JointBackbone:
    """The backbone that several models run together.

    backbone: a view of the models' own, with no adapter. drawing: makes the context in which random numbers are those
    of one model, so that its dropout draws as in its own run.
    """

    def __init__(self, backbone: nn.Module, drawing: Drawing = lambda owner: contextlib.nullcontext()):
        self.backbone, self.drawing = backbone.train(), drawing
        self.shares: list[Share] = []  # of the pass in progress
        self.length = 0
        self._passes: list[_Pass] = []
        self._takes_cache = "use_cache" in inspect.signature(backbone.forward).parameters
        _route_attention(self)

    def add(self, owner: Hashable, backbone: nn.Module) -> None:
        """Let a model take part: its modules are used for its rows wherever they are not the shared ones."""
        _route(self, owner, self.backbone, backbone)

    def remove(self, owner: Hashable) -> None:
        """Let a model go on alone. After the last one, what passes without a backward pass have kept is freed."""
        routed = [module for module in self.backbone.modules() if isinstance(module, _Routed)]
        for module in routed:
            module.own.pop(owner, None)
        if not any(module.own for module in routed):
            self._passes.clear()

    def forward(self, batches: Mapping[Hashable, Inputs]) -> dict[Hashable, Any]:
        """The output of the backbone for the batch of each owner; of those that can be joined in one pass."""
        outputs: dict[Hashable, Any] = {}
        kinds: dict[Any, list[Hashable]] = {}
        for owner, inputs in batches.items():
            kinds.setdefault(kind(inputs), []).append(owner)
        for owners in kinds.values():
            outputs |= self._forward(owners, [batches[owner] for owner in owners])
        return outputs

    def backward(self) -> None:
        """Take the gradients of all leaves on to the adapters; a leaf without one counts as 0."""
        passes, self._passes = self._passes, []
        for each in passes:
            outputs = {name: output for name, output in each.outputs.items() if output.requires_grad}
            gradients = []
            for name, output in outputs.items():
                leaves = [each.leaves[share.owner][name] for share in each.shares]
                parts = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
                gradients.append(torch.cat([padded(part, output.shape[1]) for part in parts]))
            torch.autograd.backward(list(outputs.values()), gradients)

    def _forward(self, owners: list[Hashable], batches: list[Inputs]) -> dict[Hashable, Any]:
        inputs, start = joined(batches, self.backbone.config), 0
        self.shares, self.length = [], inputs["input_ids"].shape[1]
        for owner, batch in zip(owners, batches, strict=True):
            rows, length = batch["input_ids"].shape
            self.shares.append(Share(owner, slice(start, start + rows), length, batch.get("attention_mask")))
            start += rows
        output = self.backbone(**(inputs | ({"use_cache": False} if self._takes_cache else {})))
        outputs = {name: value for name, value in output.items() if value is not None}
        if other := [name for name, value in outputs.items() if not isinstance(value, torch.Tensor)]:
            raise NotImplementedError(f"Its backbone gives {', '.join(other)} as well, which is not split.")
        leaves = {
            share.owner: {
                name: share.of(value, self.has_columns(value)).detach().requires_grad_()
                for name, value in outputs.items()
            }
            for share in self.shares
        }
        self._passes.append(_Pass(outputs, self.shares, leaves))
        return {owner: type(output)(**own) for owner, own in leaves.items()}

    def has_columns(self, x: torch.Tensor) -> bool:
        """Whether a tensor is [rows, length, ...], not [rows, ...] (what a pooler takes, and gives)."""
        rows = self.shares[-1].rows.stop
        if x.shape[:2] == (rows, self.length) and (x.dim() > 2 or not x.is_floating_point()):
            return True
        if x.dim() == 2 and len(x) == rows:
            return False
        raise NotImplementedError(f"A tensor of shape {list(x.shape)} is not split by {rows} rows.")

    def each_share(self, compute: Callable[[Share], torch.Tensor], draws: bool, pads: bool = True) -> torch.Tensor:
        """What `compute` returns for each share below each other, [its rows, its length, ...]; pads: to one length."""
        parts = []
        for share in self.shares:
            with self.drawing(share.owner) if draws else contextlib.nullcontext():
                part = compute(share)
            parts.append(padded(part, self.length) if pads else part)
        return torch.cat(parts) if len(parts) > 1 else parts[0]


class _Routed(nn.Module):
    """Stands in the joint backbone for a module that is not the same in all models, or that draws random numbers."""

    def __init__(self, joint: JointBackbone, path: str, shared: nn.Module):
        super().__init__()
        self.shared, self._path = shared, path
        # Not as attributes: they are no submodules of this one.
        self.__dict__["_joint"], self.__dict__["own"] = joint, {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what a model reads of its module, such as a dropout's p
            return getattr(super().__getattr__("shared"), name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs:
            raise NotImplementedError(f"'{self._path}' takes more than one argument, and can't be split.")
        has_columns = self._joint.has_columns(x)
        modules = {share.owner: self.own.get(share.owner, self.shared) for share in self._joint.shares}
        if has_columns and self._is_plain_lora(modules.values()):
            return self._base_and_adapters(x, modules)
        draws = any(_drops(module) for module in modules.values())
        return self._joint.each_share(
            lambda share: modules[share.owner](share.of(x, has_columns)), draws, pads=has_columns
        )

    def _is_plain_lora(self, modules: Iterable[nn.Module]) -> bool:
        """Whether each module is the shared one or plain LoRA on it, without a kernel that does both at once."""
        plain = all(each is self.shared or (type(each) is Linear and plain_adapter(each)) for each in modules)
        return plain and not onednn_linear.is_sped_up(self.shared)

    def _base_and_adapters(self, x: torch.Tensor, modules: Mapping[Hashable, nn.Module]) -> torch.Tensor:
        """One product with the base's weight for all rows, which a GPU does in the time of a few; then each adapter."""
        base = self.shared(x)

        def product(share: Share) -> torch.Tensor:
            layer, own = modules[share.owner], share.of(x)
            if layer is self.shared:
                return base.new_zeros(*own.shape[:-1], base.shape[-1])
            name = plain_adapter(layer)
            a, b = layer.lora_A[name], layer.lora_B[name]
            return (b(a(own.to(a.weight.dtype))) * layer.scaling[name]).to(base.dtype)

        return base + self._joint.each_share(product, draws=False)


def _route(joint: JointBackbone, owner: Hashable, shared: nn.Module, own: nn.Module, path: str = "") -> None:
    """Put a `_Routed` wherever the model's own module is an adapter's, or drops out."""
    for name, child in own.named_children():
        mine, place = getattr(shared, name), f"{path}{name}"
        if not (isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)) or _is_dropout(child)):
            _route(joint, owner, mine.shared if isinstance(mine, _Routed) else mine, child, f"{place}.")
            continue
        if not isinstance(mine, _Routed):
            mine = _Routed(joint, place, mine)
            setattr(shared, name, mine)
        mine.own[owner] = child


def undrawn_dropout(model: nn.Module) -> str | None:
    """A dropout that a model applies by a function of its code, where it can't be drawn model by model; None without.

    Named by its option in the model's configuration.
    """
    rates = {module.p for module in model.modules() if _is_dropout(module)}
    options = model.config.get_text_config().to_dict()
    drops = {name: p for name, p in options.items() if "drop" in name and isinstance(p, float) and p > 0}
    elsewhere = (name for name in drops if not (_OF_ATTENTION.search(name) or _OF_HEADS.search(name)))
    return next((name for name in elsewhere if drops[name] not in rates), None)


def drops_attention(backbone: nn.Module) -> bool:
    """Whether a model drops out attention weights in training."""
    return any(value for name, value in backbone.config.to_dict().items() if _OF_ATTENTION.search(name))


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0


def _drops(module: nn.Module) -> bool:
    return any(_is_dropout(each) for each in module.modules())


def _route_attention(joint: JointBackbone) -> None:
    """Let attention that drops out weights be computed share by share: it draws for the shape of a batch."""
    implementation = joint.backbone.config._attn_implementation
    if implementation not in ALL_ATTENTION_FUNCTIONS:
        return  # in the model's own code
    for module in joint.backbone.modules():
        module.__dict__["_joint_attention"] = joint
    if implementation in _routed_attention:
        return
    packed_attention.install(implementation)  # before: it takes the packed mask of a share
    original = ALL_ATTENTION_FUNCTIONS[implementation]

    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        joint = module.__dict__.get("_joint_attention")
        if joint is None or not options.get("dropout"):
            return original(module, query, key, value, attention_mask, **options)

        def own(share: Share) -> torch.Tensor:
            parts = (x[share.rows, :, : share.length] for x in (query, key, value))
            mask = share.mask if hasattr(share.mask, "packed") else attention_mask
            if mask is attention_mask and mask is not None:
                mask = mask[share.rows if len(mask) > 1 else slice(None), :, : share.length, : share.length]
            return original(module, *parts, mask, **options)[0]

        return joint.each_share(own, draws=True), None

    ALL_ATTENTION_FUNCTIONS[implementation] = attention
    _routed_attention.add(implementation)
