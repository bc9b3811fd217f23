"""The task and the columns of a draft, from what the base is and what the columns hold; flags overrule both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from peft_recipes.data.shapes import CONVERSATIONS, PAIRS, detect
from peft_recipes.drafting import columns as kinds
from peft_recipes.drafting.base import CAUSAL, ENCODER, ENCODER_DECODER, IMAGES, BaseFacts
from peft_recipes.drafting.columns import Column
from peft_recipes.drafting.finding import (
    KTO_TAG,
    LABELS,
    MESSAGE_TREE,
    TEXTS,
    TOKENS,
    Asked,
    Data,
    find_answers,
    find_conversation,
    find_label,
    find_tags,
    find_texts,
    is_verdict,
)
from peft_recipes.errors import RecipeError, nearest, unknown
from peft_recipes.recipe.dataset import MULTI_LABEL, REGRESSION, Dataset
from peft_recipes.recipe.options import TASKS

# Pairs that a task finds by itself; any other is named in the recipe.
_FOUND = {"sft": PAIRS, "seq2seq": (("prompt", "completion"), ("input", "target"), ("instruction", "output")),
          "kto": (("prompt", "completion"),), "grpo": (("prompt", "completion"),)}  # fmt: skip
# What tasks need a base to be.
_BASES = {
    "sft": (CAUSAL,), "language-modeling": (CAUSAL,), "dpo": (CAUSAL,), "kto": (CAUSAL,), "grpo": (CAUSAL,),
    "seq2seq": (ENCODER_DECODER,), "image-classification": (IMAGES,), "token-classification": (ENCODER, CAUSAL),
    "text-classification": (ENCODER, CAUSAL, ENCODER_DECODER), "reward": (ENCODER, CAUSAL),
}  # fmt: skip


@dataclass
class Choice:
    """The task, fields of `Dataset`, further fields of the recipe, and why, by the name of what was chosen."""

    task: str
    dataset: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)


def choose(base: BaseFacts, data: Data, asked: Asked) -> Choice:
    """Choose task and columns. Raises RecipeError, with the flag to give, for what can't be decided."""
    _check(data, asked)
    task, why = (asked.task, "as asked") if asked.task else _task(base, data, asked)
    if base.kind not in _BASES[task]:
        raise RecipeError(
            f"{task} needs a base that is {_any(_BASES[task])}, and '{base.model}' is {_a(base.kind)}. "
            f"{_instead(base, task)}"
        )
    choice = _COLUMNS[task](data, asked)
    choice.why["task"] = why
    if asked.format:
        choice.dataset["format"], choice.why["format"] = asked.format, "as asked"
    return choice


def _check(data: Data, asked: Asked) -> None:
    """Raise RecipeError for a flag that names no task or no column."""
    if asked.task and asked.task not in TASKS:
        raise RecipeError(unknown("task", asked.task, TASKS, "--task"))
    flags = {"--text": asked.text, "--label": [asked.label], "--prompt": [asked.prompt],
             "--completion": [asked.completion]}  # fmt: skip
    problems = [
        f"{flag} {name}: dataset '{data.path}' has no such column.{nearest(name, data.columns)} It has: "
        f"{', '.join(data.columns)}."
        for flag, names in flags.items()
        for name in names
        if name and name not in data.columns
    ]
    if len(asked.text) > 2:
        problems.append(f"--text {','.join(asked.text)}: expected a column, or the two columns of a pair.")
    if problems:
        raise RecipeError(*problems)


