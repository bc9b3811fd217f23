"""seq2seq: an input and its target with an encoder-decoder (T5, BART), the loss on the target."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import Seq2SeqTrainingArguments

from peft_recipes.data.columns import column_values
from peft_recipes.data.input_target import input_target_notes, input_target_rows
from peft_recipes.data.prepared import Prepared
from peft_recipes.data.rendering import with_end
from peft_recipes.errors import RecipeError
from peft_recipes.guards import checks
from peft_recipes.hardware.device import Hardware
from peft_recipes.models import bases
from peft_recipes.models.positions import encoder_decoder_limits
from peft_recipes.recipe.arm import Arm
from peft_recipes.scoring.generation import generate, room
from peft_recipes.tasks.base import Task
from peft_recipes.tasks.seq2seq_trainer import EncoderDecoderTrainer, Seq2SeqCollator, labelled_losses
from peft_recipes.tasks.sft import SupervisedFineTuning

if TYPE_CHECKING:
    import datasets
    import torch.nn as nn
    from transformers import PretrainedConfig

_TIMED_TOKENS = 32  # generated to measure the speed
_ANSWER_TOKENS = 64  # generated at most to answer a prompt


class Seq2Seq(SupervisedFineTuning):
    """An encoder-decoder, trained with transformers' Seq2SeqTrainer; both sides are truncated at max_length."""

    sequences_per_example = 3  # of the encoder, of the decoder, and as much again for its attention to the encoder

    def arguments(self, *args: Any, **kwargs: Any) -> Seq2SeqTrainingArguments:
        return Task.arguments(self, *args, **kwargs)

    def prepare(self) -> Prepared:
        self._check_positions()
        return super().prepare()

    def check_arguments(self, arm: Arm | None, hardware: Hardware) -> None:
        super().check_arguments(arm, hardware)
        self._check_positions(getattr(arm and arm.peft, "num_virtual_tokens", None) or 0)

    def _check_positions(self, virtual: int = 0) -> None:
        """Raise RecipeError if max_length, and an arm's virtual tokens, are more than the base has positions."""
        limits = [limit for limit in encoder_decoder_limits(bases.load_config(self.recipe)) if limit is not None]
        if limits and self.recipe.max_length + virtual > min(limits):
            tokens = f", and {virtual} virtual tokens are added" if virtual else ""
            raise RecipeError(
                f"max_length {self.recipe.max_length:,}: model '{self.recipe.model}' has {min(limits):,} positions"
                f"{tokens}. Set no more: --set max_length={min(limits) - virtual}."
            )

    def text_rows(
        self, raw: dict[str, datasets.Dataset], tokenizer: Any
    ) -> tuple[dict[str, datasets.Dataset], list[str]]:
        splits, notes = {}, []
        for name, rows in raw.items():
            source = self.source_of(name)
            splits[name] = input_target_rows(rows, source, self.skipped_of(name, rows))
            notes += input_target_notes(rows.column_names, source) if name == "train" else []
        return splits, notes

    def tokenise(self, row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        """input_ids, attention_mask and labels, truncated as the tokenizer does it, which keeps the end token."""
        longest = self.recipe.max_length
        ids = tokenizer(row["prompt"])["input_ids"]
        labels = with_end(tokenizer(text_target=row["completion"])["input_ids"], tokenizer)
        whole = [len(ids), len(labels)]
        if len(ids) > longest:
            ids = tokenizer(row["prompt"], truncation=True, max_length=longest)["input_ids"]
        if len(labels) > longest:
            labels = tokenizer(text_target=row["completion"], truncation=True, max_length=longest)["input_ids"]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "whole": whole}

    def _whole_counts(self, examples: datasets.Dataset) -> dict[str, list[int]]:
        whole = list(column_values(examples, "whole"))
        return {"tokens": list(map(max, whole)), "labelled": [target for _, target in whole]}

    def _truncated(
        self, examples: datasets.Dataset, split: str, end_tokens: set[int]
    ) -> tuple[datasets.Dataset, list[str]]:
        """Count the truncated examples, and check for an end token's label."""
        longest = self.recipe.max_length
        cut = sum(max(sizes) > longest for sizes in column_values(examples, "whole"))
        if split == "train" and self.guards("end-token"):
            checks.end_token_is_labelled(examples, end_tokens, longest)
        notes = [f"{cut} of {len(examples)} training examples were truncated at {longest} tokens."]
        return examples.remove_columns(["whole"]), notes if cut and split == "train" else []

    def trainer(
        self, model: nn.Module, prepared: Prepared, arguments: Seq2SeqTrainingArguments, callbacks: list[Any]
    ) -> EncoderDecoderTrainer:
        return EncoderDecoderTrainer(
            model=model,
            args=arguments,
            data_collator=Seq2SeqCollator(prepared.processor, model),
            train_dataset=prepared.splits["train"],
            eval_dataset=self.longest_first(prepared, "validation")[0],
            processing_class=prepared.processor,
            compute_metrics=self.metrics,
            callbacks=callbacks,
        )

    def example_order(self, config: PretrainedConfig) -> str:
        """By length: the batches of every arm are padded."""
        return "group_by_length"

    def largest_batch(self, model: nn.Module, prepared: Prepared | None, size: int) -> dict[str, torch.Tensor]:
        longest = dict.fromkeys(("input_ids", "labels"), self.recipe.max_length)
        if prepared:
            longest = {column: max(map(len, prepared.splits["train"][column])) for column in longest}
        ids = torch.ones(size, longest["input_ids"], dtype=torch.long)
        labels = torch.ones(size, longest["labels"], dtype=torch.long)
        return {"input_ids": ids, "attention_mask": ids, "decoder_input_ids": labels, "labels": labels}

    def step_loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return labelled_losses(model, batch)[0].sum()

    @functools.cached_property
    def decoder_start(self) -> int:
        """The token that the decoder's inputs begin with."""
        return bases.decoder_start(bases.load_config(self.recipe), self.recipe.model)

    def model_inputs(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        given = {key: torch.tensor([example[key]]) for key in ("input_ids", "attention_mask")}
        return {**given, "decoder_input_ids": torch.tensor([[self.decoder_start, *example["labels"][:-1]]])}

    def prompt_ids(self, row: dict[str, Any], tokenizer: Any) -> list[int]:
        return self.tokenise(row, tokenizer)["input_ids"]

    def prompt_tokens(self, prompt: str, tokenizer: Any) -> torch.Tensor:
        return tokenizer(prompt, return_tensors="pt")["input_ids"]

    def answer(self, model: nn.Module, prepared: Prepared) -> list[dict[str, str]] | None:
        tokenizer, limit, answers = prepared.processor, encoder_decoder_limits(model.config)[0], []
        for row in self.recipe.prompts:
            ids = tokenizer(row["prompt"])["input_ids"]
            if limit is not None and len(ids) > limit:
                why = f"the prompt has {len(ids):,} tokens, and the model's encoder {limit:,} positions"
                answers.append({**row, "answer": "", "skipped": why})
                continue
            (new,) = generate(model, [ids], tokenizer.pad_token_id, _ANSWER_TOKENS)
            answers.append({**row, "answer": tokenizer.decode(new, skip_special_tokens=True).strip()})
        return answers or None

    def generation_speed(self, model: nn.Module, prepared: Prepared) -> float:
        prompt = self.recipe.prompts[0]["prompt"] if self.recipe.prompts else "The"
        ids, pad = prepared.processor(prompt)["input_ids"], prepared.processor.pad_token_id
        ids = ids[: encoder_decoder_limits(model.config)[0]]
        generate(model, [ids], pad, 4)  # warm-up
        count = min(_TIMED_TOKENS, room(model, len(ids)) or _TIMED_TOKENS)
        start = time.perf_counter()
        (new,) = generate(model, [ids], pad, count, {"min_new_tokens": count})
        return len(new) / (time.perf_counter() - start)
