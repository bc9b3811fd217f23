"""kto: answers that are each labelled desirable or not, with trl's KTOTrainer; the reference is the untrained base.

An example's reward is trl's: beta times what its answer gains in log-probability over the reference. Figures of a
split:
- preference_accuracy, a mean over its prompts. Where a prompt has answers of both labels: the share of its pairs of a
  desirable and an undesirable answer in which the desirable one has the higher reward. Elsewhere: the share of its
  answers whose reward has the sign of its label. Without a difference a pair or an answer counts half, so the base
  itself has 0.5 by definition.
- margin: the mean reward of the desirable answers minus that of the undesirable ones (base: 0).
- loss: trl's, a mean over its prompts; the KL term is estimated from the whole split, not from each batch.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.special import expit
from trl import KTOConfig

from peft_recipes.data.columns import map_in_memory
from peft_recipes.data.packing import COUNTS, IGNORED, REFERENCES, PaddedCollator
from peft_recipes.data.preference_packing import CHOSEN, REJECTED
from peft_recipes.data.prepared import Prepared
from peft_recipes.data.rendering import unseen_note
from peft_recipes.data.unpaired import unpaired_notes, unpaired_rows
from peft_recipes.errors import RecipeError, unknown
from peft_recipes.guards import checks
from peft_recipes.hardware.device import Hardware
from peft_recipes.recipe.arm import Arm
from peft_recipes.runs.predictions import Evaluation
from peft_recipes.tasks import metrics
from peft_recipes.tasks.base import Task
from peft_recipes.tasks.causal_losses import tensors
from peft_recipes.tasks.dpo import TIE, Preferences
from peft_recipes.tasks.kto_trainer import (
    COMPLETION,
    KL_COMPLETION,
    KL_REFERENCE,
    LABEL,
    PREDICTED,
    PROMPT,
    REFERENCE,
    LabelledCollator,
    LabelledTrainer,
)
from peft_recipes.tasks.sft import SupervisedFineTuning

if TYPE_CHECKING:
    import datasets
    import torch.nn as nn
    from transformers import PretrainedConfig

LOSSES = ("kto", "apo_zero_unpaired")
# The reference's log-probabilities of both answers are computed as those of a pair.
_AS_PAIR = {COMPLETION: CHOSEN, KL_COMPLETION: REJECTED}
_OF_PAIR = {CHOSEN: COMPLETION, REJECTED: KL_COMPLETION, REFERENCES[0]: REFERENCE, REFERENCES[1]: KL_REFERENCE}


def per_example(predictions: np.ndarray, arguments: KTOConfig) -> dict[str, np.ndarray]:
    """reward, loss and label of each example, from predictions [examples, PREDICTED]."""
    columns = dict(zip(PREDICTED, np.asarray(predictions, dtype=np.float64).T, strict=True))
    gain, desirable = columns["log_probability"] - columns["reference"], columns["label"] > 0
    kl = max((columns["kl_log_probability"] - columns["kl_reference"]).mean(), 0.0)
    kl = 0.0 if arguments.loss_type == "apo_zero_unpaired" else kl
    good, bad = arguments.desirable_weight, arguments.undesirable_weight
    loss = np.where(desirable, good * expit(-arguments.beta * (gain - kl)), bad * expit(arguments.beta * (gain - kl)))
    return {"gain": gain, "reward": arguments.beta * gain, "loss": loss, "label": desirable}


def per_prompt(figures: dict[str, np.ndarray], prompts: list[int]) -> dict[str, np.ndarray]:
    """preference_accuracy, loss and the mean rewards of the answers to each prompt; prompts: that of each example.

    The prompts are in the order of their first example. A reward is NaN where a prompt has no answer of that label.
    """
    found = list(dict.fromkeys(prompts))
    members = {prompt: np.flatnonzero(np.asarray(prompts) == prompt) for prompt in found}
    rows = [_of_prompt({key: values[indices] for key, values in figures.items()}) for indices in members.values()]
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def _of_prompt(figures: dict[str, np.ndarray]) -> dict[str, float]:
    gain, desirable = figures["gain"], figures["label"]
    good, bad = gain[desirable], gain[~desirable]
    differences = (good[:, None] - bad).ravel() if len(good) and len(bad) else np.where(desirable, gain, -gain)
    rewards = {True: figures["reward"][desirable], False: figures["reward"][~desirable]}
    return {
        "preference_accuracy": float(metrics.preference_scores(differences, TIE).mean()),
        "loss": float(figures["loss"].mean()),
        "desirable_reward": float(rewards[True].mean()) if len(good) else np.nan,
        "undesirable_reward": float(rewards[False].mean()) if len(bad) else np.nan,
    }


class LabelledAnswers(Preferences):
    """Prompts and answers with a label; pairs of answers are taken apart. Every batch is padded."""

    duplicate_columns = ("prompt", "completion")

    def arguments(self, *args: Any, **kwargs: Any) -> KTOConfig:
        arguments = Task.arguments(self, *args, **kwargs)
        arguments.max_length = None  # truncated already
        arguments.precompute_ref_log_probs = True  # they are columns of the dataset
        return arguments

    def check_arguments(self, arm: Arm | None, hardware: Hardware) -> None:
        loss_type = self.recipe.training.get("loss_type", LOSSES[0])
        if loss_type not in LOSSES:
            raise RecipeError(unknown("loss_type", str(loss_type), LOSSES, "training"))
        check_reachable(arm)
        SupervisedFineTuning.check_arguments(self, arm, hardware)
        if loss_type == "kto" and self.arguments_batch() < 2:
            raise RecipeError(
                "training.per_device_train_batch_size: 1 is too few for KTO, which compares the answers of a batch. "
                "Set 2 or more, for each process."
            )

    def arguments_batch(self) -> int:
        """The examples in a batch of one process."""
        from peft_recipes.distributed import processes
        from peft_recipes.distributed.batches import split_batch

        return split_batch(self.recipe.training, processes.count())[0]

    def text_rows(self, raw: Any, tokenizer: Any) -> tuple[dict[str, Any], list[str]]:
        splits, notes, chat = {}, [], tokenizer.chat_template is not None
        for name, rows in raw.items():
            source = self.source_of(name)
            splits[name] = unpaired_rows(rows, source, chat, self.skipped_of(name, rows))
            if name == "train":
                notes += unpaired_notes(rows, source)
                notes += unseen_note(splits[name], tokenizer) if chat else []
        return splits, notes

    def tokenise(self, row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        """prompt_ids, completion_ids and label of an answer, split as trl splits them, not yet truncated."""
        example = SupervisedFineTuning.tokenise(self, row, tokenizer)
        start = next((i for i, label in enumerate(example["labels"]) if label != IGNORED), len(example["labels"]))
        ids = example["input_ids"]
        return {PROMPT: ids[:start], COMPLETION: ids[start:], LABEL: row["label"]}

    def _truncated(
        self, examples: datasets.Dataset, split: str, end_tokens: set[int]
    ) -> tuple[datasets.Dataset, list[str]]:
        """Add another example's answer to each, for the KL term; truncate answers at their end, as trl does."""
        longest, notes = self.recipe.max_length, []
        kept = [i for i, prompt in enumerate(examples[PROMPT]) if len(prompt) < longest]
        if not kept:
            raise RecipeError(
                f"No {split} example has an answer within {longest} tokens: the prompts alone are longer. "
                f"Set a larger one: --set max_length={2 * longest}."
            )
        if left_out := len(examples) - len(kept):
            notes.append(f"{left_out} {split} examples had no token left after truncation and were left out.")
        examples = examples.select(kept)
        if split == "train" and self.guards("end-token"):
            labels = [[IGNORED] * len(row[PROMPT]) + row[COMPLETION] for row in examples]
            checks.end_token_is_labelled({"labels": labels}, end_tokens, longest)
        if split == "train" and len(set(examples[LABEL])) < 2 and self.guards("classes"):
            which = "desirable" if examples[LABEL][0] else "undesirable"
            path = self.recipe.data_name
            raise RecipeError(f"dataset '{path}': all training answers are {which}; KTO needs both.")
        completions = _rotated(examples[COMPLETION], self.recipe.training.get("per_device_train_batch_size", 8))
        cut = sum(len(row[PROMPT]) + len(row[COMPLETION]) > longest for row in examples)
        if cut and split == "train":
            notes.append(f"{cut} of {len(examples)} training answers were truncated at {longest} tokens.")

        def truncate(row: dict[str, Any], index: int) -> dict[str, Any]:
            room = longest - len(row[PROMPT])
            answer = row[COMPLETION][:room]
            return {COMPLETION: answer, KL_COMPLETION: completions[index][:room], "length": len(row[PROMPT] + answer)}

        return map_in_memory(examples, truncate, with_indices=True), notes

    def example_order(self, config: PretrainedConfig) -> None:
        return None  # in the data's order: the KL term belongs to a batch

    def use_base(self, base: nn.Module, prepared: Prepared, quantise: str | None = None) -> None:
        """Compute the base's log-probabilities of each answer, where the data does not have them yet (dpo.py)."""
        if not prepared.splits or REFERENCE in prepared.splits["train"].column_names:
            return
        pairs = {name: rows.rename_columns(_AS_PAIR) for name, rows in prepared.splits.items()}
        of_pairs = dataclasses.replace(prepared, splits=pairs)
        super().use_base(base, of_pairs, quantise)
        prepared.splits = {name: rows.rename_columns(_OF_PAIR) for name, rows in of_pairs.splits.items()}

    def recipe_pads(self) -> str | None:
        return "KTO's batches are padded"

    def trainer(self, model: nn.Module, prepared: Prepared, arguments: KTOConfig, callbacks: list[Any]):
        rows, order = self.longest_first(prepared, "validation")
        prompts = np.array(_prompts(prepared, "validation"))[order].tolist()
        trainer = LabelledTrainer(
            model=model,
            args=arguments,
            data_collator=LabelledCollator(prepared.processor.pad_token_id),
            train_dataset=prepared.splits["train"],
            eval_dataset=rows,
            processing_class=prepared.processor,
            compute_metrics=lambda prediction: _metrics(*_figures(prediction.predictions, arguments, prompts)),
            callbacks=callbacks,
        )
        self.add_pass_figures(trainer)
        return trainer

    def evaluate(self, trainer: LabelledTrainer, prepared: Prepared, split: str) -> Evaluation:
        prompts = _prompts(prepared, split)
        examples, rows = _figures(self.predict(trainer, prepared, split), trainer.args, prompts)
        first = [prompts.index(prompt) for prompt in dict.fromkeys(prompts)]
        return Evaluation(
            metrics=_metrics(examples, rows),
            predictions={
                "id": [prepared.ids[split][i] for i in first],
                **{name: values.tolist() for name, values in rows.items()},
                "answers": [prompts.count(prompts[i]) for i in first],
            },
        )

    def largest_batch(self, model: nn.Module, prepared: Prepared | None, size: int) -> dict[str, torch.Tensor]:
        """The answers with gradients; the pass for the KL term takes less."""
        if prepared is None:
            examples = [{"input_ids": [1] * self.recipe.max_length, "labels": [1] * self.recipe.max_length}] * size
        else:
            examples = [
                {"input_ids": row[PROMPT] + row[COMPLETION], "labels": [IGNORED] * len(row[PROMPT]) + row[COMPLETION]}
                for row in self.longest(prepared, size)
            ]
        batch = PaddedCollator((prepared.processor.pad_token_id if prepared else 0) or 0)(examples)
        return tensors({key: value for key, value in batch.items() if key != COUNTS})

    def model_inputs(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([example[PROMPT] + example[COMPLETION]])}