def _task(base: BaseFacts, data: Data, asked: Asked) -> tuple[str, str]:
    """The task and why."""
    if images := data.of(kinds.IMAGE):
        return "image-classification", f"the column '{images[0].name}' holds images"
    if base.kind == IMAGES:
        raise RecipeError(
            f"'{base.model}' is an image model, and dataset '{data.path}' has no images: {data.listed()}. Name a "
            "folder of images with one subfolder a class, or another --model."
        )
    if {"chosen", "rejected"} <= set(data.columns):
        return "dpo", "each row has an answer that is chosen and one that is rejected"
    answers, label = find_answers(data, asked), find_label(data, asked, required=False)
    if (answers and label and is_verdict(label, answers)) or KTO_TAG in data.columns:
        verdict = KTO_TAG if KTO_TAG in data.columns else label.name
        return "kto", f"each answer has a label that is true or false ('{verdict}')"
    if find_tags(data) is not None:
        return "token-classification", f"each token has a tag ('{find_tags(data).name}')"
    conversation = find_conversation(data)
    if (answers or (conversation and not asked.label)) and base.kind != ENCODER:
        named = asked.label or (label and not conversation and label.name.lower() in LABELS[:3])
        if named and label and label.name not in (answers or ()) and not (asked.prompt or asked.completion):
            raise RecipeError(
                f"dataset '{data.path}' has prompts and answers ({', '.join(answers)}) and labels ({label.name}). "
                "Which is to be learnt? --task sft for the answers, --task text-classification for the labels."
            )
        what = f"prompts and answers ('{answers[0]}', '{answers[1]}')" if answers else f"'{conversation.name}'"
        if base.kind == ENCODER_DECODER:
            return "seq2seq", f"the base is an encoder-decoder, and the rows are {what}"
        return "sft", f"the base is a causal language model, and the rows are {what}"
    if set(data.columns) >= MESSAGE_TREE:
        detect(data.rows, Dataset(data.path))  # raises, with how to flatten it
    if label is not None:
        return "text-classification", f"each text has a label ('{label.name}')"
    if base.kind == CAUSAL and (asked.text or data.first(TEXTS, kinds.TEXT) or len(data.of(kinds.TEXT)) == 1):
        return "language-modeling", "the rows are plain text, and the base is a causal language model"
    ways = ["--task text-classification --text COLUMN --label COLUMN"]
    if base.kind != ENCODER:
        other = "seq2seq" if base.kind == ENCODER_DECODER else "sft"
        ways.append(f"--task {other} --prompt COLUMN --completion COLUMN")
    raise RecipeError(
        f"What is to be learnt from dataset '{data.path}'? Its columns: {data.listed()}. Name the task and its "
        f"columns: {', or '.join(ways)}."
    )


def _classification(data: Data, asked: Asked) -> Choice:
    label = find_label(data, asked)
    texts = find_texts(data, asked, label.name)
    choice = Choice("text-classification", used={label.name, *texts})
    choice.dataset |= {"text": texts if len(texts) > 1 else texts[0], "label": label.name}
    choice.why["text"] = "a pair of texts" if len(texts) > 1 else f"{data.columns[texts[0]].words:.0f} words on average"
    if label.kind == kinds.LIST:
        choice.dataset["problem_type"] = MULTI_LABEL
        choice.why["problem_type"] = f"'{label.name}' holds lists: a text may have several labels"
    elif label.kind == kinds.NUMBER or (label.kind == kinds.WHOLE and not label.is_label and label.distinct > 50):
        choice.dataset["problem_type"] = REGRESSION
        choice.why["problem_type"] = f"'{label.name}' holds numbers, which are learnt as they are"
    else:
        _add_classes(choice, label)
    return choice


def _add_classes(choice: Choice, label: Column) -> None:
    """Say how many classes there are; where one is most of the rows, accuracy says little."""
    counts = sorted((label.values.count(value) for value in set(label.values)), reverse=True)
    choice.why["label"] = f"{len(counts)} classes"
    if counts and counts[0] > 0.8 * len(label.values):
        share = round(100 * counts[0] / len(label.values))
        choice.recipe["metric"] = "macro_f1"
        choice.why["metric"] = f"{share} % of the rows are of one class, so that accuracy would say little"


def _token_classification(data: Data, asked: Asked) -> Choice:
    tags = data.columns[asked.label] if asked.label else find_tags(data)
    if tags is None:
        raise RecipeError(
            f"Which columns of dataset '{data.path}' are tokens and tags? It has: {data.listed()}. Name them: "
            "--text COLUMN --label COLUMN."
        )
    wanted = kinds.TEXT if tags.kind == kinds.SPANS else kinds.LIST
    tokens = data.columns[asked.text[0]] if asked.text else data.first(TOKENS, wanted)
    if tokens is None:
        raise RecipeError(f"Which column of dataset '{data.path}' has the tokens? Name it: --text COLUMN.")
    choice = Choice("token-classification", {"text": tokens.name, "label": tags.name}, used={tokens.name, tags.name})
    choice.why["label"] = "spans of characters" if tags.kind == kinds.SPANS else "a tag for each token"
    return choice


