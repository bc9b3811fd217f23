"""A step's host: it does not wait for the device before the loss is logged; its batches; the loss scale of fp16."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from packed_batches import PAIRS, SHARED, small, tensors
from torch.utils._python_dispatch import TorchDispatchMode

from peft_recipes import Arm, train
from peft_recipes.data.packing import KEPT, SharedPrefixCollator
from peft_recipes.data.preference_packing import SharedPromptCollator
from peft_recipes.hardware.device import Hardware
from peft_recipes.tasks.causal_trainer import labelled_losses
from peft_recipes.tasks.preference_trainer import token_log_probs
from peft_recipes.tasks.registry import task_of
from peft_recipes.tasks.trainer import TrainerMixin

# Operations whose result's value or size the host has to know: on a GPU each waits for all queued work.
_WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "_unique2")


class Waits(TorchDispatchMode):
    """Record the operations that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indexed = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in _WAITING or indexed:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch):
    """The waiting operations of each training step, from the batch's arrival to its gradients."""
    steps, training_step = [], TrainerMixin.training_step

    def watched(self, *args, **kwargs):
        with Waits() as mode:
            loss = training_step(self, *args, **kwargs)
        steps.append(mode.found)
        return loss

    monkeypatch.setattr(TrainerMixin, "training_step", watched)
    return steps


def test_a_step_does_not_wait_for_the_device(instruct, tmp_path, waits):
    train(instruct(), "lora", output=tmp_path)
    assert len(waits) == 4 and not any(waits)


def test_a_padded_step_waits_for_what_transformers_reads_of_its_mask(instruct, classify, tmp_path, waits):
    """Whether a mask hides anything, at the step's beginning, while the device has nothing to do."""
    train(instruct(batches="padded"), "lora", output=tmp_path)
    train(classify(), "lora", output=tmp_path)
    assert waits and max(len(found) for found in waits) <= 2


def test_the_log_probabilities_of_pairs_do_not_wait_for_the_device():
    """trl's loss reads its metrics (rewards, margins) afterwards."""
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


def test_a_gpus_batches_are_collated_ahead_in_workers(instruct, classify, tmp_path):
    options = task_of(instruct())._loader_options(Hardware("cuda", "", "bf16", 1))
    assert options["dataloader_pin_memory"] and options["dataloader_persistent_workers"]
    assert options["dataloader_num_workers"] >= 1
    own = task_of(instruct(training={"dataloader_num_workers": 0}))._loader_options(Hardware("cuda", "", "bf16", 1))
    assert own == {"dataloader_pin_memory": True}
    assert task_of(instruct())._loader_options(Hardware("cpu", "", "fp32", 1)) == {"dataloader_pin_memory": False}


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
