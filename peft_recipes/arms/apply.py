"""Makes a model trainable the way an arm says, and counts what is trainable."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError
from peft_recipes.models.architecture_table import ARCHITECTURES, GROUPS, head_modules
from peft_recipes.models.architectures import architecture_of, parameters_by_component, targets_of
from peft_recipes.models.quantisation import is_quantised
from peft_recipes.models.virtual_tokens import read_last_token
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.options import TASKS
from peft_recipes.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch.nn as nn
    from peft import PeftConfig
    from transformers import PretrainedConfig, PreTrainedModel

# What PEFT's methods refuse a model with.
REFUSALS = (ValueError, TypeError, NotImplementedError, AttributeError, KeyError, AssertionError)
# The files of the methods that are neither a full model nor PEFT's.
OWN_FILES = {"head": "head.safetensors", "bitfit": "biases.safetensors"}


@dataclass(frozen=True)
class Parameters:
    """Counts of one arm on one base.

    total: the base with its task head, the adapter not counted. trainable = adapter + head + base (full only).
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
    """The model made trainable as `arm` says (a PeftModel for a PeftConfig, else itself), and its counts.

    new_weights: names of weights the base did not bring (its task head); an adapter trains and saves their modules too.
    Works on the meta device as well. Raises RecipeError: a target that hits nothing, no head, what PEFT refuses.
    """
    components = dict(parameters_by_component(model))
    head = head_modules(model)
    made = _applied(model, arm, task, new_weights, head, name, "targets" not in skip_checks)
    trainable = {path: p.numel() for path, p in made.named_parameters() if p.requires_grad}
    in_head = sum(n for path, n in trainable.items() if any(f".{m}." in f".{path}" for m in head))
    # A head that PEFT adapts (rather than saves whole) has its module's name in the adapter's own weights.
    in_head -= sum(n for path, n in trainable.items() if _adapts_head(path, head)) if arm.peft is not None else 0
    adapter = sum(trainable.values()) - in_head if arm.method not in ("full", "head") else 0
    return made, Parameters(sum(trainable.values()), adapter, in_head, sum(components.values()), components)


def fit_targets(recipe: Recipe, config: PretrainedConfig) -> tuple[Recipe, list[str]]:
    """The recipe with targets that are another architecture's group made this base's same group, and notes that say so.

    A recipe's `targets("gpt2", "all-linear")` on a Llama (`--set model=...`) means all of the Llama's linear layers.
    Targets that are no group of the table, or that fit the base already, stay as they are.
    """
    notes, arms = [], dict(recipe.arms)
    for name, arm in recipe.arms.items():
        group = _foreign_group(getattr(arm.peft, "target_modules", None), config.model_type)
        if group is None:
            continue
        changed = copy.deepcopy(arm.peft)
        found = targets_of(config, group).names
        changed.target_modules = found if isinstance(found, str) else set(found)
        if hasattr(changed, "fan_in_fan_out"):
            changed.fan_in_fan_out = architecture_of(config).fan_in_fan_out
        arms[name] = dataclasses.replace(arm, method=changed)
        notes.append(
            f"arm '{name}': its targets are another architecture's {group}; here {config.model_type}'s are used."
        )
    return (dataclasses.replace(recipe, arms=arms), notes) if notes else (recipe, [])


def _foreign_group(names: Any, model_type: str) -> str | None:
    """The group ("attention", "mlp", "all-linear") that some other row's targets are, and this model type's are not."""
    if not names:
        return None
    wanted = names if isinstance(names, str) else set(names)
    own = ARCHITECTURES.get(model_type)
    groups = [g for row in ARCHITECTURES.values() for g in GROUPS if _as_set(row.group(g)) == wanted]
    if not groups or (own is not None and any(_as_set(own.group(g)) == wanted for g in GROUPS)):
        return None
    return groups[0]


def _as_set(names: list[str] | str) -> set[str] | str:
    return names if isinstance(names, str) else set(names)


def _adapts_head(path: str, head: list[str]) -> bool:
    return "modules_to_save" not in path and any(f".{m}." in f".{path}" for m in head)


def _applied(
    model: PreTrainedModel, arm: Arm, task: str, new: list[str], head: list[str], name: str, guarded: bool
) -> nn.Module:
    if arm.method == "full":
        return model.requires_grad_(True)
    if arm.method == "head":
        if not head:
            raise RecipeError(f"arm '{name}': {type(model).__name__} has no head of its own to train.")
        model.requires_grad_(False)
        for module in head:
            model.get_submodule(module).requires_grad_(True)
        return model
    if arm.method == "bitfit":
        return _with_biases(model, new, name)
    return _with_adapter(model, _completed(arm.method, model, task, new, head), name, guarded)


def _with_biases(model: PreTrainedModel, new: list[str], name: str) -> nn.Module:
    """Every bias learns, and what is new (BitFit, arXiv:2106.10199)."""
    model.requires_grad_(False)
    biases = [p for path, p in model.named_parameters() if path.endswith("bias") and path not in new]
    if not biases:
        raise RecipeError(f"arm '{name}': {type(model).__name__} has no biases.")
    weights = dict(model.named_parameters())
    for parameter in (*biases, *(weights[path] for path in new)):
        parameter.requires_grad_(True)
    return model


def _completed(given: PeftConfig, model: PreTrainedModel, task: str, new: list[str], head: list[str]) -> PeftConfig:
    """A copy of the recipe's PeftConfig with what follows from the task and the base filled in."""
    config = copy.deepcopy(given)
    if config.task_type is None:
        config.task_type = TASKS[task].peft_task_type
    row = ARCHITECTURES.get(model.config.model_type)
    if row is not None and row.layer == "Conv1D" and hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = not is_quantised(model)  # a quantised Conv1D is a Linear
    if model.device.type == "meta" and isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True  # PiSSA and OLoRA decompose weights, and there are none
    new_head = [name for name in head if any(weight.startswith(f"{name}.") for weight in new)]
    # A new weight outside the head (a pooler, say) would come back random just the same.
    new_head += [w.rpartition(".")[0] for w in new if not any(w.startswith(f"{name}.") for name in head)]
    if new_head and hasattr(config, "modules_to_save"):
        # Without this the head comes back random after a reload (peft#577, #876).
        config.modules_to_save = sorted({*(config.modules_to_save or []), *new_head})
    elif hasattr(config, "modules_to_save") and config.task_type == "SEQ_CLS":
        # PEFT adds the head's usual names by itself, which would train a head that is not new beside the adapter.
        config.task_type = None
    return config


def _with_adapter(model: PreTrainedModel, config: PeftConfig, name: str, guarded: bool) -> nn.Module:
    from peft import get_peft_model

    from peft_recipes.guards.checks import targets_hit_modules
    from peft_recipes.kernels import lora_linear

    if guarded:
        targets_hit_modules(model, config, name)
    try:
        made = get_peft_model(model, config)
        read_last_token(made)
        lora_linear.speed_up(made)
        return made
    except REFUSALS as error:
        text = " ".join(str(error).split())
        raise RecipeError(f"arm '{name}': PEFT can't put {config.peft_type.value} on this model: {text}") from error
