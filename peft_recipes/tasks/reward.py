"""reward: a reward model, which scores an answer to a prompt, from pairs of answers, with trl's RewardTrainer.

A new head with one output reads the last token of prompt and answer. Figures of a split, means over its pairs:
- preference_accuracy: the share of pairs whose chosen answer has the higher score; equal scores count half.
- margin: the score of the chosen answer minus that of the rejected one.
- loss: -log sigmoid(margin), and trl's center_rewards_coefficient times the squared sum of both scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid
from transformers import EvalPrediction
from trl import RewardConfig

from peft_recipes.data import formats
from peft_recipes.data.lengths import token_counts
from peft_recipes.data.packing import COUNTS
from peft_recipes.data.preference_packing import CHOSEN, REJECTED
from peft_recipes.data.prepared import Prepared
from peft_recipes.data.rendering import tokenised_answers, tokenised_rows
from peft_recipes.errors import RecipeError
from peft_recipes.kernels import activations
from peft_recipes.models import bases
from peft_recipes.models.meta import head_options
from peft_recipes.runs.predictions import Evaluation
from peft_recipes.tasks import metrics, reading
from peft_recipes.tasks.base import Task
from peft_recipes.tasks.dpo import means, text_pairs
from peft_recipes.tasks.reward_trainer import PairCollator, ScoreTrainer

if TYPE_CHECKING:
    import datasets
    import torch.nn as nn
    from transformers import PretrainedConfig


def per_pair(scores: np.ndarray, center_coefficient: float | None = None) -> dict[str, np.ndarray]:
    """preference_accuracy, margin and loss of each pair, from scores [pairs, 2], the chosen answers' first."""
    chosen, rejected = np.asarray(scores, dtype=np.float64).T
    loss = np.logaddexp(0.0, rejected - chosen) + (center_coefficient or 0.0) * (chosen + rejected) ** 2
    return {
        "preference_accuracy": metrics.preference_scores(chosen - rejected, 0.0),
        "margin": chosen - rejected,
        "loss": loss,
    }


