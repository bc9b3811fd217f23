"""Models and optimizers that FSDP2 spreads over processes, made whole and spread again. All processes must call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from peft_recipes.distributed import processes

if TYPE_CHECKING:
    from torch.optim import Optimizer


def tensor(given: torch.Tensor) -> torch.Tensor:
    """A tensor's whole value, gathered where it is spread."""
    found = given.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


def settle(model: nn.Module) -> None:
    """Gives back what FSDP2 still holds gathered of a forward pass, so that every weight is in its parts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_spread(model: nn.Module) -> bool:
    """Whether any weight of a model is held in parts."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def learnt(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that learn, and the buffers, whole and on the CPU, in the main process; empty in the others.

    One at a time, and never the frozen base: a base of 70B, gathered to store an adapter of 100 MB, fills a machine.
    """
    settle(model)
    found, stored = {}, model.state_dict()
    buffers = ((name, held) for name, held in model.named_buffers() if name in stored)
    for name, p in [*((name, p) for name, p in model.named_parameters() if p.requires_grad), *buffers]:
        value = tensor(p)
        if processes.is_main():
            found[name] = value.cpu()
    return found


def own_part(given: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    found = given.detach()
    return found.to_local() if isinstance(found, DTensor) else found


def added_up(sums: dict[str, int], model: nn.Module) -> dict[str, int]:
    """Each process's numbers, added up where the model's weights are held in parts."""
    if not is_spread(model):
        return sums
    each = processes.gathered(list(sums.values()))
    wrapped = ((sum(same) + 2**63) % 2**64 - 2**63 for same in zip(*each, strict=True))  # as int64 adds
    return dict(zip(sums, wrapped, strict=True))


def gathered(state: Any) -> Any:
    """An optimizer's state_dict with every tensor whole and on the CPU; without tensors in other processes."""
    if isinstance(state, torch.Tensor):
        value = tensor(state)
        return value.cpu() if processes.is_main() else None
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    return [gathered(value) for value in state] if isinstance(state, list) else state


def spread(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """A whole state_dict as this process's part of an optimizer takes it. Nothing is sent: each has read the whole."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        p = parameters[number]
        for key, value in values.items():
            if isinstance(p, DTensor) and isinstance(value, torch.Tensor) and value.shape == p.shape:
                place = value.to(p.device)
                values[key] = distribute_tensor(place, p.device_mesh, p.placements, src_data_rank=None)
    return state
