"""verification.safetensors: a few test inputs and the logits of the trained model for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    import torch
    import torch.nn as nn


# What the trained model answered to a few test examples; whoever loads the adapter can ask its copy the same.
OUTPUTS = "verification.safetensors"


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise RecipeError(f"{path} can't be read, it may be cut short: {error}.") from error


def answers(model: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """What is stored of a model's logits for one input: of a language model those after the last token."""
    import torch

    with torch.no_grad():
        logits = model(**given).logits.detach().float().cpu()
    return logits[:, -1] if logits.dim() == 3 else logits


def store_outputs(folder: Path, inputs: list[dict[str, torch.Tensor]], outputs: list[torch.Tensor]) -> None:
    """Writes inputs and what the trained model gave for them beside the adapter."""
    from safetensors.torch import save_file

    tensors = {f"{key}.{i}": t.cpu().contiguous() for i, given in enumerate(inputs) for key, t in given.items()}
    save_file({**tensors, **{f"outputs.{i}": t.contiguous() for i, t in enumerate(outputs)}}, folder / OUTPUTS)


def stored_outputs(folder: Path) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]] | None:
    """The inputs and outputs that `store_outputs` wrote; None where there are none."""
    if not (folder / OUTPUTS).is_file():
        return None
    inputs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in read_tensors(folder / OUTPUTS).items():
        key, _, number = name.rpartition(".")
        inputs.setdefault(number, {})[key] = tensor
    rows = [inputs[number] for number in sorted(inputs)]
    return rows, [row.pop("outputs") for row in rows]
