"""Full and sharded state dicts of models and optimizers under FSDP2. Collective: every rank must call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from peft_recipes.distributed import processes

if TYPE_CHECKING:
    from torch.optim import Optimizer


def full_tensor(value: torch.Tensor) -> torch.Tensor:
    """The full value of a tensor, gathered where it is sharded."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def local_shard(value: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor."""
    value = value.detach()
    return value.to_local() if isinstance(value, DTensor) else value


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter of a model is sharded."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def reshard(model: nn.Module) -> None:
    """Free the parameters that FSDP2 keeps gathered after a forward pass, so that every parameter is sharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def trainable_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trainable parameters and the buffers, gathered on the CPU of rank 0; empty on the other ranks.

    Tensors are gathered one at a time, and the frozen base never: 70B parameters would fill a machine's memory to
    store an adapter of 100 MB.
    """
    reshard(model)
    stored = model.state_dict()
    tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in stored}
    state = {}
    for name, value in tensors.items():
        full = full_tensor(value)
        if processes.is_rank_zero():
            state[name] = full.cpu()
    return state


def sum_over_ranks(sums: dict[str, int], model: nn.Module) -> dict[str, int]:
    """Each entry summed over the ranks where the model is sharded, with int64's overflow."""
    if not is_sharded(model):
        return sums
    totals = torch.tensor(processes.all_gather(list(sums.values())), dtype=torch.int64).sum(0).tolist()
    return dict(zip(sums, totals, strict=True))


def full_state_dict(state: Any) -> Any:
    """An optimizer's state dict with every tensor gathered on the CPU of rank 0; without tensors on other ranks."""
    if isinstance(state, torch.Tensor):
        value = full_tensor(state)
        return value.cpu() if processes.is_rank_zero() else None
    if isinstance(state, dict):
        return {key: full_state_dict(value) for key, value in state.items()}
    return [full_state_dict(value) for value in state] if isinstance(state, list) else state


def shard_state_dict(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """A full state dict, sharded as the optimizer's parameters are. Every rank has read it, so nothing is sent."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        p = parameters[index]
        for key, value in values.items():
            if isinstance(p, DTensor) and isinstance(value, torch.Tensor) and value.shape == p.shape:
                values[key] = distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return state
