"""What several processes need and send: memory of each, bytes a step, by the way they share the work.

The formulas and where they come from stand in docs/scaling.md, beside the bytes that real runs sent.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from peft_recipes.errors import RecipeError, unknown

KINDS = ("DDP", "FSDP2", "ZeRO-2")
_BUCKET = 4 * 500_000_000  # bytes of DeepSpeed's reduce bucket of 5e8 numbers
_UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Spread:
    """How a run's work is shared. kind: "DDP", "FSDP2", "ZeRO-2" or None for one process. memory: of each process in
    bytes, None for the machine's. on_one: how many processes (or runs) share one machine's memory."""

    kind: str | None = None
    processes: int = 1
    memory: int | None = None
    on_one: int = 1


@dataclass(frozen=True)
class Sizes:
    """Bytes of one arm's step in one process that shares with nobody.

    weights, gradients and optimizer of the whole model; activations of one process's batch. layer: of the largest
    block's weights. layer_gradients: of its gradients. kept: of the weights that FSDP2 gathers once and keeps for the
    backward pass (last norm, head, an embedding that is tied to it). learning: of the weights that learn. wire: what
    FSDP2 gathers and shares out, as a part of the weights' own bytes: a half where it computes in bf16 on fp32 weights.
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

    buffers: what sharing itself takes. DDP holds the gradients a second time, in the buckets that it sends. FSDP2 holds
    one layer whole while it is computed and the next while it comes, one layer's gradients before they are shared
    out, and what it keeps gathered. ZeRO-2 holds a bucket of gradients.
    """
    n = processes if kind in ("FSDP2", "ZeRO-2") else 1
    weights = sizes.weights // (n if kind == "FSDP2" else 1)
    parts = {"weights": weights, "gradients": sizes.gradients // n, "optimizer": sizes.optimizer // n,
             "activations": sizes.activations, "buffers": 0}  # fmt: skip
    if processes > 1 and kind == "DDP":
        parts["buffers"] = sizes.gradients
    elif processes > 1 and kind == "FSDP2":
        parts["buffers"] = int(sizes.wire * (2 * sizes.layer + sizes.layer_gradients + sizes.kept))
    elif processes > 1 and kind == "ZeRO-2":
        parts["buffers"] = min(sizes.gradients, _BUCKET)
    return {**parts, "total": sum(parts.values())}


def traffic(sizes: Sizes, kind: str | None, processes: int, accumulated: int = 1) -> dict[str, int]:
    """Bytes that one process sends in an optimiser step, by collective, with ring algorithms, and their total.

    Of n processes, a ring sends (n - 1)/n of the whole tensor for an all-gather or a reduce-scatter, twice that for an
    all-reduce. FSDP2 gathers each layer twice a batch, for its forward and its backward pass, frozen or not.
    """
    if processes == 1 or kind is None:
        return {"total": 0}
    share = (processes - 1) / processes
    if kind == "DDP":
        parts = {"all-reduce of gradients": 2 * share * sizes.gradients}
    elif kind == "FSDP2":
        gathers = (2 * sizes.weights - sizes.kept) * accumulated
        parts = {"all-gather of weights": share * sizes.wire * gathers,
                 "reduce-scatter of gradients": share * sizes.wire * sizes.gradients}  # fmt: skip
    else:
        parts = {"reduce-scatter of gradients": share * sizes.gradients * accumulated,
                 "all-gather of what learnt": share * sizes.learning}  # fmt: skip
    whole = {name: int(size) for name, size in parts.items()}
    return {**whole, "total": sum(whole.values())}


def model_sizes(model: Any, step: dict[str, int], lower: bool = False) -> Sizes:
    """The sizes of a model (also on the meta device) with an arm on it, and of its step as one process does it.

    lower: whether it computes in bf16.
    """
    layers, kept = _units(model)
    learning = _bytes(p for p in model.parameters() if p.requires_grad)
    return Sizes(
        weights=step["weights"],
        gradients=step["gradients"],
        optimizer=step["optimizer"],
        activations=step["activations"],
        layer=max((_bytes(layer.parameters()) for layer in layers), default=0),
        layer_gradients=max((_bytes(p for p in layer.parameters() if p.requires_grad) for layer in layers), default=0),
        kept=kept,
        learning=learning,
        wire=0.5 if lower else 1.0,
    )


def _embeddings(base: Any, side: str) -> Any:
    """A model's input or output embeddings; None where it has none, as one of images."""
    try:
        return getattr(base, f"get_{side}_embeddings", lambda: None)()
    except NotImplementedError:
        return None


def _units(model: Any) -> tuple[list[Any], int]:
    """The layers that FSDP2 gathers one at a time, and the bytes of what it keeps gathered."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in names]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    outside = {id(p): p for p in model.parameters() if id(p) not in inside}
    embedding, head = (_embeddings(base, side) for side in ("input", "output"))
    first, last = (getattr(module, "weight", None) for module in (embedding, head))
    if first is not None and first is not last:
        outside.pop(id(first), None)  # a unit of its own: given back after the forward pass
    return layers, _bytes(outside.values())


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in parameters}.values())


def kind_of(name: str) -> str:
    """The way of sharing that a shipped configuration's name, or file, or the way's own name says."""
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


def planned_spread(processes: int, config: str, per_process_memory: str) -> Spread | None:
    """What a plan is asked for. Raises RecipeError for a configuration or a size that is none."""
    memory = byte_count(per_process_memory) if per_process_memory else None
    if processes == 1:
        if config:
            raise RecipeError(f"--config {config}: say over how many, too: --processes 8.")
        return Spread(memory=memory) if memory else None
    return Spread(kind_of(config or "ddp"), processes, memory=memory)


def byte_count(text: str) -> int:
    """Bytes of "80GB", "40 GiB", "512MB". Raises RecipeError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise RecipeError(f"--per-process-memory {text}: expected a size, as in 80GB, 24GiB or 512MB.")
    return int(float(found[1]) * _UNITS[found[2]])


def shared_step(
    model: Any, step: dict[str, int], spread: Spread, accumulated: int = 1, lower: bool = False
) -> dict[str, Any]:
    """A process's memory and traffic in a step, as a plan tells it."""
    sizes = model_sizes(model, step, lower)
    return {
        **memory(sizes, spread.kind, spread.processes),
        "traffic": traffic(sizes, spread.kind, spread.processes, accumulated),
        "sizes": asdict(sizes),
    }
