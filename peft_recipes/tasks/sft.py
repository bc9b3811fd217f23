"""sft: answers to prompts in the model's chat template, the loss on the answer only."""

from __future__ import annotations

import json
from typing import Any

import torch

from peft_recipes.data import formats
from peft_recipes.data.columns import column_values
from peft_recipes.data.packing import IGNORED
from peft_recipes.data.prepared import Prepared
from peft_recipes.data.rendering import (
    common_prefix,
    labelled,
    text_ids,
    tokenised_answers,
    unseen_note,
)
from peft_recipes.data.shapes import detect, unused_note
from peft_recipes.data.supervised import sft_rows
from peft_recipes.errors import RecipeError
from peft_recipes.recipe.metrics import PREFERENCE
from peft_recipes.scoring import answers
from peft_recipes.scoring.text_metrics import scorer
from peft_recipes.tasks.causal import Causal


class SupervisedFineTuning(Causal):
    """Prompt and completion, messages, or Alpaca's columns; plain text where the rows have nothing else."""

    def text_rows(self, raw: Any, tokenizer: Any) -> tuple[dict[str, Any], list[str]]:
        chat = tokenizer.chat_template is not None
        splits, notes = {}, []
        for name, rows in raw.items():
            source = self.source_of(name)
            shape = detect(rows, source)
            if name == "train":
                notes.append(f"The dataset was read as {shape}.")
                notes += [] if self.recipe.score else unused_note(rows.column_names, shape.used())
            splits[name] = sft_rows(rows, source, shape, chat, self.skipped_of(name, rows))
            if name == "train" and chat and shape.kind != "text":
                notes += unseen_note(splits[name], tokenizer)
        return splits, notes

    def tokenise(self, row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        if "text" in row:
            ids = text_ids(row["text"], tokenizer)
            return {"input_ids": ids, "labels": list(ids)}
        if isinstance(row["prompt"], list):
            return labelled(row, tokenizer)
        prompt, (ids,) = tokenised_answers(row, ["completion"], tokenizer)
        start = common_prefix(prompt, ids)  # a token may span prompt and answer
        return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}

    def scored_prompts(self, raw: Any, texts: Any, prepared: Prepared) -> dict[str, list[dict[str, Any]]]:
        if not self.recipe.scores_answers:
            return {}
        scorer(self.recipe)  # a score that can't be imported is an error before anything is trained
        # A judge compares the answers to the test split alone.
        unscored = set(texts) - {"test"} if self.recipe.metric == PREFERENCE else {"train", "validation"}
        scored = {
            name: self._scored_prompts_of(name, raw[name], rows, prepared)
            for name, rows in texts.items()
            if name not in unscored and "prompt" in rows.column_names
        }
        if self.reads_test and "test" not in scored:
            raise RecipeError(
                f"metric '{self.recipe.metric}' scores answers to prompts, and the rows of "
                f"'{self.recipe.data_name}' are plain text. Set metric: loss, or name a dataset with prompts "
                "and answers."
            )
        for name, prompts in scored.items():
            answers.check_references(self.recipe, prompts, name)
            if self.recipe.metric == "score" and prompts:  # a function that raises is an error now
                first = prompts[0]
                scorer(self.recipe)([first["reference"]], [first["reference"]], [first["row"]])
        return scored

    def _scored_prompts_of(self, split: str, raw: Any, rows: Any, prepared: Prepared) -> list[dict[str, Any]]:
        by_id = {one_id: number for number, one_id in enumerate(column_values(rows, "id"))}
        raw_by_id = {one_id: number for number, one_id in enumerate(raw["id"])}
        prompts, labels = [], prepared.splits[split]["labels"]
        for index in answers.sample(len(prepared.ids[split]), self.recipe.test_generations):
            one_id = prepared.ids[split][index]
            row, columns = rows[by_id[one_id]], raw[raw_by_id[one_id]]
            prompts.append({
                "index": index,
                "id": one_id,
                "prompt": formats.as_text(row["prompt"]),
                "prompt_ids": self.prompt_ids(row, prepared.processor),
                "reference": formats.as_text(row["completion"]) or self._labelled_text(split, index, prepared),
                "reference_tokens": sum(label != IGNORED for label in labels[index]),
                "row": json.loads(json.dumps(columns, default=str)),  # equal in every process of a comparison
            })  # fmt: skip
        return prompts

    def _labelled_text(self, split: str, index: int, prepared: Prepared) -> str:
        """What an answer without a text says, such as a tool call, as the chat template writes it."""
        labels = prepared.splits[split]["labels"][index]
        return prepared.processor.decode([i for i in labels if i != IGNORED], skip_special_tokens=True).strip()

    def prompt_ids(self, row: dict[str, Any], tokenizer: Any) -> list[int]:
        """The tokens of a row's prompt, as its answer is generated after them."""
        return tokenised_answers(row, [], tokenizer)[0]

    def prompt_tokens(self, prompt: str, tokenizer: Any) -> torch.Tensor:
        if tokenizer.chat_template is None:
            return tokenizer(formats.plain_prompt(prompt), return_tensors="pt")["input_ids"]
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )["input_ids"]
