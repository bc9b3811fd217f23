"""The base that several runs of one process share, and how their training steps meet on it.

Each run is an ordinary one: its own Trainer, data order, optimizer, schedule, log, checkpoints and guards, in a thread
of its own (lockstep.py). It gets a view of the base instead of loading one, and while it trains, its backbone's forward
and its backward pass wait for those of the other runs: one joint pass serves them all (kernels/joint_backbone.py).
Evaluation and everything after training is each run's own.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_recipes.kernels.joint_backbone import JointBackbone, drops_attention, undrawn_dropout, view
from peft_recipes.training.interruption import Interruption
from peft_recipes.training.lockstep import Lockstep

if TYPE_CHECKING:
    import torch.nn as nn
    from transformers import Trainer


_FORWARD, _BACKWARD = range(2)  # the kinds of requests; forward passes come first

Loaded = tuple["nn.Module", list[str]]  # a base, and the names of its new weights


class SharedBase:
    """One base for several runs. size: the number of runs that were started on it."""

    def __init__(self, size: int):
        self.size = size
        self.lockstep = Lockstep(self._answer)
        self.interruption = Interruption()  # of the process
        self._loaded: Loaded | None = None
        self._draws = False  # whether loading draws random numbers (a new head), which differ by seed
        self._joint: JointBackbone | None = None

    def load(self, load: Callable[[], Loaded]) -> Loaded:
        """A view of the base with the weights that `load` would return, and the names of its new ones."""
        if self._loaded is None:
            before = torch.get_rng_state()
            self._loaded = load()
            self._draws = not torch.equal(before, torch.get_rng_state())
        elif self._draws:
            model, new_weights = load()
            _tie(model, self._loaded[0])
            return model, new_weights
        model, new_weights = self._loaded
        return view(model), list(new_weights)

    def joint(self, device: torch.device) -> JointBackbone:
        """The joint backbone of the runs, on their device."""
        if self._joint is None:
            states = self.lockstep.states
            backbone = view(_backbone(self._loaded[0])).to(device).requires_grad_(False)
            self._joint = JointBackbone(backbone, lambda member: states[member].loaded())
        return self._joint

    def _answer(self, kind: int, values: dict[Any, Any]) -> dict[Any, Any]:
        if kind == _FORWARD:
            return self._joint.forward(values)
        self._joint.backward()
        return {}


@dataclass(eq=False)
class Member:
    """One run on a shared base. why_alone: why it trains without the others, if it does."""

    shared: SharedBase
    interruption: Interruption | None = None
    why_alone: str | None = None

    def load_base(self, interruption: Interruption, load: Callable[[], Loaded]) -> Loaded:
        """A view of the base for a run, which handles signals through `interruption`."""
        self.interruption, interruption.received = interruption, self.shared.interruption.received
        return self.shared.load(load)

    @contextlib.contextmanager
    def joined(self, trainer: Trainer, notes: list[str]) -> Iterator[None]:
        """Train together with the other runs within the block; alone, with a note, where this one's steps can't be."""
        self.why_alone = _why_alone(trainer)
        with contextlib.ExitStack() as held:
            held.callback(self.shared.lockstep.leave, self)
            if self.why_alone is None:
                self._join(trainer, held)
            else:
                notes.append(f"Trained by itself on the base that it shares: {self.why_alone}.")
                self.shared.lockstep.leave(self)
            yield

    def _join(self, trainer: Trainer, held: contextlib.ExitStack) -> None:
        lockstep, backbone, accelerator = self.shared.lockstep, _backbone(trainer.model), trainer.accelerator
        lockstep.states[self].device = trainer.args.device.type
        joint = self.shared.joint(trainer.args.device)
        joint.add(self, backbone)
        held.callback(joint.remove, self)
        own_forward, own_backward = backbone.forward, accelerator.backward
        signature = inspect.signature(own_forward)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not (backbone.training and torch.is_grad_enabled()):
                return own_forward(*args, **kwargs)
            return lockstep.meet(self, _FORWARD, _by_name(signature, args, kwargs))

        def backward(*args: Any, **kwargs: Any) -> None:
            own_backward(*args, **kwargs)
            lockstep.meet(self, _BACKWARD)

        backbone.forward, accelerator.backward = forward, backward
        held.callback(delattr, backbone, "forward")
        held.callback(delattr, accelerator, "backward")


def _why_alone(trainer: Trainer) -> str | None:
    """Why a run's steps can't be joined with others', in a few words; None where they can."""
    model, args = trainer.model, trainer.args
    backbone = _backbone(model)
    if backbone is None:
        return "its model has no backbone under a head"
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        return "its adapter puts virtual tokens before the input"
    for option in ("gradient_checkpointing", "torch_compile", "neftune_noise_alpha"):
        if getattr(args, option, None):
            return f"training.{option} is set"
    if trainer.args.n_gpu > 1:
        return "it trains on several GPUs"
    hooked = (name for name, each in backbone.named_modules() if each._forward_hooks or each._forward_pre_hooks)
    if (name := next(hooked, None)) is not None:
        return f"its adapter acts through a hook of '{name}'"
    if (option := undrawn_dropout(model)) is not None:
        return f"its base drops out ({option}) in a way that can't be drawn run by run"
    if drops_attention(backbone) and backbone.config._attn_implementation not in ALL_ATTENTION_FUNCTIONS:
        return "its base drops out attention weights in code of its own"
    return None


def _backbone(model: nn.Module) -> nn.Module | None:
    """The model without what follows its last hidden state."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, getattr(base, "base_model_prefix", "") or " ", None)


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    bound = signature.bind(*args, **kwargs)
    names = {name: value for name, value in bound.arguments.items() if value is not None}
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            names |= names.pop(parameter.name, {})
    return names


def _tie(model: nn.Module, resident: nn.Module) -> None:
    """Let a model use the parameters of the resident one wherever they are equal."""
    modules = dict(resident.named_modules())
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            other = modules[name]._parameters[key]
            if parameter is not None and torch.equal(parameter, other.to(parameter.device)):
                module._parameters[key] = other
