"""Find the columns of a dataset by what they are for: texts, labels, prompts and answers, tokens and tags."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from peft_recipes.data.shapes import CONVERSATIONS, PAIRS
from peft_recipes.drafting import columns as kinds
from peft_recipes.drafting.columns import Column
from peft_recipes.errors import RecipeError

# Usual names, tried in this order.
LABELS = ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "emotion", "stars",
           "rating", "score", "similarity", "y")  # fmt: skip
TEXTS = ("text", "sentence", "content", "body", "review", "message", "sms", "tweet", "comment", "document", "question",
          "utterance", "query", "description", "abstract", "title")  # fmt: skip
_TEXT_PAIRS = (("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("premise", "hypothesis"),
               ("question1", "question2"), ("text1", "text2"), ("text_1", "text_2"), ("text_a", "text_b"),
               ("question", "sentence"), ("query", "passage"), ("query", "document"), ("question", "passage"),
               ("question", "context"), ("anchor", "positive"), ("first", "second"))  # fmt: skip
_ANSWERS = (*PAIRS, ("source", "target"), ("article", "highlights"), ("text", "summary"))
TOKENS = ("tokens", "words", "text", "sentence", "content")
KTO_TAG = "kto_tag"  # LLaMA-Factory's
MESSAGE_TREE = {"message_id", "parent_id", "text", "role"}  # OpenAssistant's
_TAGS = ("ner_tags", "tags", "spans", "entities", "label", "labels")


@dataclass(frozen=True)
class Asked:
    """What the flags say; None or empty where they say nothing."""

    task: str | None = None
    format: str | None = None
    text: list[str] = field(default_factory=list)
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None


@dataclass(frozen=True)
class Data:
    """The dataset that is looked at: its name, its columns, and its training rows."""

    path: str
    columns: dict[str, Column]
    rows: Any

    def of(self, *wanted: str) -> list[Column]:
        return [column for column in self.columns.values() if column.kind in wanted]

    def first(self, names: Iterable[str], *wanted: str) -> Column | None:
        """The first column of these names (in any case) that holds one of the kinds, or any kind."""
        by_name = {name.lower(): column for name, column in self.columns.items()}
        found = (by_name[name] for name in names if name in by_name)
        return next((column for column in found if not wanted or column.kind in wanted), None)

    def listed(self) -> str:
        return ", ".join(f"{column.name} ({column.kind})" for column in self.columns.values()) or "none"


def find_answers(data: Data, asked: Asked) -> tuple[str, str] | None:
    """The columns of prompt and answer, or None."""
    if asked.prompt and asked.completion:
        return asked.prompt, asked.completion
    texts = {column.name for column in data.columns.values() if column.kind in (kinds.TEXT, kinds.MESSAGES)}
    texts |= {c.name for c in data.of(kinds.WHOLE, kinds.NUMBER) if c.name in ("answer", "completion", "response")}
    for prompt, completion in _ANSWERS:
        pair = (asked.prompt or prompt, asked.completion or completion)
        if set(pair) <= texts:
            return pair
    return None


def find_conversation(data: Data) -> Column | None:
    return data.first(CONVERSATIONS) or next(iter(data.of(kinds.MESSAGES)), None)


def is_verdict(label: Column, answers: tuple[str, str]) -> bool:
    """Whether a label says that an answer is desirable or not: 0 and 1 do so only next to TRL's names."""
    zero_one = label.kind == kinds.WHOLE and {str(value) for value in label.values} == {"0", "1"}
    return label.kind == kinds.BOOL or (zero_one and answers == ("prompt", "completion"))


def find_tags(data: Data) -> Column | None:
    """The column of tags or spans next to one of tokens or text."""
    tags = data.first(_TAGS, kinds.LIST, kinds.SPANS)
    if tags is None or (tags.kind == kinds.SPANS and data.first(TOKENS, kinds.TEXT) is None):
        return None
    if tags.kind == kinds.SPANS:
        return tags
    tokens = data.first(TOKENS, kinds.LIST)
    if tokens is None or tokens is tags:
        return None
    equal = all(len(a) == len(b) for a, b in zip(tokens.values, tags.values, strict=False))
    return tags if equal else None


def find_label(data: Data, asked: Asked, required: bool = True) -> Column | None:
    """The column of labels: as asked, of a usual name, or the only one whose values could be classes."""
    if asked.label:
        return data.columns[asked.label]
    usable = (kinds.CLASS, kinds.BOOL, kinds.WHOLE, kinds.NUMBER, kinds.LIST, kinds.TEXT)
    named = data.first(LABELS, *usable)
    if named is not None and not (named.kind == kinds.TEXT and not named.is_label):
        return named
    possible = [column for column in data.columns.values() if column.is_label and column.name not in asked.text]
    if len(possible) == 1 and len(data.columns) > 1:
        return possible[0]
    if required:
        found = f" Several could be: {', '.join(c.name for c in possible)}." if possible else ""
        raise RecipeError(
            f"Which column of dataset '{data.path}' is the label?{found} It has: {data.listed()}. Name it: "
            "--label COLUMN."
        )
    return None


def find_texts(data: Data, asked: Asked, label: str | None) -> list[str]:
    """The column of texts, or the two of a pair."""
    if asked.text:
        return asked.text
    free = {column.name: column for column in data.of(kinds.TEXT) if column.name != label}
    for pair in _TEXT_PAIRS if label else ():
        if set(pair) <= set(free):
            return list(pair)
    if len(free) == 1:
        return list(free)
    if found := next((name for wanted in TEXTS for name in free if name.lower() == wanted), None):
        return [found]
    pair = f", or two for a pair: --text {','.join(list(free)[:2])}" if label and len(free) > 1 else ""
    raise RecipeError(
        f"Which column of dataset '{data.path}' is the text? It has: {data.listed()}. Name it: --text COLUMN{pair}."
    )
