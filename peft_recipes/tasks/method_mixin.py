"""What some methods need of the training loop: AdaLoRA's budget and its penalty, LoRA+'s two learning rates."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback

from peft_recipes.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch.nn as nn


def fit_schedules(recipe: Recipe, steps: int | None) -> tuple[Recipe, list[str]]:
    """The recipe with AdaLoRA's schedules made for as many steps as the run has, and notes that say so.

    Its total_step, tinit and tfinal are kept in proportion. A schedule for another number of steps ends too early, or
    never takes a rank away.
    """
    arms, notes = dict(recipe.arms), []
    for name, arm in recipe.arms.items():
        total = getattr(arm.peft, "total_step", None)
        if arm.method_name != "ADALORA" or not steps or total == steps:
            continue
        first, last = (getattr(arm.peft, key) * steps // total for key in ("tinit", "tfinal"))
        last = min(last, max(steps - first - 1, 0))
        arms[name] = dataclasses.replace(
            arm, method=dataclasses.replace(arm.peft, total_step=steps, tinit=first, tfinal=last)
        )
        notes.append(f"arm '{name}': AdaLoRA's schedule is made for this run's {steps} steps, in its own proportions.")
    return (dataclasses.replace(recipe, arms=arms), notes) if notes else (recipe, [])


class BudgetCallback(TrainerCallback):
    """AdaLoRA takes ranks away by the gradients' importance, after each step and before they are cleared."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        _unwrapped(model).base_model.update_and_allocate(state.global_step)


class MethodMixin(Trainer):
    """A Trainer for any method."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if _is_adalora(self.model):
            self.add_callback(BudgetCallback())
            self.may_checkpoint = False  # PEFT stores nothing of the budget's state, so the run is done again instead

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The library's, or with LoRA's A and B at two rates (PEFT's create_loraplus_optimizer)."""
        ratio = getattr(self.args, "lora_plus_ratio", None)
        if ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        from peft.optimizers import create_loraplus_optimizer

        chosen = self.model if model is None else model
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, chosen)
        self.optimizer = create_loraplus_optimizer(
            chosen, kind, loraplus_lr_ratio=ratio, loraplus_weight_decay=self.args.weight_decay, **options
        )
        return self.optimizer

    def penalised(self, loss: torch.Tensor, model: nn.Module) -> torch.Tensor:
        """The loss with what the method itself asks for: AdaLoRA's A and B are to be orthogonal.

        PEFT adds it to the loss that the model computes; here the trainer computes the loss.
        """
        if not model.training or not _is_adalora(model):
            return loss
        tuner = _unwrapped(model).base_model
        weight = tuner.peft_config[tuner.trainable_adapter_name].orth_reg_weight
        gaps = [
            _from_orthogonal(p, "lora_A" in n) for n, p in tuner.named_parameters() if "lora_A" in n or "lora_B" in n
        ]
        return loss + weight * torch.stack(gaps).mean() if gaps else loss


def _from_orthogonal(weight: torch.Tensor, rows: bool) -> torch.Tensor:
    square = weight @ weight.T if rows else weight.T @ weight
    return torch.linalg.norm(square - torch.eye(len(square), device=square.device, dtype=square.dtype))


def _unwrapped(model: Any) -> Any:
    return getattr(model, "module", model)


def _is_adalora(model: Any) -> bool:
    configs = getattr(_unwrapped(model), "peft_config", None) or {}
    return any(config.peft_type.value == "ADALORA" for config in configs.values())
