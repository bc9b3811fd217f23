"""What sft and language-modeling share: trl's SFTTrainer, losses an example, answers, generation."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import EvalPrediction, Trainer
from trl import SFTConfig

from peft_recipes.data.packing import COUNTS, KEPT, why_padded
from peft_recipes.data.prepared import Prepared
from peft_recipes.guards import checks
from peft_recipes.models import bases
from peft_recipes.runs.predictions import Evaluation
from peft_recipes.tasks import metrics
from peft_recipes.tasks.base import Task
from peft_recipes.tasks.causal_trainer import (
    LOGITS_BYTES,
    CausalTrainer,
    SharedRows,
    labelled_losses,
    logits_bytes,
    tensors,
)

if TYPE_CHECKING:
    import datasets
    import torch.nn as nn

_TRIED_BATCHES = 32  # of which the largest stands for a run's in a memory estimate
_TIMED_TOKENS = 32  # what generation's speed is measured on


def causal_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """loss (mean over labelled tokens), perplexity and token accuracy of sums [examples, 3]."""
    return metrics.token_metrics(*np.asarray(prediction.predictions, dtype=np.float64).T)


class Causal(Task):
    """A causal language model, by trl's SFTTrainer, on rows that are tokenised and labelled here."""

    trainer_class: type[SharedRows] = CausalTrainer
    metrics = staticmethod(causal_metrics)

    def arguments(self, *args: Any, **kwargs: Any) -> SFTConfig:
        arguments = super().arguments(*args, **kwargs)
        arguments.max_length = self.recipe.max_length
        arguments.dataset_kwargs = {**(arguments.dataset_kwargs or {}), "skip_prepare_dataset": True}
        return arguments

    @abstractmethod
    def text_rows(
        self, raw: dict[str, datasets.Dataset], tokenizer: Any
    ) -> tuple[dict[str, datasets.Dataset], list[str]]:
        """The splits with what is to be learnt as text, and notes on what was left out."""

    @abstractmethod
    def tokenise(self, row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
        """input_ids and labels (-100 where nothing is learnt) of one row, not yet cut."""

    def prepare(self) -> Prepared:
        tokenizer = bases.load_tokenizer(self.recipe)
        splits, notes = self.text_rows(self.raw_splits(), tokenizer)
        notes += self.left_out
        shared = [c for c in splits["train"].column_names if c != "id"]
        splits, dropped = self.without_duplicates(splits, shared)
        if dropped:
            notes.append(f"{dropped} examples that stand in a later split too were taken out.")
        made, ids = {}, {}
        for name, rows in splits.items():
            other = [c for c in rows.column_names if c != "id"]  # a further set may be plain text
            tokens = rows.map(lambda row: self.tokenise(row, tokenizer), remove_columns=other, keep_in_memory=True)
            cut = sum(len(t) > self.recipe.max_length for t in tokens["input_ids"])
            tokens = tokens.map(self._cut, keep_in_memory=True)
            tokens, unlabelled = checks.has_labelled_tokens(tokens, self.recipe.max_length, name)
            if name == "train" and self.recipe.task == "sft" and self.guards("end-token"):
                checks.end_token_is_labelled(tokens, bases.end_tokens(tokenizer), self.recipe.max_length)
            if cut and name == "train":
                notes.append(f"{cut} of {len(rows)} training examples were cut at {self.recipe.max_length} tokens.")
            if unlabelled:
                notes.append(f"{unlabelled} {name} examples kept no token to learn after the cut and were left out.")
            ids[name] = list(tokens["id"])
            made[name] = tokens.remove_columns(["id"])
        return Prepared(made, ids, self._fingerprint(splits), tokenizer, None, notes)

    def _cut(self, row: dict[str, Any]) -> dict[str, list[int]]:
        return {key: row[key][: self.recipe.max_length] for key in ("input_ids", "labels")}

    def load_base(self, prepared: Prepared, quantise: str | None = None) -> tuple[nn.Module, list[str]]:
        model, new = super().load_base(prepared, quantise)
        bases.set_pad_token(model, prepared.processor)
        return model, new

    def trainer(self, model: nn.Module, prepared: Prepared, arguments: SFTConfig, callbacks: list[Any]):
        made = self.trainer_class(
            model=model,
            args=arguments,
            data_collator=self.trainer_class.padded_collator(prepared.processor.pad_token_id),
            train_dataset=prepared.splits["train"],
            eval_dataset=self.longest_first(prepared, "validation")[0],
            processing_class=prepared.processor,
            compute_metrics=self.metrics,
            callbacks=callbacks,
        )
        longest = np.argsort(self.lengths(prepared, "train"), kind="stable")[-arguments.per_device_train_batch_size :]
        tried = [prepared.splits["train"][int(i)] for i in longest]
        made.choose_batches(self.recipe.batches, self.recipe.max_length, self.recipe.max_row_tokens, tried)
        if made.batches != "shared-prefix" and self.recipe.batches == "shared-prefix":
            prepared.notes.append(f"Batches are padded, not shared: {made.batches.partition(': ')[2]}.")
        return made

    def longest_first(self, prepared: Prepared, split: str) -> tuple[datasets.Dataset, np.ndarray]:
        """A split by falling length, and where each row came from: batches of like length waste no padding."""
        order = np.argsort([-length for length in self.lengths(prepared, split)], kind="stable")
        return prepared.splits[split].select(order), order

    def lengths(self, prepared: Prepared, split: str) -> list[int]:
        return [len(ids) for ids in prepared.splits[split]["input_ids"]]

    def largest_batch(self, model: nn.Module, prepared: Prepared | None, size: int) -> dict[str, torch.Tensor]:
        trainer = self.trainer_class
        virtual = any(c.is_prompt_learning for c in getattr(model, "peft_config", {}).values())
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        pad = (prepared.processor.pad_token_id if prepared else 0) or 0
        shares = self.recipe.batches == "shared-prefix" and not why_padded(base, self.recipe.max_length, virtual)
        collate = (
            trainer.shared_collator.for_model(base, pad, self.recipe.max_row_tokens)
            if shares
            else trainer.padded_collator(pad)
        )
        if prepared is None:
            return tensors(collate([self.longest_example(i) for i in range(size)]))
        rows = prepared.splits["train"]
        draw = np.random.default_rng(0)
        tried = [draw.choice(len(rows), min(size, len(rows)), replace=False) for _ in range(_TRIED_BATCHES)]
        if not shares:  # grouped by length: the longest stand in one batch
            tried = [np.argsort(self.lengths(prepared, "train"))[-size:]]
        made = [collate([rows[int(i)] for i in chosen]) for chosen in tried]
        return tensors(max(made, key=lambda batch: batch[COUNTS].computed))

    def longest_example(self, number: int) -> dict[str, list[int]]:
        """An example of max_length, which begins as no other does."""
        ids = [number] * self.recipe.max_length
        return {"input_ids": ids, "labels": ids}

    def step_loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        while logits_bytes(model.config, batch) > LOGITS_BYTES:  # then the head is computed piece by piece
            batch = {**batch, KEPT: batch[KEPT][: max(len(batch[KEPT]) // 2, 1)]}
        return labelled_losses(model, batch)[0].sum()

    def evaluate(self, trainer: Trainer, prepared: Prepared, split: str) -> Evaluation:
        rows, order = self.longest_first(prepared, split)
        output = trainer.predict(rows)
        sums = np.empty_like(output.predictions)
        sums[order] = output.predictions
        tokens = sums[:, 1].astype(int)
        return Evaluation(
            metrics=causal_metrics(EvalPrediction(predictions=sums, label_ids=None)),
            predictions={
                "id": prepared.ids[split],
                "loss": (sums[:, 0] / tokens).tolist(),
                "tokens": tokens.tolist(),
                "correct_tokens": sums[:, 2].astype(int).tolist(),
            },
        )

    def inputs(self, prepared: Prepared, count: int) -> list[dict[str, torch.Tensor]]:
        rows = prepared.splits["test"].select(range(min(count, len(prepared.splits["test"]))))
        return [{"input_ids": torch.tensor([row["input_ids"]])} for row in rows]

    def prompt_tokens(self, prompt: str, tokenizer: Any) -> torch.Tensor:
        """[1, tokens] of a prompt as the model saw prompts in training."""
        return tokenizer(prompt, return_tensors="pt")["input_ids"]

    def answer(self, model: nn.Module, prepared: Prepared) -> list[dict[str, str]] | None:
        if not self.recipe.prompts:
            return None
        return [
            {**row, "answer": self._generate(model, prepared.processor, row["prompt"], max_new_tokens=64)}
            for row in self.recipe.prompts
        ]

    def _generate(self, model: nn.Module, tokenizer: Any, prompt: str, **options: Any) -> str:
        ids = self.prompt_tokens(prompt, tokenizer).to(model.device)
        made = _greedy(model, ids, tokenizer, **options)
        return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()

    def generation_speed(self, model: nn.Module, prepared: Prepared) -> float:
        prompt = self.recipe.prompts[0]["prompt"] if self.recipe.prompts else "The"
        ids = self.prompt_tokens(prompt, prepared.processor).to(model.device)
        _greedy(model, ids, prepared.processor, max_new_tokens=4)  # warm-up
        start = time.perf_counter()
        made = _greedy(model, ids, prepared.processor, max_new_tokens=_TIMED_TOKENS, min_new_tokens=_TIMED_TOKENS)
        return (made.shape[1] - ids.shape[1]) / (time.perf_counter() - start)


def _greedy(model: nn.Module, ids: torch.Tensor, tokenizer: Any, **options: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
