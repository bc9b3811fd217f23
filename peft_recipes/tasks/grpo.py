"""grpo: answers are drawn, rewarded by a function, and made likelier or less likely, with trl's GRPOTrainer.

The reward is verifiable: `reward` of the recipe, a function of an answer and its row, or the score of the recipe's
metric against the reference. Figures of a split, from one greedy answer to each prompt:
- reward: the mean reward.
- the recipe's metric (scoring/text_metrics.py), if it is another.
- ended, answer_tokens, empty_answers: as for sft.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import torch
from trl import GRPOConfig

from peft_recipes.data import formats
from peft_recipes.data.packing import COUNTS, IGNORED, PaddedCollator
from peft_recipes.data.prepared import Prepared
from peft_recipes.data.prompts import prompt_notes, prompt_rows
from peft_recipes.data.rendering import tokenised_answers, tokenised_rows
from peft_recipes.distributed.gather import is_sharded
from peft_recipes.errors import RecipeError
from peft_recipes.hardware.device import Hardware
from peft_recipes.models import bases
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.metrics import PREFERENCE
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.predictions import Evaluation
from peft_recipes.scoring import answers
from peft_recipes.scoring.text_metrics import scorer
from peft_recipes.tasks import reading
from peft_recipes.tasks.base import Task
from peft_recipes.tasks.causal_losses import tensors
from peft_recipes.tasks.grpo_trainer import PROMPT, REFERENCE, ROW, AnswerTrainer, reward_function
from peft_recipes.tasks.kto import check_reachable
from peft_recipes.tasks.sft import SupervisedFineTuning

if TYPE_CHECKING:
    import datasets
    import torch.nn as nn
    from transformers import PretrainedConfig, TrainingArguments

REWARD = "reward"


class VerifiableRewards(SupervisedFineTuning):
    """Prompts, and references where the reward needs them."""

    collates_in_workers = False  # trl's batches are prompts; what they hold is generated in the step

    def arguments(self, *args: Any, **kwargs: Any) -> TrainingArguments:
        # One answer in evaluation: trl would refuse batches that its several don't divide.
        defaults = {"max_completion_length": self.answer_tokens, "num_generations_eval": 1,
                    "metric_for_best_model": REWARD}  # fmt: skip
        return Task.arguments(self, *args, defaults=defaults, **kwargs)

    @property
    def answer_tokens(self) -> int:
        """The most tokens of an answer: half of max_length, unless the recipe says more or less."""
        return self.recipe.training.get("max_completion_length") or self.recipe.max_length // 2

    def check_arguments(self, arm: Arm | None, hardware: Hardware) -> None:
        training, drawn = self.recipe.training, self.answers_drawn
        generations = training.get("num_generations", GRPOConfig.num_generations)
        if generations < 2 or drawn % generations:
            raise RecipeError(
                f"training.num_generations: {generations} answers to each prompt do not divide the {drawn} that are "
                "drawn at a time (per_device_train_batch_size times steps_per_generation). Set 2 or more that do."
            )
        check_reachable(arm)
        super().check_arguments(arm, hardware)
        init = getattr(arm.peft, "init_lora_weights", None) if arm is not None else None
        if training.get("beta") and isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "loftq")):
            raise RecipeError(
                f"training.beta: the reference is the model without its adapter, and {init} changes the base. Leave "
                "beta out, or choose another arm."
            )

    def prepare(self) -> Prepared:
        tokenizer, recipe = bases.load_tokenizer(self.recipe), self.recipe
        scorer(_rewarded(recipe))  # a reward that can't be imported is an error before anything is trained
        chat = tokenizer.chat_template is not None
        required = not (recipe.reward and recipe.metric in (REWARD, "score", PREFERENCE))

        def prompts(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
            splits = {
                name: prompt_rows(rows, self.source_of(name), chat, required, self.skipped_of(name, rows))
                for name, rows in raw.items()
            }
            return splits, prompt_notes(raw["train"].column_names, self.source)

        _, splits, found = reading.read(self, prompts)
        notes = reading.named_notes(self, found)
        splits, duplicates = self.without_duplicates(splits, [PROMPT])
        notes += [*self.notes, *duplicates]
        for name, rows in splits.items():
            splits[name], more = self._short_enough(rows, name, tokenizer)
            notes += more
        notes += self.skipped_notes()
        ids = {name: list(rows["id"]) for name, rows in splits.items()}
        prepared = Prepared({}, ids, formats.fingerprint(splits), tokenizer, None, notes)
        prepared.splits = {name: rows.select_columns([PROMPT, REFERENCE, ROW]) for name, rows in splits.items()}
        prepared.prompts = {name: self._prompts(rows, tokenizer) for name, rows in splits.items() if name != "train"}
        for name, rows in splits.items() if required else ():  # of all rows: those of train are rewarded by them
            references = [{"id": row["id"], "reference": row[REFERENCE]} for row in rows]
            answers.check_references(_scored(recipe), references, name)
        self._enough_prompts(len(splits["train"]))
        return prepared

    def _short_enough(self, rows: datasets.Dataset, split: str, tokenizer: Any) -> tuple[datasets.Dataset, list[str]]:
        """Leave out the prompts that leave no room for an answer within max_length."""
        room = self.recipe.max_length - self.answer_tokens
        rows, lengths = tokenised_rows(
            rows,
            [name for name in rows.column_names if name != "id"],
            lambda row: {"length": len(tokenised_answers(row, [], tokenizer)[0])},
            self.skipped_of(split, rows),
        )
        kept = [i for i, length in enumerate(lengths["length"]) if length <= room]
        if not kept:
            raise RecipeError(
                f"No {split} prompt has {room} tokens or less: max_length {self.recipe.max_length} without the "
                f"answer's {self.answer_tokens}. Set a larger one: --set max_length={2 * self.recipe.max_length}."
            )
        left_out = len(rows) - len(kept)
        notes = [f"{left_out} {split} prompts have more than {room} tokens and were left out."] if left_out else []
        return rows.select(kept), notes

    def _prompts(self, rows: datasets.Dataset, tokenizer: Any) -> list[dict[str, Any]]:
        """The examples of a split that are answered, as `Prepared.prompts` has them."""
        prompts = []
        for index in answers.sample(len(rows), self.recipe.test_generations):
            row = rows[index]
            prompts.append({
                "index": index,
                "id": row["id"],
                "prompt": formats.as_text(row[PROMPT]),
                "prompt_ids": tokenised_answers(row, [], tokenizer)[0],
                "reference": row[REFERENCE],
                "reference_tokens": self.answer_tokens,
                "row": json.loads(row[ROW]),
            })  # fmt: skip
        return prompts

    @property
    def answers_drawn(self) -> int:
        """How many answers are drawn at a time, over all processes."""
        training = self.recipe.training
        batches = training.get("steps_per_generation") or training.get("gradient_accumulation_steps", 1)
        return training.get("per_device_train_batch_size", 8) * batches

    def _enough_prompts(self, count: int) -> None:
        needed = self.answers_drawn // self.recipe.training.get("num_generations", GRPOConfig.num_generations)
        if count < needed:
            raise RecipeError(
                f"dataset '{self.recipe.data_name}': {count} training prompts, and a step answers {needed}: trl "
                "leaves an incomplete step out, so there is none. Set a smaller per_device_train_batch_size."
            )

    def example_order(self, config: PretrainedConfig) -> None:
        return None  # trl's sampler

    def lengths(self, prepared: Prepared, split: str) -> None:
        return None  # answers have no length before they are drawn

    def trainer(self, model: nn.Module, prepared: Prepared, arguments: GRPOConfig, callbacks: list[Any]):
        trainer = AnswerTrainer(
            model=model,
            reward_funcs=[reward_function(scorer(_rewarded(self.recipe)))],
            args=arguments,
            train_dataset=prepared.splits["train"],
            eval_dataset=prepared.splits["validation"],
            processing_class=prepared.processor,
            callbacks=callbacks,
        )
        trainer.validate = lambda: self.evaluate(trainer, prepared, "validation").metrics
        return trainer

    def evaluate(self, trainer: AnswerTrainer, prepared: Prepared, split: str) -> Evaluation:
        recipe, prompts = self.recipe, prepared.prompts[split]
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        options = {"max_new_tokens": self.answer_tokens, **recipe.generation}
        given = answers.answer(
            model, prepared.processor, prompts, dataclasses.replace(recipe, generation=options),
            trainer.accelerator.autocast, is_sharded(model), trainer.on_answers,
        )  # fmt: skip
        examples, rewarded = len(prepared.ids[split]), _rewarded(recipe)
        found = answers.scored(given, prompts, rewarded, examples)
        for part in found:
            if rewarded.metric in part:
                part[REWARD] = part.pop(rewarded.metric)
        if recipe.metric not in (REWARD, PREFERENCE):  # a judge compares the arms' answers afterwards
            for part, own in zip(found, answers.scored(given, prompts, recipe, examples), strict=True):
                part.update({recipe.metric: own[recipe.metric]} if recipe.metric in own else {})
        columns = {"id": prepared.ids[split], **found.predictions}
        return Evaluation(metrics=found.metrics, predictions=columns, errors=found.errors)

    def largest_batch(self, model: nn.Module, prepared: Prepared | None, size: int) -> dict[str, torch.Tensor]:
        """Prompts and answers of the longest length; their generation keeps no activations and takes less."""
        answer, pad = self.answer_tokens, (prepared.processor.pad_token_id if prepared else 0) or 0
        prompt = self.recipe.max_length - answer
        if prepared is not None:
            prompts = [row["prompt_ids"] for split in prepared.prompts.values() for row in split]
            prompt = max(map(len, prompts))
        example = {"input_ids": [1] * (prompt + answer), "labels": [IGNORED] * prompt + [1] * answer}
        return tensors({k: v for k, v in PaddedCollator(pad)([example] * size).items() if k != COUNTS})

    def model_inputs(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([example["prompt_ids"]])}

    def inputs(self, prepared: Prepared, count: int) -> list[dict[str, torch.Tensor]]:
        return [self.model_inputs(row) for row in prepared.prompts["test"][:count]]  # the splits are not tokenised


def _rewarded(recipe: Recipe) -> Recipe:
    """The recipe whose metric is the reward: the function's score, or its own metric."""
    if not recipe.reward:
        return recipe
    return dataclasses.replace(recipe, metric="score", score=recipe.reward, answer_pattern=None, judge=None)


def _scored(recipe: Recipe) -> Recipe:
    """The recipe whose metric needs the references."""
    return _rewarded(recipe) if recipe.metric == REWARD else recipe
