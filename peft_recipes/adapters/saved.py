"""A saved adapter, ours or anyone's: read without running anything that is in it; and what it answered when saved."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft_recipes.errors import RecipeError, unknown
from peft_recipes.runs.outputs import read_tensors

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig


CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


@dataclass
class SavedAdapter:
    """An adapter's folder, its PeftConfig and its tensors by name, on the CPU."""

    folder: Path
    config: PeftConfig
    tensors: dict[str, torch.Tensor]


def read_adapter(folder: str | Path) -> SavedAdapter:
    """An adapter's files. Raises RecipeError, naming the file, where the folder is no adapter or a file is broken."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise RecipeError(_no_adapter(folder))
    config = _read_config(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).is_file():
            raise RecipeError(
                f"{folder / PICKLE} is a pickle, which runs code when it is opened, so it is not. Where you trust it: "
                f"load it with torch.load(..., weights_only=True) and write it with safetensors.torch.save_file to "
                f"{WEIGHTS}."
            )
        raise RecipeError(f"{folder} has no {WEIGHTS}: the adapter's weights are missing.")
    return SavedAdapter(folder, config, read_tensors(folder / WEIGHTS))


def _no_adapter(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is no folder."
    below = sorted({p.parent for p in folder.rglob(CONFIG)})[:4]
    if below:
        return f"{folder} holds no {CONFIG}. There are adapters in: {', '.join(map(str, below))}."
    full = " It holds a full model." if list(folder.glob("model*.safetensors")) else ""
    return f"{folder} is no adapter: there is no {CONFIG}.{full}"


def _read_config(path: Path) -> PeftConfig:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RecipeError(f"{path} can't be read: {error}.") from error
    if not isinstance(said, dict) or not isinstance(said.get("peft_type"), str):
        raise RecipeError(f"{path} names no peft_type, so it is no adapter's configuration.")
    if said["peft_type"] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = [kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING]
        raise RecipeError(unknown("peft_type", said["peft_type"], known, str(path)))
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[said["peft_type"]]
    known = {field.name for field in dataclasses.fields(kind)}  # a newer PEFT's further options are left out
    try:
        return kind(**{key: value for key, value in said.items() if key in known and key != "peft_type"})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecipeError(f"{path}: PEFT refuses it: {' '.join(str(error).split())}") from error
