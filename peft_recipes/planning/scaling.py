"""Memory of each process and bytes sent in a step, for DDP, FSDP2 and ZeRO-2.

docs/scaling.md gives the sources of the formulas, and the bytes that real runs sent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from peft_recipes.errors import RecipeError, unknown

KINDS = ("DDP", "FSDP2", "ZeRO-2")
_BUCKET = 4 * 500_000_000  # bytes of DeepSpeed's reduce bucket of 5e8 numbers
_UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Spread:
    """How a run is spread over processes.

    kind: "DDP", "FSDP2", "ZeRO-2" or None for one process. memory: of each process in bytes, None for the machine's.
    on_one: how many processes (or runs) share one machine's memory. libraries: with `memory`, whether it also
    holds the libraries of a process, as a CPU's does.
    """

    kind: str | None = None
    processes: int = 1
    memory: int | None = None
    on_one: int = 1
    libraries: bool = False


@dataclass(frozen=True)
class Sizes:
    """Bytes of one arm's step in a single process.

    weights, gradients and optimizer of the complete model; activations of one process's batch. layer: weights of the
    largest block. layer_gradients: its gradients. kept: weights that FSDP2 gathers once and keeps for the backward pass
    (last norm, head, an embedding that is tied to it). learning: trainable weights. wire: what FSDP2 sends for each
    byte of the weights: a half where it computes in bf16 on fp32 weights.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    layer: int
    layer_gradients: int
    kept: int
    learning: int
    wire: float = 1.0


def memory(sizes: Sizes, kind: str | None, processes: int) -> dict[str, int]:
    """Bytes of one process at its peak: weights, gradients, optimizer, activations, buffers and their total.

    buffers: what sharding itself takes. DDP holds the gradients a second time, in its communication buckets. FSDP2
    holds one gathered layer while it prefetches the next, one layer's gradients before they are reduced, and what it
    keeps gathered. ZeRO-2 holds a bucket of gradients.
    """
    n = processes if kind in ("FSDP2", "ZeRO-2") else 1
    parts = {
        "weights": sizes.weights // (n if kind == "FSDP2" else 1),
        "gradients": sizes.gradients // n,
        "optimizer": sizes.optimizer // n,
        "activations": sizes.activations,
        "buffers": 0,
    }
    if processes > 1 and kind == "DDP":
        parts["buffers"] = sizes.gradients
    elif processes > 1 and kind == "FSDP2":
        parts["buffers"] = int(sizes.wire * (2 * sizes.layer + sizes.layer_gradients + sizes.kept))
    elif processes > 1 and kind == "ZeRO-2":
        parts["buffers"] = min(sizes.gradients, _BUCKET)
    return {**parts, "total": sum(parts.values())}


def traffic(sizes: Sizes, kind: str | None, processes: int, accumulated: int = 1) -> dict[str, int]:
    """Bytes that one process sends in an optimizer step, by collective, with ring algorithms, and their total.

    With n processes, a ring sends (n - 1)/n of the tensor for an all-gather or a reduce-scatter, twice that for an
    all-reduce. FSDP2 gathers each layer twice a batch, for its forward and its backward pass, frozen or not.
    accumulated: batches in a step.
    """
    if processes == 1 or kind is None:
        return {"total": 0}
    share = (processes - 1) / processes
    if kind == "DDP":
        parts = {"all-reduce of gradients": 2 * share * sizes.gradients}
    elif kind == "FSDP2":
        gathers = (2 * sizes.weights - sizes.kept) * accumulated
        parts = {
            "all-gather of weights": share * sizes.wire * gathers,
            "reduce-scatter of gradients": share * sizes.wire * sizes.gradients,
        }
    else:
        parts = {
            "reduce-scatter of gradients": share * sizes.gradients * accumulated,
            "all-gather of what learnt": share * sizes.learning,
        }
    sent = {name: int(size) for name, size in parts.items()}
    return {**sent, "total": sum(sent.values())}


def model_sizes(model: Any, step: dict[str, int], lower: bool = False) -> Sizes:
    """The sizes of a model with an arm on it (the meta device will do), and of its step in a single process.

    lower: whether it computes in bf16.
    """
    layers, kept = _units(model)
    trainable = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]
    return Sizes(
        **{key: step[key] for key in ("weights", "gradients", "optimizer", "activations")},
        layer=max((_bytes(layer.parameters()) for layer in layers), default=0),
        layer_gradients=max(map(_bytes, trainable), default=0),
        kept=kept,
        learning=_bytes(p for p in model.parameters() if p.requires_grad),
        wire=0.5 if lower else 1.0,
    )


def shared_step(
    model: Any, step: dict[str, int], spread: Spread, accumulated: int = 1, lower: bool = False
) -> dict[str, Any]:
    """Memory and traffic of one process in a step of a spread run; the other parameters as in `model_sizes`."""
    sizes = model_sizes(model, step, lower)
    sent = traffic(sizes, spread.kind, spread.processes, accumulated)
    return {**memory(sizes, spread.kind, spread.processes), "traffic": sent}


def _units(model: Any) -> tuple[list[Any], int]:
    """The layers that FSDP2 gathers one at a time, and the bytes of what it keeps gathered."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in names]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    outside = {id(p): p for p in model.parameters() if id(p) not in inside}
    first, last = (getattr(_embeddings(base, side), "weight", None) for side in ("input", "output"))
    if first is not None and first is not last:
        outside.pop(id(first), None)  # a unit of its own: resharded after the forward pass
    return layers, _bytes(outside.values())


def _embeddings(base: Any, side: str) -> Any:
    """A model's input or output embeddings; None for a model without any, such as one of images."""
    try:
        return getattr(base, f"get_{side}_embeddings", lambda: None)()
    except NotImplementedError:
        return None


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in parameters}.values())


def planned_spread(processes: int, config: str, per_process_memory: str) -> Spread | None:
    """The Spread that the options of `peft-recipes plan` describe; None for one process without a memory of its own.

    Raises RecipeError for an unknown configuration or a malformed size.
    """
    memory = byte_count(per_process_memory) if per_process_memory else None
    if processes == 1:
        if config:
            raise RecipeError(f"--config {config}: say over how many, too: --processes 8.")
        return Spread(memory=memory) if memory else None
    return Spread(kind_of(config or "ddp"), processes, memory=memory)


def kind_of(name: str) -> str:
    """The kind of sharding that the name or file of a launch configuration, or the kind's own name, stands for."""
    for kind in KINDS:
        if name.lower() in (kind.lower(), kind.lower().replace("-", "")):
            return kind
    from peft_recipes.distributed.launch import launch_files, read_launch

    try:
        return read_launch(name, 2).distributed_type
    except RecipeError as error:
        if not name.endswith((".yaml", ".yml")):
            raise RecipeError(unknown("launch configuration", name, launch_files(), "--config")) from None
        raise error


def byte_count(text: str) -> int:
    """Bytes of "80GB", "40 GiB", "512MB". Raises RecipeError."""
    size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if size is None or size[2] not in _UNITS or float(size[1]) <= 0:
        raise RecipeError(f"--per-process-memory {text}: expected a size, as in 80GB, 24GiB or 512MB.")
    return int(float(size[1]) * _UNITS[size[2]])