class RewardModelling(Task):
    """Score the chosen answer of a pair above the rejected one. The data's formats are those of dpo."""

    sequences_per_example = 2

    def arguments(self, *args: Any, **kwargs: Any) -> RewardConfig:
        arguments = super().arguments(*args, **kwargs)
        arguments.max_length = self.recipe.max_length
        return arguments

    def prepare(self) -> Prepared:
        tokenizer = bases.load_tokenizer(self.recipe)
        _, splits, found = reading.read(self, lambda raw: text_pairs(self, raw, tokenizer))
        notes = reading.named_notes(self, found)
        splits, duplicates = self.without_duplicates(splits, ["prompt", "chosen"])
        notes += [*self.notes, *duplicates]
        tokenised, ids, whole = {}, {}, {}
        for name, rows in splits.items():
            text_columns = [c for c in rows.column_names if c != "id"]
            splits[name], pairs = tokenised_rows(
                rows, text_columns, lambda row: _tokenised(row, tokenizer), self.skipped_of(name, rows)
            )
            whole[name] = token_counts(pairs, "reward")
            pairs, more = self._short_enough(pairs, name)
            notes += more
            ids[name] = list(pairs["id"])
            tokenised[name] = pairs.remove_columns(["id"])
        notes += self.skipped_notes()
        return Prepared(tokenised, ids, formats.fingerprint(splits), tokenizer, None, notes, whole=whole)

    def _short_enough(self, pairs: datasets.Dataset, split: str) -> tuple[datasets.Dataset, list[str]]:
        """Leave out the pairs with an answer beyond max_length, as trl does: without its end it has another score."""
        longest = self.recipe.max_length
        kept = [i for i, pair in enumerate(pairs) if max(len(pair[CHOSEN]), len(pair[REJECTED])) <= longest]
        if not kept:
            raise RecipeError(
                f"No {split} pair fits in {longest} tokens with its prompt. Set a larger one: "
                f"--set max_length={2 * longest}."
            )
        left_out = len(pairs) - len(kept)
        notes = [f"{left_out} {split} pairs have more than {longest} tokens and were left out."] if left_out else []
        return pairs.select(kept), notes

    def base_options(self, prepared: Prepared | None) -> dict[str, Any]:
        return head_options(self.recipe)

    def example_order(self, config: PretrainedConfig) -> str:
        return "group_by_length"

    def trainer(self, model: nn.Module, prepared: Prepared, arguments: RewardConfig, callbacks: list[Any]):
        return ScoreTrainer(
            model=model,
            args=arguments,
            data_collator=PairCollator(prepared.processor.pad_token_id),
            train_dataset=prepared.splits["train"],
            eval_dataset=prepared.splits["validation"],
            processing_class=prepared.processor,
            compute_metrics=lambda prediction: self._metrics(prediction, arguments),
            callbacks=callbacks,
        )

    def _metrics(self, prediction: EvalPrediction, arguments: RewardConfig) -> dict[str, float]:
        return means(per_pair(prediction.predictions, arguments.center_rewards_coefficient))

    def evaluate(self, trainer: ScoreTrainer, prepared: Prepared, split: str) -> Evaluation:
        # By falling length, which saves padding.
        order = np.argsort([-length for length in self.lengths(prepared, split)], kind="stable")
        output = trainer.predict(prepared.splits[split].select(order))
        scores = np.empty_like(output.predictions)
        scores[order] = output.predictions
        figures = per_pair(scores, trainer.args.center_rewards_coefficient)
        return Evaluation(
            metrics=means(figures),
            predictions={
                "id": prepared.ids[split],
                **{name: values.tolist() for name, values in figures.items()},
                "chosen_score": scores[:, 0].tolist(),
                "rejected_score": scores[:, 1].tolist(),
            },
        )

    def lengths(self, prepared: Prepared, split: str) -> list[int]:
        return list(prepared.splits[split]["length"])

    def largest_batch(self, model: nn.Module, prepared: Prepared | None, size: int) -> dict[str, torch.Tensor]:
        model.config.pad_token_id = model.config.pad_token_id or 0  # `load_base` sets it from the tokenizer
        if prepared is None:
            examples = [{key: [1] * self.recipe.max_length for key in (CHOSEN, REJECTED)}] * size
        else:  # grouped by length: the longest pairs make one batch
            order = np.argsort(self.lengths(prepared, "train"), kind="stable")[-size:]
            examples = [prepared.splits["train"][int(i)] for i in order]
        batch = PairCollator(model.config.pad_token_id)(examples)
        return {key: value for key, value in batch.items() if key != COUNTS}

    def step_loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with activations.recomputed():
            chosen, rejected = model(**batch, use_cache=False).logits.squeeze(-1).chunk(2)
        return -logsigmoid(chosen - rejected).mean()

    def model_inputs(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([example[CHOSEN]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _tokenised(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """chosen_ids and rejected_ids of a pair, each with its prompt, as trl tokenises them."""
    _, (chosen, rejected) = tokenised_answers(row, ["chosen", "rejected"], tokenizer)
    return {CHOSEN: chosen, REJECTED: rejected, "length": len(chosen) + len(rejected)}


def scored_tokens(text: str, prompt: str | None, tokenizer: Any) -> list[int]:
    """The tokens of an answer to a prompt in the training's format; without a prompt, of the text as it is."""
    if prompt is None:
        prompt, text = "", text
    elif tokenizer.chat_template is not None:
        row = {"prompt": [{"role": "user", "content": prompt}], "answer": [{"role": "assistant", "content": text}]}
        return tokenised_answers(row, ["answer"], tokenizer)[1][0]
    else:
        prompt = formats.plain_prompt(prompt)
    return tokenised_answers({"prompt": prompt, "answer": text}, ["answer"], tokenizer)[1][0]
