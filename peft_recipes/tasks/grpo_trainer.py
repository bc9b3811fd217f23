"""trl's GRPOTrainer with transformers' generation: counts of each step, and one reward of an answer and its row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from trl import GRPOTrainer

from peft_recipes.data.packing import Counts
from peft_recipes.tasks.causal_trainer import adapter_dtypes_kept
from peft_recipes.tasks.preference_trainer import no_reference_adapter
from peft_recipes.tasks.trainer import TrainerMixin

if TYPE_CHECKING:
    import torch.nn as nn

PROMPT, REFERENCE, ROW = "prompt", "reference", "row"  # columns of the training data; ROW is JSON
Scores = Callable[[Sequence[str], Sequence[str], Sequence[dict[str, Any]]], np.ndarray]


def reward_function(scores: Scores) -> Callable[..., list[float]]:
    """A reward function as trl calls it, from one of answers, references and rows, which gives values [answers]."""

    def reward(completions: Sequence[Any], reference: Sequence[str], row: Sequence[str], **_: Any) -> list[float]:
        answers = [text if isinstance(text, str) else text[-1]["content"] or "" for text in completions]
        return scores([text.strip() for text in answers], reference, [json.loads(text) for text in row]).tolist()

    return reward


class AnswerTrainer(TrainerMixin, GRPOTrainer):
    """trl's GRPOTrainer; each rank draws its own answers, so several processes differ from one.

    validate: returns the metrics of the validation split, evaluated instead of trl's sampled answers.
    """

    validate: Callable[[], dict[str, float]]

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        with no_reference_adapter(model), adapter_dtypes_kept(model):
            super().__init__(model, *args, **kwargs)
        # Between two generations the answers are not in a checkpoint, so a run can't resume there.
        every, arguments = self.args.steps_per_generation * self.num_iterations, self.args
        self.may_checkpoint = self.may_checkpoint and every == arguments.gradient_accumulation_steps

    def get_train_dataloader(self) -> DataLoader:
        return GRPOTrainer.get_train_dataloader(self)  # repeats each prompt; over the ranks as well

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        return _ResumableSampler(GRPOTrainer._get_train_sampler(self, *args, **kwargs))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = GRPOTrainer.training_step(self, *args, **kwargs)
        if self.accelerator.sync_gradients:
            self._counts.append([])
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None):
        """trl's loss; its prompts and answers are counted."""
        masks = [inputs["prompt_mask"], inputs["completion_mask"]]
        tokens, computed = sum(mask.sum() for mask in masks), sum(mask.numel() for mask in masks)
        self._counts[-1].append(Counts(tokens, computed, computed - tokens, len(masks[0])))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate the validation split's greedy answers."""
        self.model.eval()  # trl logs by the model's mode
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.validate().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _ResumableSampler(Sampler):
    """trl's sampler, whose order in an epoch follows from the epoch's number: trl's own starts again on resuming."""

    def __init__(self, sampler: Any):
        self.sampler, self.epoch = sampler, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator.manual_seed(self.sampler.seed)
        for _ in range(self.epoch):  # the permutations of the epochs before
            torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)
        yield from self.sampler
