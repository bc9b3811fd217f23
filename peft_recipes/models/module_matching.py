"""Which modules of a model a PEFT config's targets hit: asked of PEFT itself, so that the answer is what it will do."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

_CLASSIFICATION_HEADS = ["classifier", "score"]  # what PEFT adds to modules_to_save for TaskType.SEQ_CLS


def matched_modules(model: nn.Module, target_modules: PeftConfig | Iterable[str] | str) -> list[str]:
    """The names of the modules that get an adapter, in the model's order.

    Takes a whole PeftConfig (then `exclude_modules`, `modules_to_save`, `layers_to_transform`, "all-linear" and PEFT's
    own default targets count as they will in training; the config is left as it was) or targets alone: names, or one
    regular expression. A method without target modules (prompt tuning) hits none. The model may be on the meta device,
    and may already carry adapters. Raises RecipeError when the config names no targets and PEFT has no default.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = _config(target_modules)
    if not hasattr(config, "target_modules"):
        return []
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if getattr(config, "task_type", None) == "SEQ_CLS" and hasattr(config, "modules_to_save"):
        config.modules_to_save = [*(config.modules_to_save or []), *_CLASSIFICATION_HEADS]
    if config.target_modules is None and not getattr(config, "target_parameters", None):
        config.target_modules = _default_targets(tuner, model)
    config = _maybe_include_all_linear_layers(config, model)
    hits = getattr(tuner, "_check_target_module_exists", check_target_module_exists)
    return [name for name, _ in model.named_modules() if name and hits(config, name)]


def unmatched(model: nn.Module, target_modules: PeftConfig | Iterable[str] | str) -> list[str]:
    """The targets that hit no module of the model. PEFT itself complains only when all of them miss (peft#1959)."""
    names = getattr(target_modules, "target_modules", target_modules)
    if names is None or hasattr(names, "peft_type"):
        return []
    if isinstance(names, str):
        return [] if matched_modules(model, names) else [names]
    ordered = sorted(names) if isinstance(names, (set, frozenset)) else names  # PEFT turns lists into sets
    return [name for name in ordered if not matched_modules(model, [name])]


def target_names(model: nn.Module) -> list[str]:
    """The last parts of the names of all layers that adapters commonly sit on (linear, convolution, embedding)."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in _layers(model)))


def nearest_modules(model: nn.Module, name: str, count: int = 3) -> list[str]:
    """The real layers whose names are closest to `name`, nearest first, in as many parts as `name` has.

    An empty list when none is close; `target_names` then lists what there is.
    """
    parts = name.count(".") + 1
    ends = dict.fromkeys(".".join(layer.split(".")[-parts:]) for layer in _layers(model))
    return difflib.get_close_matches(name, list(ends), n=count, cutoff=0.5)


def _config(target_modules: PeftConfig | Iterable[str] | str) -> PeftConfig:
    from peft import LoraConfig

    if hasattr(target_modules, "peft_type"):
        return copy.deepcopy(target_modules)
    single = isinstance(target_modules, str)
    return LoraConfig(target_modules=target_modules if single else list(target_modules))


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

    kinds = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]
