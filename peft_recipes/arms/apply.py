"""Apply an arm to a base model: make its weights trainable, and count them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from peft_recipes.arms.forward_check import check_forward
from peft_recipes.errors import RecipeError
from peft_recipes.models.architecture_table import ARCHITECTURES, GROUPS, Architecture, head_modules
from peft_recipes.models.architectures import architecture_of, parameters_by_component, targets
from peft_recipes.models.batch_norms import hold_statistics
from peft_recipes.models.meta import meta_model
from peft_recipes.models.module_matching import unmatched
from peft_recipes.models.quantisation import is_quantised
from peft_recipes.models.virtual_tokens import read_last_token
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.options import TASKS
from peft_recipes.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch.nn as nn
    from peft import PeftConfig
    from transformers import PretrainedConfig, PreTrainedModel

# The exceptions by which PEFT's methods reject a model.
REFUSALS = (ValueError, TypeError, NotImplementedError, AttributeError, KeyError, AssertionError)
# The weight files of the methods that are neither full fine-tuning nor PEFT's.
OWN_FILES = {"head": "head.safetensors", "bitfit": "biases.safetensors"}


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of one arm on one base.

    total: the base with its task head, without the adapter. trainable: adapter + head, or all of `total` for full.
    """

    trainable: int
    adapter: int
    head: int
    total: int
    by_component: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def apply_arm(
    model: PreTrainedModel,
    arm: Arm,
    task: str,
    new_weights: list[str],
    name: str = "arm",
    *,
    skip_checks: Collection[str] = (),
) -> tuple[nn.Module, Parameters]:
    """Make the model trainable as the arm says; return it (a PeftModel for a PeftConfig) and its parameter counts.

    new_weights: names of weights missing from the base's checkpoint (its task head); an adapter trains and saves their
    modules too. Works on the meta device as well. Raises RecipeError for a target that matches no module, a missing
    head, or a model that PEFT rejects.
    """
    components = dict(parameters_by_component(model))
    head = head_modules(model)
    if arm.method == "full":
        model.requires_grad_(True)
    elif arm.method == "head":
        _train_head(model, head, name)
    elif arm.method == "bitfit":
        _train_biases(model, new_weights, name)
    else:
        config = _complete_config(arm.method, model, task, new_weights, head)
        model = _add_adapter(model, config, name, check_targets="targets" not in skip_checks)
    if arm.method != "full":
        hold_statistics(model)

    trainable = {path: p.numel() for path, p in model.named_parameters() if p.requires_grad}
    # The weights of an adapter on the head have the head's name in their path, but count as adapter.
    in_head = sum(
        count
        for path, count in trainable.items()
        if any(f".{module}." in f".{path}" for module in head) and (arm.peft is None or "modules_to_save" in path)
    )
    adapter = sum(trainable.values()) - in_head if arm.method not in ("full", "head") else 0
    return model, Parameters(sum(trainable.values()), adapter, in_head, sum(components.values()), components)


def fit_targets(recipe: Recipe, config: PretrainedConfig) -> tuple[Recipe, list[str]]:
    """Translate target groups of another architecture to this base's; return the recipe and notes on the changes.

    A recipe's `targets("gpt2", "all-linear")` on a Llama (`--set model=...`) becomes all of the Llama's linear layers.
    Targets that each match a module of this base, or that are no group of the architecture table, stay as they are.
    """
    notes, arms = [], dict(recipe.arms)
    for name, arm in recipe.arms.items():
        group = _foreign_group(getattr(arm.peft, "target_modules", None), config.model_type)
        if group is None or _all_match(recipe, config, arm.peft):
            continue
        method = copy.deepcopy(arm.peft)
        here = _group_here(architecture_of(config), group)
        names = targets(config, here)
        method.target_modules = names if isinstance(names, str) else set(names)
        if hasattr(method, "fan_in_fan_out"):
            method.fan_in_fan_out = architecture_of(config).fan_in_fan_out
        arms[name] = dataclasses.replace(arm, method=method)
        notes.append(
            f"arm '{name}': its targets are another architecture's {group}; here {config.model_type}'s "
            f"{'' if here == group else here + ' '}are used."
        )
    return (dataclasses.replace(recipe, arms=arms), notes) if notes else (recipe, [])


