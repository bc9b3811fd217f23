"""Which modules of a model a PEFT config targets: PEFT's own functions decide, so that training does the same."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

_CLASSIFICATION_HEADS = ["classifier", "score"]  # PEFT adds them to modules_to_save for TaskType.SEQ_CLS


def matched_modules(model: nn.Module, target_modules: PeftConfig | Iterable[str] | str) -> list[str]:
    """Return the names of the modules that get an adapter, in the model's order.

    Takes a PeftConfig, which is not changed (`exclude_modules`, `modules_to_save`, `layers_to_transform`, "all-linear"
    and PEFT's default targets apply as in training), or targets alone: names, or one regular expression. A method
    without target modules (prompt tuning) matches none. The model may be on the meta device and may carry adapters.
    Raises RecipeError if the config names no targets and PEFT has no default.
    """
    from peft import LoraConfig
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    model = _base_model(model)
    if hasattr(target_modules, "peft_type"):
        config = copy.deepcopy(target_modules)
    else:
        config = LoraConfig(target_modules=target_modules if isinstance(target_modules, str) else list(target_modules))
    if not hasattr(config, "target_modules"):
        return []
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if getattr(config, "task_type", None) == "SEQ_CLS" and hasattr(config, "modules_to_save"):
        config.modules_to_save = [*(config.modules_to_save or []), *_CLASSIFICATION_HEADS]
    if config.target_modules is None and not getattr(config, "target_parameters", None):
        config.target_modules = _default_targets(tuner, model)
    config = _maybe_include_all_linear_layers(config, model)
    is_target = getattr(tuner, "_check_target_module_exists", check_target_module_exists)
    return [name for name, _ in model.named_modules() if name and is_target(config, name)]


def unmatched(model: nn.Module, config: PeftConfig) -> list[str]:
    """Return the config's targets that match no module. PEFT only complains if none of them match (peft#1959)."""
    names = getattr(config, "target_modules", None)
    if isinstance(names, str):
        return [] if matched_modules(model, names) else [names]
    return [name for name in sorted(names or ()) if not matched_modules(model, [name])]


def target_names(model: nn.Module) -> list[str]:
    """Return the last part of the name of each layer that can carry an adapter (linear, convolution, embedding)."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in _layers(model)))


def nearest_modules(model: nn.Module, name: str, count: int = 3) -> list[str]:
    """Return the layer names closest to `name`, nearest first, with as many parts as `name`; empty if none is close."""
    parts = name.count(".") + 1
    endings = dict.fromkeys(".".join(layer.split(".")[-parts:]) for layer in _layers(model))
    return difflib.get_close_matches(name, list(endings), n=count, cutoff=0.5)


def _default_targets(tuner: type, model: nn.Module) -> list[str] | str:
    model_type = model.config.model_type
    default = getattr(tuner, "target_module_mapping", {}).get(model_type)
    if default is None:
        raise RecipeError(
            f"target_modules is not set, and PEFT has no default for model type '{model_type}'. Set it to some of "
            f"{', '.join(target_names(model))}, or to targets('{model_type}', 'all-linear')."
        )
    return default


def _layers(model: nn.Module) -> list[str]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    layer_types = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    return [name for name, module in _base_model(model).named_modules() if isinstance(module, layer_types)]


def _base_model(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