def _sft(data: Data, asked: Asked) -> Choice:
    """The columns that the formats of supervised fine-tuning know by name are not set."""
    if not (asked.prompt or asked.completion):
        answers = find_answers(data, asked)
        if asked.format or find_conversation(data) or answers is None or answers in PAIRS:
            fields, conversation = {}, find_conversation(data)
            if conversation is not None and conversation.name not in CONVERSATIONS and answers is None:
                fields = {"messages": conversation.name}
            shape = detect(data.rows, Dataset(data.path, format=asked.format, **fields))
            return Choice("sft", fields, why={"columns": str(shape)}, used=shape.used())
    return _prompts("sft")(data, asked)


def _prompts(task: str) -> Callable[[Data, Asked], Choice]:
    """Prompts and answers: columns that the task finds by their names are not set."""

    def choose_columns(data: Data, asked: Asked) -> Choice:
        answers, conversation = find_answers(data, asked), find_conversation(data)
        if task == "kto" and KTO_TAG in data.columns and conversation is not None:
            return Choice(task, why={"columns": f"the conversations in '{conversation.name}'"},
                          used={conversation.name, KTO_TAG})  # fmt: skip
        if answers is None:
            raise RecipeError(
                f"Which columns of dataset '{data.path}' are prompt and answer? It has: {data.listed()}. Name them: "
                "--prompt COLUMN --completion COLUMN."
            )
        choice = Choice(task, used={*answers, *({"input"} if answers == ("instruction", "output") else ())})
        if asked.prompt or asked.completion or answers not in _FOUND[task]:
            choice.dataset |= {"prompt": answers[0], "completion": answers[1]}
        choice.why["columns"] = f"'{answers[0]}' is the prompt, '{answers[1]}' the answer"
        if task == "grpo":
            choice.recipe["metric"], choice.why["metric"] = (
                "exact_match",
                "the reward: whether an answer is the reference",
            )
        if task == "kto":
            label = find_label(data, asked)
            choice.used.add(label.name)
            choice.dataset |= {"label": label.name} if label.name != "label" else {}
        return choice

    return choose_columns


def _pairs(task: str) -> Callable[[Data, Asked], Choice]:
    def choose_columns(data: Data, asked: Asked) -> Choice:
        if missing := [name for name in ("chosen", "rejected") if name not in data.columns]:
            raise RecipeError(
                f"{task} needs a chosen and a rejected answer, and dataset '{data.path}' has no column "
                f"'{missing[0]}': {data.listed()}. Name yours: --set dataset.{missing[0]}=COLUMN."
            )
        prompt = asked.prompt or ("prompt" if "prompt" in data.columns else None)
        choice = Choice(task, used={"chosen", "rejected", *([prompt] if prompt else [])})
        choice.dataset |= {"prompt": asked.prompt} if asked.prompt else {}
        choice.why["columns"] = "an answer that is chosen and one that is rejected"
        return choice

    return choose_columns


def _plain_text(data: Data, asked: Asked) -> Choice:
    (text,) = find_texts(data, asked, None)[:1]
    return Choice("language-modeling", {"text": text}, why={"text": "every token is learnt"}, used={text})


def _images(data: Data, asked: Asked) -> Choice:
    images = data.of(kinds.IMAGE)
    if not images:
        raise RecipeError(f"dataset '{data.path}' has no images: {data.listed()}.")
    label = find_label(data, asked)
    choice = Choice("image-classification", used={images[0].name, label.name})
    choice.dataset |= {"image": images[0].name, "label": label.name}
    _add_classes(choice, label)
    return choice


_COLUMNS: dict[str, Callable[[Data, Asked], Choice]] = {
    "text-classification": _classification,
    "token-classification": _token_classification,
    "image-classification": _images,
    "language-modeling": _plain_text,
    "dpo": _pairs("dpo"),
    "reward": _pairs("reward"),
    "sft": _sft,
    **{task: _prompts(task) for task in ("seq2seq", "kto", "grpo")},
}


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeio' else 'a'} {kind}"


def _any(possible: Iterable[str]) -> str:
    return " or ".join(map(_a, possible))


def _instead(base: BaseFacts, task: str) -> str:
    """What to do where the data's task does not fit the base."""
    if task == "dpo" and base.kind == ENCODER:
        return "Name another --model, or score the answers: --task reward."
    if task == "image-classification":
        return "Name an image model: --model google/vit-base-patch16-224."
    return "Name another --model, or another --task."