def _group_here(architecture: Architecture, group: str) -> str:
    """Return the group; convolutions for linear layers, or the reverse, where the architecture has no others."""
    other = {"convolutions": "all-linear", "all-linear": "convolutions"}.get(group, group)
    return other if not architecture.group(group) and architecture.group(other) else group


def _all_match(recipe: Recipe, config: PretrainedConfig, method: PeftConfig) -> bool:
    """Whether every target matches a module of the base: then the user may well mean exactly these."""
    import torch
    from transformers import AutoModel

    try:
        try:
            model = meta_model(recipe, copy.deepcopy(config))
        except ValueError:  # no class for this task
            with torch.device("meta"):
                model = AutoModel.from_config(copy.deepcopy(config))
    except (*REFUSALS, RuntimeError):
        return False  # `targets` says why the model can't be built
    return not unmatched(model, method)


def _foreign_group(names: Any, model_type: str) -> str | None:
    """Return the group ("attention", "mlp", "all-linear") whose names these are in another architecture only."""

    def comparable(names: list[str] | str) -> set[str] | str:
        return names if isinstance(names, str) else set(names)

    def groups_of(row: Architecture) -> list[str]:
        return [group for group in GROUPS if comparable(row.group(group)) == comparable(names)]

    if not names or (model_type in ARCHITECTURES and groups_of(ARCHITECTURES[model_type])):
        return None
    return next((group for row in ARCHITECTURES.values() for group in groups_of(row)), None)


def _train_head(model: PreTrainedModel, head: list[str], name: str) -> None:
    if not head:
        raise RecipeError(f"arm '{name}': {type(model).__name__} has no head of its own to train.")
    model.requires_grad_(False)
    for module in head:
        model.get_submodule(module).requires_grad_(True)


def _train_biases(model: PreTrainedModel, new_weights: list[str], name: str) -> None:
    """Train every bias and every new weight (BitFit, arXiv:2106.10199)."""
    model.requires_grad_(False)
    weights = dict(model.named_parameters())
    biases = [path for path in weights if path.endswith("bias") and path not in new_weights]
    if not biases:
        raise RecipeError(f"arm '{name}': {type(model).__name__} has no biases.")
    for path in (*biases, *new_weights):
        weights[path].requires_grad_(True)


def _complete_config(
    given: PeftConfig, model: PreTrainedModel, task: str, new_weights: list[str], head: list[str]
) -> PeftConfig:
    """Return a copy of the recipe's PeftConfig, completed by what follows from the task and the base."""
    config = copy.deepcopy(given)
    if config.task_type is None:
        config.task_type = TASKS[task].peft_task_type
    row = ARCHITECTURES.get(model.config.model_type)
    if row is not None and row.layer == "Conv1D" and hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = not is_quantised(model)  # a quantised Conv1D is a Linear
    if model.device.type == "meta" and isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True  # PiSSA and OLoRA decompose weights, and meta tensors have none
    new_modules = [module for module in head if any(path.startswith(f"{module}.") for path in new_weights)]
    # A new weight outside the head, such as a pooler, has to be saved as well.
    new_modules += [p.rpartition(".")[0] for p in new_weights if not any(p.startswith(f"{m}.") for m in head)]
    if new_modules and hasattr(config, "modules_to_save"):
        # Otherwise the head has random weights after a reload (peft#577, #876).
        config.modules_to_save = sorted({*(config.modules_to_save or []), *new_modules})
    elif hasattr(config, "modules_to_save") and config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        # With this task type PEFT would also train the head, which here is already trained.
        config.task_type = None
    return config


def _add_adapter(model: PreTrainedModel, config: PeftConfig, name: str, check_targets: bool) -> nn.Module:
    from peft import get_peft_model

    from peft_recipes.guards.checks import targets_hit_modules
    from peft_recipes.kernels import lora_linear

    if check_targets:
        targets_hit_modules(model, config, name)
    try:
        adapted = get_peft_model(model, config)
        read_last_token(adapted)
        lora_linear.speed_up(adapted)
    except REFUSALS as error:
        text = " ".join(str(error).split())
        raise RecipeError(f"arm '{name}': PEFT can't put {config.peft_type.value} on this model: {text}") from error
    check_forward(adapted, name, config.peft_type.value)
    return adapted
