"""The base class of causal language model tasks: trl's SFTTrainer, losses per example, answers and generation speed."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import EvalPrediction, Trainer
from trl import SFTConfig

from peft_recipes.data import formats
from peft_recipes.data.columns import column_values, map_in_memory
from peft_recipes.data.lengths import token_counts
from peft_recipes.data.packing import COUNTS, IGNORED, KEPT, why_padded
from peft_recipes.data.prepared import Prepared
from peft_recipes.data.rendering import tokenised_rows
from peft_recipes.data.supervised import TRAINED
from peft_recipes.distributed.gather import is_sharded
from peft_recipes.errors import RecipeError
from peft_recipes.guards import checks
from peft_recipes.hardware.device import Hardware
from peft_recipes.kernels.packed_attention import FLEX, VARLEN
from peft_recipes.models import bases
from peft_recipes.models.meta import meta_model
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.dataset import LAST, WEIGHTED
from peft_recipes.runs.predictions import Evaluation
from peft_recipes.scoring import answers
from peft_recipes.tasks import greedy, metrics, reading, streamed
from peft_recipes.tasks.base import Task
from peft_recipes.tasks.causal_losses import labelled_losses, logits_bytes, tensors
from peft_recipes.tasks.causal_trainer import (
    LOGITS_BYTES,
    CausalTrainer,
    PrefixSharingMixin,
    base_model_of,
    is_prompt_learning,
)

if TYPE_CHECKING:
    import datasets
    import torch.nn as nn
    from transformers import PretrainedConfig

_SAMPLED_BATCHES = 32  # the largest of so many random batches is the one of a memory estimate


def causal_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """loss (mean over labelled tokens), perplexity and token accuracy of sums [examples, 3]."""
    return metrics.token_metrics(*np.asarray(prediction.predictions, dtype=np.float64).T)


class Causal(Task):
    """A causal language model, trained with trl's SFTTrainer on examples that are tokenised and labelled here."""

    trainer_class: type[PrefixSharingMixin] = CausalTrainer
    metrics = staticmethod(causal_metrics)
    duplicate_columns: tuple[str, ...] = ()  # by which examples of two splits are the same; (): all columns

    def arguments(self, *args: Any, **kwargs: Any) -> SFTConfig:
        arguments = super().arguments(*args, **kwargs)
        arguments.max_length = self.recipe.max_length
        arguments.dataset_kwargs = {**(arguments.dataset_kwargs or {}), "skip_prepare_dataset": True}
        return arguments

    def check_arguments(self, arm: Arm | None, hardware: Hardware) -> None:
        super().check_arguments(arm, hardware)
        kernel, attention = self.recipe.packed_attention, self.recipe.attention
        if hardware.device != "cuda" and (kernel in (FLEX, VARLEN) or attention == "flex_attention"):
            name = f"packed_attention: '{kernel}'" if kernel in (FLEX, VARLEN) else f"attention: '{attention}'"
            raise RecipeError(f"{name} trains on a CUDA GPU alone, and this run is on {hardware.device}. Leave it out.")
        if kernel == VARLEN and hardware.autocast_dtype is None:
            raise RecipeError(
                f"packed_attention: '{kernel}' takes half precision alone, and this run is in fp32. Set training.bf16, "
                "or leave it out."
            )

    @abstractmethod
    def text_rows(
        self, raw: dict[str, datasets.Dataset], tokenizer: Any
    ) -> tuple[dict[str, datasets.Dataset], list[str]]:
        """The splits as text or messages, and notes on what was left out."""

    @abstractmethod
    def tokenise(self, row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
        """input_ids and labels (-100 where there is no loss) of one row, not yet truncated."""

    def prepare(self) -> Prepared:
        tokenizer = bases.load_tokenizer(self.recipe)
        raw, splits, found = reading.read(self, lambda raw: self.text_rows(raw, tokenizer))
        notes = reading.named_notes(self, found) + self.notes
        compared = list(self.duplicate_columns) or [c for c in splits["train"].column_names if c != "id"]
        splits, duplicates = self.without_duplicates(splits, compared)
        notes += duplicates
        tokenised, ids, whole = {}, {}, {}
        for name, rows in splits.items():
            text_columns = [c for c in rows.column_names if c != "id"]  # a further evaluation set may be plain text
            splits[name], examples = tokenised_rows(
                rows, text_columns, lambda row: self.tokenise(row, tokenizer), self.skipped_of(name, rows)
            )
            whole[name] = self._whole_counts(examples)
            examples, more = self._truncated(examples, name, bases.end_tokens(tokenizer))
            notes += more
            ids[name] = list(column_values(examples, "id"))
            tokenised[name] = examples.remove_columns(["id"])
        notes += self.skipped_notes()
        prepared = Prepared(tokenised, ids, formats.fingerprint(splits), tokenizer, None, notes, whole=whole)
        prepared.prompts = self.scored_prompts(raw, splits, prepared)

        def convert(chunk: datasets.Dataset) -> Any:
            return self.text_rows({"train": chunk}, tokenizer)[0]["train"], tokenise_chunk

        def tokenise_chunk(rows: datasets.Dataset) -> datasets.Dataset:
            texts = [c for c in rows.column_names if c != "id"]
            rows, examples = tokenised_rows(
                rows, texts, lambda row: self.tokenise(row, tokenizer), self.skipped_of("chunk", rows)
            )
            return self._truncated(examples, "train", bases.end_tokens(tokenizer))[0]

        if self.recipe.task == "sft":  # whether messages have weights, which a chunk may not show
            weighted = TRAINED in splits["train"].column_names
            self.settled = {"train_on": self.recipe.dataset.train_on or (WEIGHTED if weighted else LAST)}
        return streamed.attach(self, prepared, raw, splits, compared, convert)

    def _whole_counts(self, examples: datasets.Dataset) -> dict[str, list[int]]:
        """Tokens and labelled tokens of examples that are not yet truncated."""
        return token_counts(examples, self.recipe.task)

    def scored_prompts(
        self, raw: dict[str, datasets.Dataset], texts: dict[str, datasets.Dataset], prepared: Prepared
    ) -> dict[str, list[dict[str, Any]]]:
        """The examples whose answers are scored (`Prepared.prompts`); none for tasks without prompts."""
        return {}

    def _truncated(
        self, examples: datasets.Dataset, split: str, end_tokens: set[int]
    ) -> tuple[datasets.Dataset, list[str]]:
        """Truncate the examples at max_length, drop those without a label left, and check for an end token's label."""
        longest, notes, total = self.recipe.max_length, [], len(examples)
        cut = sum(len(ids) > longest for ids in column_values(examples, "input_ids"))
        if cut:
            examples = map_in_memory(examples, lambda row: {key: row[key][:longest] for key in ("input_ids", "labels")})
        examples, unlabelled = checks.has_labelled_tokens(examples, longest, split)
        if split == "train" and self.recipe.task == "sft" and self.guards("end-token"):
            checks.end_token_is_labelled(examples, end_tokens, longest)
        if cut and split == "train":
            notes.append(f"{cut} of {total} training examples were truncated at {longest} tokens.")
        if unlabelled:
            notes.append(f"{unlabelled} {split} examples have no labelled token after truncation and were left out.")
        return examples, notes

    def trainer(self, model: nn.Module, prepared: Prepared, arguments: SFTConfig, callbacks: list[Any]):
        trainer = self.trainer_class(
            model=model,
            args=arguments,
            data_collator=self.trainer_class.padded_collator(prepared.processor.pad_token_id),
            train_dataset=prepared.train_rows(arguments.data_seed),
            eval_dataset=self.longest_first(prepared, "validation")[0],
            processing_class=prepared.processor,
            compute_metrics=self.metrics,
            callbacks=callbacks,
        )
        options = self.batching(prepared, arguments.per_device_train_batch_size)
        batches = trainer.choose_batches(*options, prepared.folder)
        if batches != "shared-prefix" and self.recipe.batches == "shared-prefix":
            prepared.notes.append(f"Batches are padded, without prefix sharing: {batches.partition(': ')[2]}.")
        return trainer

    def example_order(self, config: PretrainedConfig) -> str:
        """By length where every arm's batches are padded, which saves padding; random where they can be packed.

        An arm that must be padded on a base that can be packed (virtual tokens, aLoRA, a quantised base whose losses
        differ) keeps the random order of the others.
        """
        config, coefficient = copy.deepcopy(config), self.recipe.training.get("router_aux_loss_coef")
        if coefficient is not None and hasattr(config, "output_router_logits"):
            config.router_aux_loss_coef = coefficient  # as trl sets it
        why = self.recipe_pads() or why_padded(meta_model(self.recipe, config), self.recipe.max_length)
        return "group_by_length" if why else "random"

    def recipe_pads(self) -> str | None:
        """Why the recipe itself asks for padded batches, if it does."""
        if self.recipe.batches != "shared-prefix":
            return "as the recipe sets it"
        if self.recipe.training.get("neftune_noise_alpha"):
            return "NEFTune's noise depends on the length of a sequence"
        return None

    def batching(self, prepared: Prepared, count: int) -> tuple[Any, ...]:
        """The recipe's part of the arguments of `collator_for`, with the longest `count` examples."""
        recipe, examples = self.recipe, self.longest(prepared, count)
        return self.recipe_pads(), recipe.max_length, recipe.max_row_tokens, examples, recipe.packed_attention

    def longest(self, prepared: Prepared, count: int) -> list[dict[str, Any]]:
        """The longest `count` training examples."""
        order = np.argsort(self.lengths(prepared, "train"), kind="stable")[-count:]
        return [prepared.splits["train"][int(i)] for i in order]

    def longest_first(self, prepared: Prepared, split: str) -> tuple[datasets.Dataset, np.ndarray]:
        """A split by falling length, which saves padding, and the index of each of its examples in the split."""
        order = np.argsort([-length for length in self.lengths(prepared, split)], kind="stable")
        return prepared.splits[split].select(order), order

    def predict(self, trainer: Trainer, prepared: Prepared, split: str) -> np.ndarray:
        """The trainer's predictions [examples, columns] for a split, in the split's order."""
        rows, order = self.longest_first(prepared, split)
        output = trainer.predict(rows)
        predictions = np.empty_like(output.predictions)
        predictions[order] = output.predictions
        return predictions

    def lengths(self, prepared: Prepared, split: str) -> list[int]:
        return [len(ids) for ids in prepared.splits[split]["input_ids"]]

    def largest_batch(self, model: nn.Module, prepared: Prepared | None, size: int) -> dict[str, torch.Tensor]:
        trainer, recipe, base = self.trainer_class, self.recipe, base_model_of(model)
        pad = (prepared.processor.pad_token_id if prepared else 0) or 0
        pads = self.recipe_pads() or why_padded(base, recipe.max_length, is_prompt_learning(model))
        collate = trainer.padded_collator(pad)
        if not pads:
            collate = trainer.shared_collator.for_model(base, pad, recipe.max_row_tokens)
        if prepared is None:
            return tensors(collate([self.longest_example(i) for i in range(size)]))
        if pads:  # grouped by length: the longest examples make one batch
            return tensors(collate(self.longest(prepared, size)))
        rows, random = prepared.splits["train"], np.random.default_rng(0)
        sampled = [random.choice(len(rows), min(size, len(rows)), replace=False) for _ in range(_SAMPLED_BATCHES)]
        batches = [collate([rows[int(i)] for i in indices]) for indices in sampled]
        return tensors(max(batches, key=lambda batch: batch[COUNTS].computed))

    def longest_example(self, number: int) -> dict[str, list[int]]:
        """An example of max_length that shares no prefix with one of another number."""
        ids = [number] * self.recipe.max_length
        return {"input_ids": ids, "labels": ids}

    def step_loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        while logits_bytes(model.config, batch) > LOGITS_BYTES:  # then the LM head is computed in chunks
            batch = {**batch, KEPT: batch[KEPT][: max(len(batch[KEPT]) // 2, 1)]}
        return labelled_losses(model, batch)[0].sum()

    def evaluate(self, trainer: Trainer, prepared: Prepared, split: str) -> Evaluation:
        sums = self.predict(trainer, prepared, split)
        tokens = sums[:, 1].astype(int)
        evaluation = Evaluation(
            metrics=causal_metrics(EvalPrediction(predictions=sums, label_ids=None)),
            predictions={
                "id": prepared.ids[split],
                "loss": (sums[:, 0] / tokens).tolist(),
                "tokens": tokens.tolist(),
                "correct_tokens": sums[:, 2].astype(int).tolist(),
            },
        )
        if size := labelled_bytes(prepared, split):
            evaluation.metrics["bits_per_byte"] = math.fsum(sums[:, 0]) / math.log(2) / size
        if prompts := prepared.prompts.get(split):
            answered = self._scored_answers(trainer, prepared, prompts, len(tokens))
            evaluation.metrics |= answered.metrics
            evaluation.predictions |= answered.predictions
            evaluation.errors = answered.errors
        return evaluation

    def _scored_answers(
        self, trainer: Trainer, prepared: Prepared, prompts: list[dict[str, Any]], examples: int
    ) -> answers.Scored:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        precision, sharded = trainer.accelerator.autocast, is_sharded(model)
        given = answers.answer(model, prepared.processor, prompts, self.recipe, precision, sharded, trainer.on_answers)
        return answers.scored(given, prompts, self.recipe, examples)

    def model_inputs(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([example["input_ids"]])}

    def prompt_tokens(self, prompt: str, tokenizer: Any) -> torch.Tensor:
        """[1, tokens] of a prompt, in the format of the training examples."""
        return tokenizer(prompt, return_tensors="pt")["input_ids"]

    def answer(self, model: nn.Module, prepared: Prepared) -> list[dict[str, str]] | None:
        return greedy.answers(model, prepared.processor, self.recipe.prompts, self.prompt_tokens)

    def generation_speed(self, model: nn.Module, prepared: Prepared) -> float:
        return greedy.tokens_per_second(model, prepared.processor, self.recipe.prompts, self.prompt_tokens)


def labelled_bytes(prepared: Prepared, split: str) -> int:
    """Bytes (UTF-8) of the text that the labelled tokens of a split stand for, without special tokens."""
    labels = ([token for token in row if token != IGNORED] for row in prepared.splits[split]["labels"])
    texts = prepared.processor.batch_decode(list(labels), skip_special_tokens=True)
    return sum(len(text.encode()) for text in texts)
