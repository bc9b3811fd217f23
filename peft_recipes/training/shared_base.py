"""The base that several runs of one process share, and how their training steps meet on it.

Each run is an ordinary one: its own Trainer, data order, optimizer, schedule, log, checkpoints and guards, in a thread
of its own (lockstep.py). It gets a view of the base instead of loading one, and while it trains, its backbone's forward
and its backward pass wait for those of the other runs: one joint pass serves them all (kernels/joint_backbone.py).
Evaluation and everything after training is each run's own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_recipes.errors import says_out_of_memory
from peft_recipes.kernels.joint_backbone import JointBackbone, drops_attention, undrawn_dropout, view
from peft_recipes.training.interruption import Interruption
from peft_recipes.training.lockstep import Lockstep, ProcessState

if TYPE_CHECKING:
    import torch.nn as nn
    from transformers import Trainer


_FORWARD, _BACKWARD = range(2)  # the kinds of requests; forward passes come first
_ERROR_LENGTH = 150  # characters of an error in a note
_ROUNDING, _HALF_ROUNDING = 1e-4, 5e-2  # of a backbone's output, as a share of its largest value

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
        if kind == _BACKWARD:
            self._joint.backward()
            return {}
        try:
            return self._joint.forward(values)
        except Exception as error:
            lacks_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or says_out_of_memory(str(error))
            if lacks_memory or any(member.proved for member in values):
                raise
            return dict.fromkeys(values, " ".join(str(error).split())[-_ERROR_LENGTH:])


@dataclass(eq=False)
class Member:
    """One run on a shared base.

    proved: whether a joint pass has given what the run's own gives.
    """

    shared: SharedBase
    interruption: Interruption | None = None
    proved: bool = False

    def load_base(self, interruption: Interruption, load: Callable[[], Loaded]) -> Loaded:
        """A view of the base for a run, which handles signals through `interruption`."""
        self.interruption, interruption.received = interruption, self.shared.interruption.received
        interruption.raise_received()
        return self.shared.load(load)

    @contextlib.contextmanager
    def joined(self, trainer: Trainer, notes: list[str]) -> Iterator[None]:
        """Train together with the other runs within the block; alone, with a note, where this one's steps can't be."""
        with contextlib.ExitStack() as held:
            held.callback(self.shared.lockstep.leave, self)

            def go_alone(why: str) -> None:
                notes.append(f"Trained by itself on the base that it shares: {why}.")
                held.close()

            if (why := _why_alone(trainer)) is not None:
                go_alone(why)
            else:
                self._join(trainer, held, go_alone)
            yield

    def _join(self, trainer: Trainer, held: contextlib.ExitStack, go_alone: Callable[[str], None]) -> None:
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
            own = functools.partial(own_forward, *args, **kwargs)
            ask = functools.partial(lockstep.meet, self, _FORWARD, _by_name(signature, args, kwargs))
            return ask() if self.proved else self._prove(own, ask, ProcessState(trainer.args.device.type), go_alone)

        def backward(*args: Any, **kwargs: Any) -> None:
            own_backward(*args, **kwargs)
            if self.proved:
                lockstep.meet(self, _BACKWARD)
            else:  # the model has not called its backbone
                go_alone("its model computes by parts of its backbone")

        backbone.forward, accelerator.backward = forward, backward
        held.callback(delattr, backbone, "forward")
        held.callback(delattr, accelerator, "backward")

    def _prove(self, own: Callable[[], Any], ask: Callable[[], Any], state: ProcessState, go_alone: Any) -> Any:
        """The output for the run's first batch: of the joint pass, if that is what the run's own gives; else its own.

        Dropout draws the same in both: the random states are set back. This notices a model whose code is not made for
        rows of several batches; an untrained LoRA changes nothing yet.
        """
        state.store()
        with torch.no_grad():
            expected = getattr(own(), "last_hidden_state", None)
        torch.clear_autocast_cache()  # of casts without a graph, which older versions of torch would use again
        state.load()
        answer = ask()
        why = answer if isinstance(answer, str) else "its backbone gives no last hidden state"
        if not isinstance(answer, str) and expected is not None:
            why = _difference(answer.last_hidden_state, expected)
        if why is None:
            self.proved = True
            return answer
        state.load()
        go_alone(why)
        return own()


def _difference(joint: torch.Tensor, own: torch.Tensor) -> str | None:
    """What two outputs for a batch differ by; None where that is rounding."""
    half = own.dtype != torch.float32 or torch.is_autocast_enabled(own.device.type)
    tolerance = _HALF_ROUNDING if half else _ROUNDING
    size = float(own.abs().amax().nan_to_num(posinf=1.0)) or 1.0
    if torch.allclose(joint, own, rtol=0, atol=tolerance * size, equal_nan=True):
        return None
    return f"the joint output for a first batch differs by {float((joint - own).abs().amax()) / size:.1e}"


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
        return f"a hook acts on its '{name}'"
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
