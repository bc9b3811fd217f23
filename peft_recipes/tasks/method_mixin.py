"""What some PEFT methods need of the training loop: AdaLoRA's rank budget and penalty, LoRA+'s two learning rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback

from peft_recipes.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch.nn as nn


def fit_schedules(recipe: Recipe, steps: int | None) -> tuple[Recipe, list[str]]:
    """Fit AdaLoRA's schedules to the run's number of steps; return the recipe and a note for each change.

    total_step, tinit and tfinal keep their proportions. A schedule for another number of steps ends too early, or never
    reduces a rank.
    """
    arms, notes = dict(recipe.arms), []
    for name, arm in recipe.arms.items():
        total = getattr(arm.peft, "total_step", None)
        if arm.method_name != "ADALORA" or not steps or total == steps:
            continue
        tinit, tfinal = (getattr(arm.peft, key) * steps // total for key in ("tinit", "tfinal"))
        tfinal = min(tfinal, max(steps - tinit - 1, 0))
        config = dataclasses.replace(arm.peft, total_step=steps, tinit=tinit, tfinal=tfinal)
        arms[name] = dataclasses.replace(arm, method=config)
        notes.append(f"arm '{name}': AdaLoRA's schedule is fitted to this run's {steps} steps, in its own proportions.")
    return (dataclasses.replace(recipe, arms=arms), notes) if notes else (recipe, [])


class AdaLoraCallback(TrainerCallback):
    """Let AdaLoRA reallocate its ranks by the gradients' importance, after each step and before zero_grad."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        _unwrapped(model).base_model.update_and_allocate(state.global_step)


class MethodMixin(Trainer):
    """A Trainer for every PEFT method."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if _is_adalora(self.model):
            self.add_callback(AdaLoraCallback())
            self.compute_loss = self._with_penalty(self.compute_loss)  # around every loss, also trl's own
            self.may_checkpoint = False  # PEFT saves nothing of the rank budget, so the run starts again instead

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's optimizer; for LoRA+ PEFT's, with separate learning rates for A and B."""
        ratio = getattr(self.args, "lora_plus_ratio", None)
        if ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        from peft.optimizers import create_loraplus_optimizer

        model = self.model if model is None else model
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = create_loraplus_optimizer(
            model, optimizer_class, loraplus_lr_ratio=ratio, loraplus_weight_decay=self.args.weight_decay, **options
        )
        return self.optimizer

    def step_mean(self, total: torch.Tensor, count: Any, num_items_in_batch: Any, model: nn.Module) -> torch.Tensor:
        """A summed loss as the mean over the items (labelled tokens or examples) of the optimizer step.

        count: the items of this micro-batch, for where Trainer passes no num_items_in_batch.
        """
        items = count if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(items).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages what was divided by the items of all ranks
        return loss

    def _with_penalty(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        """Add AdaLoRA's orthogonality penalty to a loss, once per optimizer step, however it is computed.

        PEFT adds it to a loss that the model computes itself, which no trainer here uses.
        """

        def penalised(model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
            loss = compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
            if not model.training:
                return loss
            # Trainer divides a loss by the step's micro-batches unless it is already a mean over the step.
            scaled = getattr(self, "loss_is_scaled_for_ga", None)
            if scaled is None:
                scaled = (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func
            penalty = _orthogonality_penalty(model) / (self.current_gradient_accumulation_steps if scaled else 1)
            return (loss[0] + penalty, *loss[1:]) if return_outputs else loss + penalty

        return penalised


def _orthogonality_penalty(model: nn.Module) -> torch.Tensor | float:
    """AdaLoRA's mean distance of A A^T and B^T B from the identity, times orth_reg_weight."""
    tuner, distances = _unwrapped(model).base_model, []
    for name, weight in tuner.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            product = weight @ weight.T if "lora_A" in name else weight.T @ weight
            distances.append(
                torch.linalg.norm(product - torch.eye(len(product), dtype=product.dtype, device=product.device))
            )
    factor = tuner.peft_config[tuner.trainable_adapter_name].orth_reg_weight
    return factor * torch.stack(distances).mean() if distances else 0.0


def _unwrapped(model: Any) -> Any:
    return getattr(model, "module", model)


def _is_adalora(model: Any) -> bool:
    configs = getattr(_unwrapped(model), "peft_config", None) or {}
    return any(config.peft_type.value == "ADALORA" for config in configs.values())
