"""A step's host: its optimizer, its loss's precision, its batches ahead of it, the loss scale of fp16."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from packed_batches import PAIRS, SHARED, small, tensors
from waiting import Waits

from peft_recipes import Arm, train
from peft_recipes.data.packing import KEPT, SharedPrefixCollator
from peft_recipes.data.preference_packing import SharedPromptCollator
from peft_recipes.hardware.device import Hardware
from peft_recipes.tasks.causal_losses import labelled_losses
from peft_recipes.tasks.preference_trainer import token_log_probs
from peft_recipes.tasks.registry import task_of
from peft_recipes.tasks.run_options import loader_options, run_arguments
from peft_recipes.tasks.trainer import TrainerMixin


def test_the_log_probabilities_of_pairs_do_not_wait_for_the_device():
    for kernel in ("parts", "mask"):
        model = small("llama")
        batch = SharedPromptCollator.for_model(model, 0, 4096, kernel)(PAIRS)
        with Waits() as mode:
            token_log_probs(model, batch).sum().backward()
        assert not mode.found


def test_labelled_positions_alone_pass_the_head_in_half_precision_and_the_loss_is_fp32():
    model, seen = small("llama"), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    batch = SharedPrefixCollator.for_model(model, 0, 4096)(SHARED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, logits, _ = labelled_losses(model, tensors(batch))
    assert seen[0].dtype == torch.bfloat16 and logits.dtype == losses.dtype == torch.float32
    assert seen[0].shape[1] == len(batch[KEPT]) < batch["input_ids"].shape[1]
    assert len(batch[KEPT]) == sum(label != -100 for one in SHARED for label in one["labels"])


def test_the_optimizer_is_fused(instruct, tmp_path):
    hardware = Hardware("cpu", "", "fp32", 1)
    arguments = task_of(instruct()).arguments(instruct().arms["lora"], 0, hardware, tmp_path, True)
    assert arguments.optim == "adamw_torch_fused"


def test_a_gpus_batches_are_collated_ahead_in_workers_pinned_and_copied_meanwhile(instruct):
    def options(**changes):
        return loader_options(instruct(**changes), "cuda", True)

    assert options()["dataloader_pin_memory"] and options()["dataloader_persistent_workers"]
    assert options()["dataloader_num_workers"] >= 1 and options()["accelerator_config"] == {"non_blocking": True}
    own = options(training={"dataloader_num_workers": 0})
    assert own == {"dataloader_pin_memory": True, "accelerator_config": {"non_blocking": True}}
    assert "accelerator_config" not in options(training={"dataloader_pin_memory": False})
    assert loader_options(instruct(), "cpu", True) == {"dataloader_pin_memory": False}


def test_a_recipes_own_loading_wins(instruct, tmp_path):
    recipe = instruct(training={"use_cpu": True, "bf16": False, "dataloader_num_workers": 1})
    loading = loader_options(recipe, "cuda", True)
    made = run_arguments(recipe, None, 0, Hardware("cpu", "", "fp32", 1), tmp_path, True, loading)
    assert made.dataloader_num_workers == 1 and made.accelerator_config.non_blocking


def test_batches_of_a_worker_give_the_same_losses(instruct, tmp_path):
    here, ahead = (
        train(instruct(training={"dataloader_num_workers": workers}), "lora", output=tmp_path / str(workers)).data
        for workers in (0, 1)
    )
    assert here["training"]["losses"] == ahead["training"]["losses"]
    assert here["training"]["tokens"] == ahead["training"]["tokens"]


@pytest.fixture
def scalers(monkeypatch):
    """torch's loss scaling in fp32 on the CPU, where Accelerate sets it up for fp16 on a GPU; a scaler a trainer."""
    made, create = [], TrainerMixin.create_accelerator_and_postprocess

    def with_scaler(trainer):
        create(trainer)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=3)
        made.append(trainer.accelerator.scaler)

    def unscale(accelerator, optimizer=None):
        for each in accelerator._optimizers:
            accelerator.scaler.unscale_(each.optimizer)

    monkeypatch.setattr(TrainerMixin, "create_accelerator_and_postprocess", with_scaler)
    monkeypatch.setattr(Accelerator, "unscale_gradients", unscale)
    return made


def test_a_resumed_run_keeps_its_loss_scale(instruct, tmp_path, monkeypatch, scalers):
    """The scale grows every third step: a run that began anew at step 4 would end with another."""
    from peft_recipes.training import stages

    arms = {"lora": Arm(instruct().arms["lora"].peft, learning_rate=1e-2)}
    recipe = instruct(arms=arms, checkpoint_seconds=0, training={"num_train_epochs": 1, "max_steps": 8})
    straight = train(recipe, "lora", output=tmp_path / "straight").data["training"]
    assert scalers[-1].get_scale() == 2.0**14 * 4

    log_step = stages.log_step

    def stop(log, step, *rest):
        log_step(log, step, *rest)
        if step == 5:
            raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "log_step", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            train(recipe, "lora", output=tmp_path / "resumed")
    resumed = train(recipe, "lora", output=tmp_path / "resumed", resume=True).data["training"]
    assert resumed["resumed_at_steps"] == [4] and scalers[-1].get_scale() == scalers[0].get_scale()
    assert [loss for _, loss in resumed["losses"]] == [loss for _, loss in straight["losses"]]
