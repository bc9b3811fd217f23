"""What a process keeps between the runs that it trains in turns: the untrained base, and the prepared data.

Nothing is kept until `keep` is called, which only a worker whose runs take turns does (comparison/worker.py). A run
gets a copy of the base and the random states as they are after loading it, so a new head and an adapter are
initialised as in a process of their own.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peft_recipes.hardware.environment import free_memory_bytes
from peft_recipes.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch.nn as nn

    from peft_recipes.data.prepared import Prepared
    from peft_recipes.tasks.base import Task

Base = tuple["nn.Module", list[str]]  # a model and the names of its new weights


class _Kept:
    """The last base, by its key, with the random states after it was loaded; the data, by its key."""

    def __init__(self) -> None:
        self.base: tuple[str, Base, Any] | None = None
        self.data: dict[str, tuple[Prepared, dict[str, Any]]] = {}
        self.memory_bytes = 0  # that the run in progress needs on the CPU, by the plan


_kept: _Kept | None = None


def keep(memory_bytes: int) -> None:
    """Keep from here on, as long as a run that needs so much memory still fits next to what is kept."""
    global _kept
    _kept = _kept or _Kept()
    _kept.memory_bytes = memory_bytes


def is_warm() -> bool:
    """Whether this process may have trained other runs."""
    return _kept is not None


def prepared(task: Task, data: Any, make: Callable[[], Prepared]) -> Prepared:
    """The task's prepared data: kept, or made and kept. data: the folder that it is read from, if any."""
    if _kept is None:
        return make()
    key = json.dumps([_what_loads(task.recipe), str(data)], default=str)
    if key not in _kept.data:
        made = make()
        _kept.data = {key: (made, {name: value for name, value in vars(task).items() if name != "recipe"})}
    made, found = _kept.data[key]
    vars(task).update(found)
    # A run adds notes, and dpo columns to the splits.
    return dataclasses.replace(made, splits=dict(made.splits), notes=list(made.notes))


def base(task: Task, fingerprint: str, quantise: str | None, seed: int, load: Callable[[], Base]) -> Base:
    """The untrained base: a copy of the kept one, or loaded and kept where there is room for both.

    The seed must be set before. A quantised base is always loaded.
    """
    if _kept is None or quantise:
        return load()
    key = json.dumps([_what_loads(task.recipe), fingerprint, seed], default=str)
    found, _kept.base = _kept.base, None
    if found is None or found[0] != key:
        del found  # before the other one is loaded
        loaded = load()
        states = _random_states()
    else:
        _, loaded, states = found
        _set_random_states(states)
    model, new_weights = loaded
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if free_memory_bytes() < max(_kept.memory_bytes, 2 * size):
        return loaded
    _kept.base = (key, loaded, states)
    return copy.deepcopy(model), list(new_weights)


def release() -> None:
    """Return the memory of the run that has ended to the system."""
    import gc

    import torch

    from peft_recipes.kernels import allocator

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    else:
        allocator.give_back()


def _what_loads(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that its base and its data depend on."""
    return {key: value for key, value in recipe.to_dict().items() if key not in ("arms", "training", "prompts")}


def _random_states() -> tuple[Any, ...]:
    import numpy
    import torch

    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), cuda


def _set_random_states(states: tuple[Any, ...]) -> None:
    import numpy
    import torch

    random.setstate(states[0])
    numpy.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state_all(states[3])