def check_reachable(arm: Arm | None) -> None:
    """Raise RecipeError for an arm inside which trl's fused LM head does not find the model."""
    if arm is not None and arm.method_name == "ADAPTION_PROMPT":
        raise RecipeError("trl's LM head for kto and grpo does not work with an adaption prompt. Choose another arm.")


def _rotated(completions: list[list[int]], size: int) -> list[list[int]]:
    """The answer of the example before in each batch of `size`, the last one's for the first, as in trl."""
    batches = [completions[i : i + size] for i in range(0, len(completions), size)]
    return [answer for batch in batches for answer in (batch[-1], *batch[:-1])]


def _prompts(prepared: Prepared, split: str) -> list[int]:
    """The number of each example's prompt, counted in the split's order."""
    numbers: dict[tuple[int, ...], int] = {}
    return [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prepared.splits[split][PROMPT]]


def _figures(predictions: np.ndarray, arguments: KTOConfig, prompts: list[int]):
    examples = per_example(predictions, arguments)
    return examples, per_prompt(examples, prompts)


def _metrics(examples: dict[str, np.ndarray], prompts: dict[str, np.ndarray]) -> dict[str, float]:
    rewards, desirable = examples["reward"], examples["label"]
    margin = rewards[desirable].mean() - rewards[~desirable].mean() if 0 < desirable.sum() < len(desirable) else None
    means = {name: float(prompts[name].mean()) for name in ("preference_accuracy", "loss")}
    return {**means, **({} if margin is None else {"margin": float(margin)})}
