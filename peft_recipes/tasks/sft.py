"""sft: answers to prompts, in the model's chat template, the loss on the answer alone."""

from __future__ import annotations

from typing import Any

import torch

from peft_recipes.data import columns
from peft_recipes.tasks.causal import Causal


class SupervisedFineTuning(Causal):
    """Prompt and completion, messages, or Alpaca's columns; plain text where the rows have nothing else."""

    def text_rows(self, raw: Any, tokenizer: Any) -> tuple[dict[str, Any], list[str]]:
        chat = tokenizer.chat_template is not None
        made, notes = {}, []
        for name, rows in raw.items():
            made[name], empty = columns.sft_rows(rows, self.source_of(name), chat)
            if empty:
                notes.append(f"{empty} {name} examples had an empty answer and were left out.")
        return made, notes

    def tokenise(self, row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
        if "text" in row:
            ids = with_end(tokenizer(row["text"])["input_ids"], tokenizer)
            return {"input_ids": ids, "labels": list(ids)}
        if isinstance(row["prompt"], list):
            prompt = template(tokenizer, row["prompt"], add_generation_prompt=True)
            ids = template(tokenizer, row["prompt"] + row["completion"])
        else:
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = with_end(tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer)
        # The answer starts where the two part: a token may span the seam, or the template close a turn differently.
        start = next(
            (i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids))
        )
        return {"input_ids": ids, "labels": [-100] * start + ids[start:]}

    def prompt_tokens(self, prompt: str, tokenizer: Any) -> torch.Tensor:
        if tokenizer.chat_template is None:
            return tokenizer(columns.plain_prompt(prompt), return_tensors="pt")["input_ids"]
        return torch.tensor([template(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)])


def template(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))


def with_end(ids: list[int], tokenizer: Any) -> list[int]:
    """The model learns to stop only where an end-of-text token carries a label."""
    return list(ids) if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
