"""What the trainers here add to transformers' checkpoints: atomic, resumable to the bit, and the same under FSDP2."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from peft_recipes.distributed import gather, processes
from peft_recipes.hardware.device import random_state, set_random_state
from peft_recipes.runs import checkpoints

_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"  # Trainer's own names
_RANDOM_STATE = "device_rng_state.pt"  # of a device that Trainer stores none of (MPS)


class CheckpointMixin(Trainer):
    """Write checkpoints to a staging folder and rename them; store the adapter without its base, and the run's counts.

    run_state: returns what a run stores with each checkpoint, as JSON takes it. None: not a run, so checkpoints are
    Trainer's own. Under FSDP2 weights and optimizer state are gathered on rank 0, so that any number of ranks can
    resume.
    """

    run_state: Callable[[], dict[str, Any]] | None = None
    _best_weights: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None  # where no checkpoint is written
    may_checkpoint = True  # False where starting again is as good: AdaLoRA, a linear probe on cached features

    @property
    def _gathers(self) -> bool:
        return self.run_state is not None and self.is_fsdp_enabled

    def create_accelerator_and_postprocess(self) -> None:
        """Set FSDP2 up on the CPU as well, where Accelerate silently uses DDP instead."""
        super().create_accelerator_and_postprocess()
        if processes.distributed_type() == "FSDP2" and not self.is_fsdp_enabled:
            from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

            state = self.accelerator.state
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
            self.is_fsdp_enabled = True

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not self.may_checkpoint:
            if self.args.load_best_model_at_end and self.state.best_global_step == self.state.global_step:
                self._best_weights = _weights_and_ranks(self.accelerator.unwrap_model(self.model))
                self.state.best_model_checkpoint = "in memory"
            return
        if self.run_state is None:
            super()._save_checkpoint(model, trial)
            return
        folder, step, state = Path(self.args.output_dir), self.state.global_step, self.run_state()
        checkpoint = folder / f"checkpoint-{step}"
        with checkpoints.staged(folder) if processes.is_rank_zero() else contextlib.nullcontext(folder) as staging:
            self.args.output_dir = str(staging)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(folder)
            if processes.is_rank_zero():
                checkpoint = checkpoints.publish(staging / f"checkpoint-{step}", folder, state)
        processes.barrier()
        if self.state.best_global_step:
            best = folder / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best if best.is_dir() else checkpoint)
        if processes.is_rank_zero():
            rotate_checkpoints(str(folder), self.args.save_total_limit or 1, self.state.best_model_checkpoint)

    def _load_best_model(self) -> None:
        """Trainer's; from memory where no checkpoint was written."""
        if self._best_weights is None:
            super()._load_best_model()
            return
        model, (weights, ranks) = self.accelerator.unwrap_model(self.model), self._best_weights
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])
        for adapter, pattern in ranks.items():
            model.peft_config[adapter].rank_pattern = pattern

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self._gathers:
            super().save_model(output_dir, _internal_call)
            return
        weights = gather.trainable_state_dict(self.model)
        if processes.is_rank_zero():
            self._save(output_dir, state_dict=weights)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        from peft import PeftModel

        if not processes.is_rank_zero():
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.run_state is not None and isinstance(model, PeftModel):
            # "auto" would ask the Hub at every checkpoint whether the vocabulary grew.
            model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)
        else:
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._gathers:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = gather.full_state_dict(self.optimizer.state_dict())
        if processes.is_rank_zero():
            torch.save(state, Path(output_dir) / _OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        stored = torch.load(Path(checkpoint) / _OPTIMIZER, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(gather.shard_state_dict(stored, self.optimizer))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / _SCHEDULER, weights_only=True))

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random states of all ranks on rank 0, which alone has the staging folder."""
        if processes.count() == 1:
            super()._save_rng_state(output_dir)
            if _has_own_random_state(self.args.device.type):
                torch.save(random_state(self.args.device.type), Path(output_dir) / _RANDOM_STATE)
            return
        with tempfile.TemporaryDirectory(prefix="rng-") as folder:
            super()._save_rng_state(folder)
            own = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        each_rank = processes.all_gather(own)
        if processes.is_rank_zero():
            for name, content in (item for files in each_rank for item in files.items()):
                (Path(output_dir) / name).write_bytes(content)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        file = Path(checkpoint or "") / _RANDOM_STATE
        if checkpoint is not None and file.is_file() and _has_own_random_state(self.args.device.type):
            set_random_state(self.args.device.type, torch.load(file, map_location="cpu", weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Under FSDP2 load before the model is sharded: afterwards (`model` given) Trainer would look for shards."""
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif model is None:
            self.is_fsdp_enabled = False
            try:
                super()._load_from_checkpoint(resume_from_checkpoint)
            finally:
                self.is_fsdp_enabled = True

    def load_checkpoint_weights(self, folder: Path) -> None:
        """Load the weights alone, for a run whose training is complete but not its evaluation."""
        self._load_from_checkpoint(str(folder))

    def shard_for_evaluation(self) -> None:
        """Under FSDP2, shard a model that is not trained any more."""
        if self.is_fsdp_enabled:
            self.create_optimizer()  # FSDP2 takes no model without one
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model


def _weights_and_ranks(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Copies of the trainable weights, and of AdaLoRA's rank pattern, by which its weights are saved."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    configs = getattr(model, "peft_config", None) or {}
    ranks = {name: copy.deepcopy(c.rank_pattern) for name, c in configs.items() if c.peft_type.value == "ADALORA"}
    return weights, ranks


def _has_own_random_state(device: str) -> bool:
    return device not in ("cpu", "cuda")
