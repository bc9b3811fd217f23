"""dpo: answers that people preferred, against those they did not, by trl's DPOTrainer.

Figures of a split, a pair counting as one:
- preference_accuracy: the share of pairs whose chosen answer the tuned model favours against the reference, the
  untrained base: its log-probability grew more than the rejected answer's. A pair without a difference counts half, so
  the base itself, which differs from its reference nowhere, has 0.5 by definition.
- margin: by how much, mean over the pairs: trl's rewards/margins (beta times the difference of the growths; base: 0).
- likelihood_accuracy: the share of pairs whose chosen answer the model itself gives the higher log-probability a token,
  whatever the reference says: where the base starts from is measured here.
- loss: the mean of the pairs' losses, of the kind that the recipe trains with.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import EvalPrediction
from trl import DPOConfig

from peft_recipes.data import preferences
from peft_recipes.data.packing import IGNORED, REFERENCES, PaddedCollator, SharedPrefixCollator
from peft_recipes.data.preference_packing import CHOSEN, PROMPT, REJECTED
from peft_recipes.data.prepared import Prepared
from peft_recipes.errors import RecipeError, unknown
from peft_recipes.guards import checks
from peft_recipes.hardware.device import Hardware, choose
from peft_recipes.models import bases
from peft_recipes.recipe.arm import Arm
from peft_recipes.runs.predictions import Evaluation
from peft_recipes.tasks import metrics
from peft_recipes.tasks.base import Task
from peft_recipes.tasks.preference_trainer import PREDICTED, PreferenceTrainer
from peft_recipes.tasks.reference import Reference
from peft_recipes.tasks.sft import SupervisedFineTuning, template, with_end

if TYPE_CHECKING:
    import datasets
    import torch.nn as nn

LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
          "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")  # fmt: skip
_TIE = 1e-3  # nats: what rounding in fp32 makes of two equal sums of a few hundred log-probabilities stays below
_CUT, _ALIKE = "no token left after the cut", "the same answer twice after the cut"


def per_pair(predictions: np.ndarray, beta: float) -> dict[str, np.ndarray]:
    """Of predictions [pairs, PREDICTED] each pair's figures: preference_accuracy, likelihood_accuracy, margin, loss."""
    found = dict(zip(PREDICTED, np.asarray(predictions, dtype=np.float64).T, strict=True))
    grown = (found["chosen"] - found["ref_chosen"]) - (found["rejected"] - found["ref_rejected"])
    a_token = [found[key] / np.maximum(found[f"{key}_tokens"], 1) for key in ("chosen", "rejected")]
    return {
        "preference_accuracy": metrics.preference_scores(grown, _TIE),
        "likelihood_accuracy": metrics.preference_scores(a_token[0] - a_token[1], 0.0),
        "margin": beta * grown,
        "loss": found["loss"],
    }


