"""Scored answers: a model answers the prompts of a split, and each answer is compared with its reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from peft_recipes.distributed import processes
from peft_recipes.errors import RecipeError
from peft_recipes.scoring.generation import BATCH_SIZE, end_token_ids, generate, room
from peft_recipes.scoring.text_metrics import reference_problem, scorer

if TYPE_CHECKING:
    import torch.nn as nn

    from peft_recipes.recipe.recipe import Recipe

_SHOWN = 3  # examples in an error


class Scored(NamedTuple):
    """The metrics of a split's answers, their columns of predictions.parquet, and why a metric is missing."""

    metrics: dict[str, float]
    predictions: dict[str, list[Any]]
    errors: dict[str, str]


def sample(count: int, most: int) -> list[int]:
    """Return the indices of the examples of a split that are answered: a random sample, the same for every arm."""
    if count <= most:
        return list(range(count))
    return sorted(int(i) for i in np.random.default_rng(0).choice(count, most, replace=False))


def check_references(recipe: Recipe, prompts: Sequence[dict[str, Any]], split: str) -> None:
    """Raise RecipeError where references can't be compared with, e.g. without a number for the metric `number`."""
    wrong = [(p["id"], why) for p in prompts if (why := reference_problem(recipe, p["reference"]))]
    if wrong:
        listed = "; ".join(f"that of row {row} {why}" for row, why in wrong[:_SHOWN])
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise RecipeError(
            f"metric '{recipe.metric}': {len(wrong)} of {len(prompts)} {split} references can't be compared with: "
            f"{listed}{more}. Choose another metric, or leave these rows out."
        )


def max_new_tokens(recipe: Recipe, prompts: Sequence[dict[str, Any]]) -> int:
    """The most new tokens of an answer: the recipe's own, or as many as the longest reference has, its end included."""
    return recipe.generation.get("max_new_tokens") or max((p["reference_tokens"] for p in prompts), default=1)


def answer(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[dict[str, Any]],
    recipe: Recipe,
    precision: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    together: bool = False,
    on_answers: Callable[[int, int], None] = lambda done, of: None,
) -> list[dict[str, Any]]:
    """Answer prompts; return for each its text, its number of tokens and whether the model ended it itself.

    prompts: as `Prepared.prompts` has them. precision: the context of the forward passes. Every rank calls it: each
    answers a part, and all get all answers. together: all ranks answer all prompts, as a model needs it whose weights
    are sharded. on_answers: called with the number of this rank's answers so far, and of all of them.
    """
    rank, count = (0, 1) if together else (processes.rank(), processes.count())
    own = prompts[rank::count]
    options = {key: value for key, value in recipe.generation.items() if key != "max_new_tokens"}
    batch_size = max(BATCH_SIZE, recipe.training.get("per_device_eval_batch_size", 0))
    longest, ends = max_new_tokens(recipe, prompts), end_token_ids(model, tokenizer)
    fitting = [p["prompt_ids"] for p in own if (left := room(model, len(p["prompt_ids"]))) is None or left > 0]
    with precision():
        generated = iter(
            generate(
                model, fitting, tokenizer.pad_token_id, longest, options, batch_size, ends,
                lambda done: on_answers(done, len(fitting)),
            )
        )  # fmt: skip
    answers = []
    for prompt in own:
        left = room(model, len(prompt["prompt_ids"]))
        new = next(generated) if left is None or left > 0 else []
        ended = bool(new) and new[-1] in ends
        text = tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True).strip()
        answers.append({"answer": text, "answer_tokens": len(new), "ended": ended})
    parts = processes.all_gather(answers) if count > 1 else [answers]
    return [parts[i % count][i // count] for i in range(len(prompts))]


def scored(
    answers: Sequence[dict[str, Any]], prompts: Sequence[dict[str, Any]], recipe: Recipe, examples: int
) -> Scored:
    """Score answers; return the split's metrics and its columns of predictions.parquet.

    examples: the size of the split; examples without an answer have None in the columns. Without a scorer, for a judge,
    there are the answers without a value of the metric; so there are where the user's own score raises.
    """
    texts, references = [a["answer"] for a in answers], [p["reference"] for p in prompts]
    metrics = {
        "ended": float(np.mean([a["ended"] for a in answers])),
        "answer_tokens": float(np.mean([a["answer_tokens"] for a in answers])),
        "empty_answers": float(np.mean([not text for text in texts])),
    }
    columns: dict[str, list[Any]] = {
        name: [None] * examples for name in ("prompt", "answer", "reference", "answer_tokens", "ended")
    }
    for prompt, given in zip(prompts, answers, strict=True):
        row = {**given, "prompt": prompt["prompt"], "reference": prompt["reference"]}
        for name, cells in columns.items():
            cells[prompt["index"]] = row[name]
    if (score := scorer(recipe)) is None:
        return Scored(metrics, columns, {})
    try:
        values = score(texts, references, [p["row"] for p in prompts])
    except RecipeError as error:
        return Scored(metrics, columns, {recipe.metric: str(error)})
    columns[recipe.metric] = [None] * examples
    for prompt, value in zip(prompts, values.tolist(), strict=True):
        columns[recipe.metric][prompt["index"]] = value
    return Scored({recipe.metric: float(values.mean()), **metrics}, columns, {})
