"""Read the files of a saved adapter without running any code that is in them."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError, unknown
from peft_recipes.runs.folder import RUN_FILE
from peft_recipes.runs.outputs import read_tensors

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig


CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
RECIPE_FILE = "recipe.yaml"


@dataclass
class SavedAdapter:
    """An adapter's folder, its PeftConfig, and its tensors by name, on the CPU.

    unknown_options: what is set in its adapter_config.json and the installed PEFT does not know.
    """

    folder: Path
    config: PeftConfig
    tensors: dict[str, torch.Tensor]
    unknown_options: list[str] = dataclasses.field(default_factory=list)

    @property
    def method(self) -> str:
        """PEFT's name of its method: "LORA", "IA3", ..."""
        return self.config.peft_type.value

    @property
    def unknown_note(self) -> str:
        """A sentence that names the unknown options; empty if there are none."""
        import peft

        names = ", ".join(self.unknown_options)
        return f"PEFT {peft.__version__} does not know {names} of {CONFIG} and leaves it out" if names else ""

    @property
    def initialised_from_base(self) -> bool:
        """Whether PEFT computes the initial A and B from the base's weights, each time that it loads the adapter."""
        init = getattr(self.config, "init_lora_weights", None)
        return isinstance(init, str) and init.lower() not in ("gaussian", "eva")

    @property
    def changes_base(self) -> bool:
        """Whether loading the adapter writes to the base's weights: PiSSA and OLoRA subtract their initial A and B, and
        trained biases replace the base's.
        """
        init = str(getattr(self.config, "init_lora_weights", None)).lower()
        return init.startswith(("pissa", "olora")) or self.trains_biases

    @property
    def trains_biases(self) -> bool:
        """Whether the base's biases were trained and saved with the adapter."""
        return str(getattr(self.config, "bias", "none")).lower() not in ("none", "false")

    @property
    def is_run(self) -> bool:
        """Whether the folder is a run of peft-recipes, whose recipe names the data that it was tested on."""
        return (self.folder / RECIPE_FILE).is_file()

    @functools.cached_property
    def run(self) -> dict[str, Any]:
        """Its run.json; empty if there is none, or if it is broken."""
        try:
            data = json.loads((self.folder / RUN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Read an adapter's files. Raises RecipeError, naming the file, if the folder is no adapter or a file is broken."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise RecipeError(_no_adapter(folder))
    config, unknown_options = _read_config(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).is_file():
            raise RecipeError(
                f"{folder / PICKLE} is a pickle, which runs code when it is opened, so it is not opened. If you trust "
                f"it: load it with torch.load(..., weights_only=True) and write it with safetensors.torch.save_file to "
                f"{WEIGHTS}."
            )
        raise RecipeError(f"{folder} has no {WEIGHTS}: the adapter's weights are missing.")
    return SavedAdapter(folder, config, read_tensors(folder / WEIGHTS), unknown_options)


def _no_adapter(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is no folder."
    below = sorted({p.parent for p in folder.rglob(CONFIG)})[:4]
    if below:
        return f"{folder} holds no {CONFIG}. There are adapters in: {', '.join(map(str, below))}."
    full = " It holds a full model." if list(folder.glob("model*.safetensors")) else ""
    return f"{folder} is no adapter: there is no {CONFIG}.{full}"


def _read_config(path: Path) -> tuple[PeftConfig, list[str]]:
    """Return the configuration, without the options of a newer PEFT, and the names of those that are set."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RecipeError(f"{path} can't be read: {error}.") from error
    if not isinstance(data, dict) or not isinstance(data.get("peft_type"), str):
        raise RecipeError(f"{path} names no peft_type, so it is no adapter's configuration.")
    if data["peft_type"] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = [peft_type.value for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING]
        raise RecipeError(unknown("peft_type", data["peft_type"], known, str(path)))
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[data["peft_type"]]
    known = {field.name for field in dataclasses.fields(config_class)}
    options = {key: value for key, value in data.items() if key in known and key != "peft_type"}
    try:
        return config_class(**options), [key for key, value in data.items() if key not in known and value]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecipeError(f"{path}: PEFT refuses it: {' '.join(str(error).split())}") from error
