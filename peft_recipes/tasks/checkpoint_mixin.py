"""What our trainers add to the libraries' own so that a run that was killed goes on as if it had not been."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from peft_recipes.distributed import gather, processes
from peft_recipes.runs import checkpoints

_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"  # the library's own names


class CheckpointMixin(Trainer):
    """Checkpoints are written beside and renamed, hold the adapter and not the base, and what was counted so far.

    run_state: gives what a run stores with each checkpoint, as JSON takes it. None: no run, so the library's own way.
    """

    run_state: Callable[[], dict[str, Any]] | None = None
    may_checkpoint = True  # not where a run is done again sooner than it is stored: a head on features

    def create_accelerator_and_postprocess(self) -> None:
        """The library's; on the CPU FSDP2 as well, in whose place Accelerate puts DDP there, without a word."""
        super().create_accelerator_and_postprocess()
        if processes.distributed_type() == "FSDP2" and not self.is_fsdp_enabled:
            from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

            state = self.accelerator.state
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
            self.is_fsdp_enabled = True

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not self.may_checkpoint:
            return
        if self.run_state is None:
            super()._save_checkpoint(model, trial)
            return
        folder, step, state = Path(self.args.output_dir), self.state.global_step, self.run_state()
        made = folder / f"checkpoint-{step}"
        with checkpoints.staged(folder) if processes.is_rank_zero() else contextlib.nullcontext(folder) as staging:
            self.args.output_dir = str(staging)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(folder)
            if processes.is_rank_zero():
                made = checkpoints.publish(staging / f"checkpoint-{step}", folder, state)
        processes.barrier()
        if self.state.best_global_step:
            best = folder / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best if best.is_dir() else made)
        if processes.is_rank_zero():
            rotate_checkpoints(str(folder), self.args.save_total_limit or 1, self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Of a model that is spread over processes, what learns: it is gathered, and the main process writes it."""
        if self.run_state is None or not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        weights = gather.trainable_state_dict(self.model)
        if processes.is_rank_zero():
            self._save(output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As one process stores them, so that any number of processes can go on from it."""
        if self.run_state is None or not self.is_fsdp_enabled:
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
        """Every process's, written by the main one."""
        if processes.count() == 1:
            super()._save_rng_state(output_dir)
            return
        with tempfile.TemporaryDirectory(prefix="rng-") as folder:
            super()._save_rng_state(folder)
            mine = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        each = processes.all_gather(mine)
        if processes.is_rank_zero():
            for name, content in (item for files in each for item in files.items()):
                (Path(output_dir) / name).write_bytes(content)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights, before the model is spread over processes: afterwards the library would look for their parts."""
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif model is None:
            self.is_fsdp_enabled = False
            try:
                super()._load_from_checkpoint(resume_from_checkpoint)
            finally:
                self.is_fsdp_enabled = True

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

    def load_checkpoint_weights(self, folder: Path) -> None:
        """The weights alone: of a run whose training was done, and whose evaluation or saving was not."""
        self._load_from_checkpoint(str(folder))

    def spread(self) -> None:
        """Spreads a model that will not be trained any more over the processes, where that is how they share."""
        if self.is_fsdp_enabled:
            self.create_optimizer()  # FSDP2 takes no model without one
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model
