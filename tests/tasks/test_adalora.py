"""AdaLoRA's orthogonality penalty counts once in every optimiser step, whatever the batches and the loss."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import AdaLoraConfig

from peft_recipes import Arm, targets
from peft_recipes.arms.apply import apply_arm
from peft_recipes.tasks.trainer import TrainerMixin
from peft_recipes.training.resolve import resolve

LOSSES = {
    "classify": [{}, {"label_smoothing_factor": 0.1}],
    "instruct": [{}, {"label_smoothing_factor": 0.1}, {"loss_type": "dft"}],
    "prefer": [{}, {"loss_type": ["ipo"]}],
}
KINDS = {"classify": "distilbert", "instruct": "llama", "prefer": "llama"}


def first_step(recipe, folder, weight: float, **training) -> tuple[float, dict[str, torch.Tensor], torch.nn.Module]:
    """The loss and the gradients of the first optimiser step, and the model."""
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, tinit=2, tfinal=2, orth_reg_weight=weight,
                           target_modules=targets(recipe.model_kind, "attention"))  # fmt: skip
    training = {**recipe.training, "max_steps": 1, "eval_strategy": "no", "max_grad_norm": 0.0, **training}
    made = copy.copy(recipe)
    made.arms, made.training, made.prompts = {"adalora": Arm(config, learning_rate=1e-3)}, training, []
    resolved = resolve(made, ["adalora"])
    transformers.set_seed(0)
    base, new = resolved.task.load_base(resolved.prepared)
    resolved.task.use_base(base, resolved.prepared)
    model, _ = apply_arm(base, resolved.recipe.arms["adalora"], recipe.task, new)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gradients: dict[str, torch.Tensor] = {}

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    arguments = resolved.task.arguments(resolved.recipe.arms["adalora"], 0, resolved.hardware, folder, True)
    trainer = resolved.task.trainer(model, resolved.prepared, arguments, [Keep()])
    assert isinstance(trainer, TrainerMixin)
    initial = copy.deepcopy(model)
    trainer.train()
    return trainer.state.log_history[0]["loss"], gradients, initial


def pefts_penalty(model: torch.nn.Module) -> float:
    """What PEFT's AdaLoraModel adds to the loss of its base."""

    class Loss:
        loss = torch.zeros(1)

    tuner = model.base_model
    tuner.model.forward = lambda: Loss
    return tuner.forward().loss.item()


@pytest.mark.parametrize(("kind", "options"), [(kind, options) for kind in LOSSES for options in LOSSES[kind]], ids=str)
def test_the_penalty_is_pefts_and_counts_once_a_step(request, tmp_path, kind, options):
    recipe = request.getfixturevalue(kind)(KINDS[kind])
    recipe.model_kind = KINDS[kind]
    found = {}
    for batch, accumulation in ((8, 1), (4, 2), (1, 8)):
        size = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        without, _, _ = first_step(recipe, tmp_path, 0.0, **size, **options)
        loss, gradients, model = first_step(recipe, tmp_path, 0.5, **size, **options)
        assert loss - without == pytest.approx(pefts_penalty(model), rel=1e-4)
        found[batch] = loss, gradients
    for loss, gradients in found.values():
        assert loss == pytest.approx(found[8][0], rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[8][1][name], rtol=1e-3, atol=1e-6)