class Preferences(SupervisedFineTuning):
    """Pairs of a chosen and a rejected answer to one prompt. The reference is the untrained base, for every arm."""

    trainer_class = PreferenceTrainer
    sequences = 2
    reference: Reference | None = None
    _part = 1.0  # of the train split that is there

    def arguments(self, *args: Any, **kwargs: Any) -> DPOConfig:
        arguments = Task.arguments(self, *args, **kwargs)
        arguments.max_length = self.recipe.max_length
        arguments.precompute_ref_log_probs = True  # they are in the rows
        return arguments

    def check_arguments(self, arm: Arm | None, hardware: Hardware) -> None:
        asked = self.recipe.training.get("loss_type", [])
        wrong = [kind for kind in ([asked] if isinstance(asked, str) else asked) if kind not in LOSSES]
        if wrong:
            raise RecipeError(*(unknown("loss_type", str(kind), LOSSES, "training") for kind in wrong))
        super().check_arguments(arm, hardware)

    def text_rows(self, raw: Any, tokenizer: Any) -> tuple[dict[str, Any], list[str]]:
        made, notes = {}, []
        for name, rows in raw.items():
            made[name], left_out = preferences.preference_rows(
                rows, self.recipe.dataset, tokenizer.chat_template is not None
            )
            notes += _said(left_out, name)
        return made, notes

    def tokenise(self, row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
        """prompt_ids, chosen_ids and rejected_ids of a pair, as trl cuts them apart, not yet cut at max_length."""
        if isinstance(row["prompt"], list):
            prompt = template(tokenizer, row["prompt"], add_generation_prompt=True)
            answers = [template(tokenizer, row["prompt"] + row[key]) for key in ("chosen", "rejected")]
        else:
            prompt = list(tokenizer(row["prompt"])["input_ids"])
            answers = [
                with_end(tokenizer(row["prompt"] + row[key])["input_ids"], tokenizer) for key in ("chosen", "rejected")
            ]
        # The answers start where the first of them parts from the prompt: a token may span the seam.
        start = min(_shared(prompt, ids) for ids in answers)
        return {PROMPT: prompt[:start], CHOSEN: answers[0][start:], REJECTED: answers[1][start:]}

    def prepare(self) -> Prepared:
        tokenizer = bases.load_tokenizer(self.recipe)
        splits, notes = self.text_rows(self.raw_splits(), tokenizer)
        splits, dropped = self.without_duplicates(splits, ["prompt", "chosen"])
        if dropped:
            notes.append(f"{dropped} examples that stand in a later split too were taken out.")
        made, ids = {}, {}
        for name, rows in splits.items():
            texts = ["prompt", "chosen", "rejected"]
            pairs = rows.map(lambda row: self.tokenise(row, tokenizer), remove_columns=texts, keep_in_memory=True)
            if name == "train" and self.guards("end-token"):
                answers = [[IGNORED] * len(pair[PROMPT]) + pair[CHOSEN] for pair in pairs]
                checks.end_token_is_labelled({"labels": answers}, bases.end_tokens(tokenizer), self.recipe.max_length)
            pairs, said = self._within_max_length(pairs, name)
            notes += said
            ids[name] = list(pairs["id"])
            made[name] = pairs.remove_columns(["id"])
        return Prepared(made, ids, self._fingerprint(splits), tokenizer, None, notes)

    def _within_max_length(self, pairs: datasets.Dataset, name: str) -> tuple[datasets.Dataset, list[str]]:
        """Answers cut at their end, as trl cuts them; without the pairs of which nothing is left to tell apart."""
        longest, cut, left_out, kept = self.recipe.max_length, 0, Counter(), []
        for number, pair in enumerate(pairs):
            room = longest - len(pair[PROMPT])
            cut += max(len(pair[CHOSEN]), len(pair[REJECTED])) > room
            chosen, rejected = (pair[key][: max(room, 0)] for key in (CHOSEN, REJECTED))
            if min(len(chosen), len(rejected)) <= (not pair[PROMPT]):  # without a prompt, nothing predicts the first
                left_out[_CUT] += 1
            elif chosen == rejected:
                left_out[_ALIKE] += 1
            else:
                kept.append(number)
        if not kept:
            raise RecipeError(
                f"No {name} pair has answers to tell apart within {longest} tokens: the prompts alone are longer. "
                f"Set a larger one: --set max_length={2 * longest}."
            )
        notes = _said(left_out, name)
        if cut and name == "train":
            notes.append(f"{cut} of {len(pairs)} training pairs were cut at {longest} tokens.")
        return pairs.select(kept).map(self._cut, keep_in_memory=True), notes

    def _cut(self, row: dict[str, Any]) -> dict[str, Any]:
        room = self.recipe.max_length - len(row[PROMPT])
        chosen, rejected = row[CHOSEN][:room], row[REJECTED][:room]
        return {CHOSEN: chosen, REJECTED: rejected, "length": 2 * len(row[PROMPT]) + len(chosen) + len(rejected)}

    def lengths(self, prepared: Prepared, split: str) -> list[int]:
        return list(prepared.splits[split]["length"])

    def load_base(self, prepared: Prepared, quantise: str | None = None) -> tuple[nn.Module, list[str]]:
        """The base, which has by then said what it gives each answer, where that was not known yet."""
        model, new = super().load_base(prepared, quantise)
        if prepared.splits and REFERENCES[0] not in prepared.splits["train"].column_names:
            hardware = choose(self.recipe.training, self.recipe.threads)
            training = self.recipe.training
            batch = training.get("per_device_eval_batch_size", 8)
            self.reference = Reference(self._collator(model, prepared), hardware, batch, training.get("ld_alpha"))
            what = {"model": self.recipe.model, "precision": hardware.precision, "ld_alpha": training.get("ld_alpha"),
                    "rows": prepared.rows}  # fmt: skip
            if next(model.parameters()).device.type != hardware.device:
                model = model.to(hardware.device)
            prepared.splits = self.reference.add(model, prepared.splits, prepared.folder, what)
        return model, new

    def _collator(self, model: nn.Module, prepared: Prepared) -> SharedPrefixCollator | PaddedCollator:
        """As training's: shared where that is exact on this model, which the longest pairs show."""
        recipe, rows = self.recipe, prepared.splits["train"]
        longest = np.argsort(self.lengths(prepared, "train"), kind="stable")[-4:]
        return PreferenceTrainer.collator_for(
            model,
            prepared.processor.pad_token_id,
            recipe.batches,
            recipe.max_length,
            recipe.max_row_tokens,
            [rows[int(i)] for i in longest],
        )[0]

    def for_trial(self, prepared: Prepared, steps: int) -> Prepared:
        training = self.recipe.training
        size = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)
        some = {name: range(min(len(rows), size * steps if name == "train" else 1))
                for name, rows in prepared.splits.items()}  # fmt: skip
        self._part = len(some["train"]) / len(prepared.splits["train"])
        splits = {name: rows.select(some[name]) for name, rows in prepared.splits.items()}
        ids = {name: prepared.ids[name][: len(some[name])] for name in prepared.splits}
        return dataclasses.replace(prepared, splits=splits, ids=ids, folder=None)

    def trainer(self, model: nn.Module, prepared: Prepared, arguments: DPOConfig, callbacks: list[Any]):
        beta = arguments.beta
        self.metrics = lambda prediction: _means(prediction, beta)
        made = super().trainer(model, prepared, arguments, callbacks)
        if self.reference is not None and self.reference.figures:
            figures = self.reference.figures
            made.pass_figures = {**figures, "seconds": figures["seconds"] / self._part}
        return made

    def longest_example(self, number: int) -> dict[str, list[int]]:
        half = self.recipe.max_length // 2
        answer = [number] * (self.recipe.max_length - half)
        return {PROMPT: [number] * half, CHOSEN: answer, REJECTED: answer}

    def evaluate(self, trainer: PreferenceTrainer, prepared: Prepared, split: str) -> Evaluation:
        rows, order = self.longest_first(prepared, split)
        output = trainer.predict(rows)
        predictions = np.empty_like(output.predictions)
        predictions[order] = output.predictions
        figures = per_pair(predictions, trainer.args.beta)
        columns = dict(zip(PREDICTED, predictions.T, strict=True))
        tokens = {key: columns.pop(key).astype(int).tolist() for key in ("chosen_tokens", "rejected_tokens")}
        del columns["loss"]
        return Evaluation(
            metrics={name: float(values.mean()) for name, values in figures.items()},
            predictions={
                "id": prepared.ids[split],
                **{name: values.tolist() for name, values in figures.items()},
                **{f"{name}_log_probability": values.tolist() for name, values in columns.items()},
                **tokens,
            },
        )

    def inputs(self, prepared: Prepared, count: int) -> list[dict[str, torch.Tensor]]:
        rows = prepared.splits["test"].select(range(min(count, len(prepared.splits["test"]))))
        return [{"input_ids": torch.tensor([row[PROMPT] + row[CHOSEN]])} for row in rows]


def _means(prediction: EvalPrediction, beta: float) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in per_pair(prediction.predictions, beta).items()}


def _shared(first: list[int], second: list[int]) -> int:
    """How many tokens two sequences begin with alike."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def _said(left_out: Counter[str], split: str) -> list[str]:
    return [f"{count} {split} pairs had {why} and were left out." for why, count in left_out.items()]
