"""dpo: preferred and rejected answers to one prompt, with trl's DPOTrainer.

Figures of a split, means over its pairs. The reference is the untrained base:
- preference_accuracy: the share of pairs whose chosen answer gains more log-probability over the reference than the
  rejected one. A pair without a difference counts half, so the base itself has 0.5 by definition.
- margin: by how much: trl's rewards/margins (beta times the difference of the two gains; base: 0).
- likelihood_accuracy: the share of pairs whose chosen answer has the higher log-probability per token under the model
  itself, whatever the reference gives: it shows where the base starts from.
- loss: the loss_type that the recipe trains with.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from trl import DPOConfig

from peft_recipes.data import preferences
from peft_recipes.data.columns import map_in_memory
from peft_recipes.data.packing import IGNORED, REFERENCES
from peft_recipes.data.preference_packing import CHOSEN, PROMPT, REJECTED
from peft_recipes.data.prepared import Prepared
from peft_recipes.data.rendering import common_prefix, tokenised_answers, unseen_note
from peft_recipes.errors import RecipeError, unknown
from peft_recipes.guards import checks
from peft_recipes.hardware.device import Hardware, choose
from peft_recipes.recipe.arm import Arm
from peft_recipes.runs.predictions import Evaluation
from peft_recipes.tasks import metrics
from peft_recipes.tasks.base import Task
from peft_recipes.tasks.preference_trainer import PREDICTED, PreferenceTrainer
from peft_recipes.tasks.reference import Reference
from peft_recipes.tasks.sft import SupervisedFineTuning

if TYPE_CHECKING:
    import datasets
    import torch.nn as nn

LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
          "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")  # fmt: skip
TIE = 1e-3  # nats; two equal sums of a few hundred log-probabilities differ by less through fp32 rounding


def per_pair(predictions: np.ndarray, beta: float) -> dict[str, np.ndarray]:
    """preference_accuracy, likelihood_accuracy, margin and loss of each pair, from predictions [pairs, PREDICTED]."""
    columns = dict(zip(PREDICTED, np.asarray(predictions, dtype=np.float64).T, strict=True))
    gain = (columns["chosen"] - columns["ref_chosen"]) - (columns["rejected"] - columns["ref_rejected"])
    per_token = [columns[key] / np.maximum(columns[f"{key}_tokens"], 1) for key in ("chosen", "rejected")]
    return {
        "preference_accuracy": metrics.preference_scores(gain, TIE),
        "likelihood_accuracy": metrics.preference_scores(per_token[0] - per_token[1], 0.0),
        "margin": beta * gain,
        "loss": columns["loss"],
    }


class Preferences(SupervisedFineTuning):
    """Pairs of a chosen and a rejected answer to one prompt. The reference is the untrained base, for every arm."""

    trainer_class = PreferenceTrainer
    sequences_per_example = 2
    duplicate_columns = ("prompt", "chosen")
    reference: Reference | None = None
    _trial_share = 1.0  # of the train split, in a trial

    def arguments(self, *args: Any, **kwargs: Any) -> DPOConfig:
        arguments = Task.arguments(self, *args, **kwargs)
        arguments.max_length = self.recipe.max_length
        arguments.precompute_ref_log_probs = True  # they are columns of the dataset
        return arguments

    def check_arguments(self, arm: Arm | None, hardware: Hardware) -> None:
        loss_types = self.recipe.training.get("loss_type", [])
        loss_types = [loss_types] if isinstance(loss_types, str) else loss_types
        if wrong := [name for name in loss_types if name not in LOSSES]:
            raise RecipeError(*(unknown("loss_type", str(name), LOSSES, "training") for name in wrong))
        super().check_arguments(arm, hardware)

    def text_rows(self, raw: Any, tokenizer: Any) -> tuple[dict[str, Any], list[str]]:
        return text_pairs(self, raw, tokenizer)

    def tokenise(self, row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
        """prompt_ids, chosen_ids and rejected_ids of a pair, split as trl splits them, not yet truncated."""
        prompt, (chosen, rejected) = tokenised_answers(row, ["chosen", "rejected"], tokenizer)
        # Both answers start where the first of them differs from the prompt: a token may span prompt and answer.
        start = min(common_prefix(prompt, ids) for ids in (chosen, rejected))
        return {PROMPT: prompt[:start], CHOSEN: chosen[start:], REJECTED: rejected[start:]}

    def _truncated(
        self, pairs: datasets.Dataset, split: str, end_tokens: set[int]
    ) -> tuple[datasets.Dataset, list[str]]:
        """Truncate answers at their end, as trl does, and drop the pairs without a difference left."""
        longest, cut, left_out, kept = self.recipe.max_length, 0, Counter(), []
        if split == "train" and self.guards("end-token"):
            answers = [[IGNORED] * len(pair[PROMPT]) + pair[CHOSEN] for pair in pairs]
            checks.end_token_is_labelled({"labels": answers}, end_tokens, longest)
        for number, pair in enumerate(pairs):
            room = longest - len(pair[PROMPT])
            cut += max(len(pair[CHOSEN]), len(pair[REJECTED])) > room
            chosen, rejected = (pair[key][: max(room, 0)] for key in (CHOSEN, REJECTED))
            if min(len(chosen), len(rejected)) <= (not pair[PROMPT]):  # without a prompt, nothing predicts the first
                left_out["no token left after truncation"] += 1
            elif chosen == rejected:
                left_out["the same answer twice after truncation"] += 1
            else:
                kept.append(number)
        if not kept:
            raise RecipeError(
                f"No {split} pair has answers to tell apart within {longest} tokens: the prompts alone are longer. "
                f"Set a larger one: --set max_length={2 * longest}."
            )
        notes = left_out_notes(left_out, split)
        if cut and split == "train":
            notes.append(f"{cut} of {len(pairs)} training pairs were truncated at {longest} tokens.")

        def truncate(row: dict[str, Any]) -> dict[str, Any]:
            room = longest - len(row[PROMPT])
            chosen, rejected = row[CHOSEN][:room], row[REJECTED][:room]
            return {CHOSEN: chosen, REJECTED: rejected, "length": 2 * len(row[PROMPT]) + len(chosen) + len(rejected)}

        return map_in_memory(pairs.select(kept), truncate), notes

    def lengths(self, prepared: Prepared, split: str) -> list[int]:
        return list(prepared.splits[split]["length"])

    def use_base(self, base: nn.Module, prepared: Prepared, quantise: str | None = None) -> None:
        """Compute the base's log-probabilities of each answer, where the data does not have them yet.

        The reference of an arm on a quantised base is that base, quantised, as in trl, where it is the model without
        its adapter.
        """
        if not prepared.splits or REFERENCES[0] in prepared.splits["train"].column_names:
            return
        recipe, hardware = self.recipe, choose(self.recipe.training, self.recipe.threads)
        # The collator of training: prefix-shared where that is exact on this model, tried on the longest pairs.
        pad = prepared.processor.pad_token_id
        half = hardware.autocast_dtype
        collator = PreferenceTrainer.collator_for(base, pad, *self.batching(prepared, 4), half=half).collator
        ld_alpha = recipe.training.get("ld_alpha")
        self.reference = Reference(collator, hardware, recipe.training.get("per_device_eval_batch_size", 8), ld_alpha)
        if base.device.type != "meta" and base.device.type != hardware.device:
            base.to(hardware.device)
        key = {"model": recipe.model, "quantise": quantise, "precision": hardware.precision, "ld_alpha": ld_alpha,
               "rows": prepared.rows}  # fmt: skip
        prepared.splits = self.reference.add(base, prepared.splits, prepared.folder, key)

    def for_trial(self, prepared: Prepared, steps: int) -> Prepared:
        training = self.recipe.training
        step = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)
        sizes = {name: min(len(rows), step * steps if name == "train" else 1) for name, rows in prepared.splits.items()}
        self._trial_share = sizes["train"] / len(prepared.splits["train"])
        splits = {name: rows.select(range(sizes[name])) for name, rows in prepared.splits.items()}
        ids = {name: prepared.ids[name][: sizes[name]] for name in prepared.splits}
        return dataclasses.replace(prepared, splits=splits, ids=ids, folder=None)

    def trainer(self, model: nn.Module, prepared: Prepared, arguments: DPOConfig, callbacks: list[Any]):
        self.metrics = lambda prediction: means(per_pair(prediction.predictions, arguments.beta))
        trainer = super().trainer(model, prepared, arguments, callbacks)
        self.add_pass_figures(trainer)
        return trainer

    def add_pass_figures(self, trainer: Any) -> None:
        """Let the run's figures include the pass that computed the reference."""
        if self.reference is not None and (figures := self.reference.figures):
            trainer.pass_figures = {**figures, "seconds": figures["seconds"] / self._trial_share}

    def longest_example(self, number: int) -> dict[str, list[int]]:
        half = self.recipe.max_length // 2
        answer = [number] * (self.recipe.max_length - half)
        return {PROMPT: [number] * half, CHOSEN: answer, REJECTED: answer}

    def evaluate(self, trainer: PreferenceTrainer, prepared: Prepared, split: str) -> Evaluation:
        predictions = self.predict(trainer, prepared, split)
        figures = per_pair(predictions, trainer.args.beta)
        columns = dict(zip(PREDICTED, predictions.T, strict=True))
        tokens = {key: columns.pop(key).astype(int).tolist() for key in ("chosen_tokens", "rejected_tokens")}
        del columns["loss"]
        return Evaluation(
            metrics=means(figures),
            predictions={
                "id": prepared.ids[split],
                **{name: values.tolist() for name, values in figures.items()},
                **{f"{name}_log_probability": values.tolist() for name, values in columns.items()},
                **tokens,
            },
        )

    def model_inputs(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([example[PROMPT] + example[CHOSEN]])}


def text_pairs(task: Task, raw: dict[str, Any], tokenizer: Any) -> tuple[dict[str, Any], list[str]]:
    """The splits as pairs in trl's format, and a note on the columns that nothing reads."""
    splits, notes, chat = {}, [], tokenizer.chat_template is not None
    for name, rows in raw.items():
        source = task.source_of(name)
        splits[name] = preferences.preference_rows(rows, source, chat, task.skipped_of(name, rows))
        if name == "train":
            notes += preferences.preference_notes(rows, source)
            notes += unseen_note(splits[name], tokenizer, "chosen") if chat else []
    return splits, notes


def means(figures: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in figures.items()}


def left_out_notes(left_out: Counter[str], split: str) -> list[str]:
    return [f"{count} {split} pairs had {why} and were left out." for why, count in left_out.items()]
