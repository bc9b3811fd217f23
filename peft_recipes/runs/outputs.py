"""verification.safetensors: a few test inputs and the trained model's logits for them.

Whoever loads the adapter can compare the logits of the loaded copy with these.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    import torch
    import torch.nn as nn

OUTPUTS = "verification.safetensors"


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file. Raises RecipeError for a broken one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise RecipeError(f"{path} can't be read, it may be cut short: {error}.") from error


def verification_logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits for one input, in fp32 on the CPU; of a language model those of the last position."""
    import torch

    with torch.no_grad():
        logits = model(**inputs).logits.detach().float().cpu()
    return logits[:, -1] if logits.dim() == 3 else logits


def store_outputs(folder: Path, inputs: list[dict[str, torch.Tensor]], outputs: list[torch.Tensor]) -> None:
    """Write inputs and the trained model's logits for them to the adapter's folder."""
    from safetensors.torch import save_file

    tensors = {f"{key}.{i}": t.cpu().contiguous() for i, given in enumerate(inputs) for key, t in given.items()}
    save_file({**tensors, **{f"outputs.{i}": t.contiguous() for i, t in enumerate(outputs)}}, folder / OUTPUTS)


def stored_outputs(folder: Path) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]] | None:
    """The inputs and logits that `store_outputs` wrote; None without the file."""
    if not (folder / OUTPUTS).is_file():
        return None
    by_number: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in read_tensors(folder / OUTPUTS).items():
        key, _, number = name.rpartition(".")
        by_number.setdefault(number, {})[key] = tensor
    inputs = [by_number[number] for number in sorted(by_number)]
    return inputs, [tensors.pop("outputs") for tensors in inputs]
