"""Which task and columns are chosen for the shapes that data sets have, by the kind of base."""

from __future__ import annotations

from types import SimpleNamespace

import datasets
import pytest

from peft_recipes import RecipeError
from peft_recipes.drafting.base import CAUSAL, ENCODER, ENCODER_DECODER, kind_of
from peft_recipes.drafting.choices import Choice, choose
from peft_recipes.drafting.columns import columns_of
from peft_recipes.drafting.finding import Asked, Data

TEXTS = [f"some text number {i} here" for i in range(40)]
CHAT = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in TEXTS]
SHAREGPT = [[{"from": "human", "value": text}, {"from": "gpt", "value": text}] for text in TEXTS]


def chosen(kind: str, asked: Asked | None = None, **columns: list) -> Choice:
    rows = datasets.Dataset.from_dict(columns)
    return choose(SimpleNamespace(model="a base", kind=kind), Data("data", columns_of(rows), rows), asked or Asked())


def numbers(upto: int) -> list[int]:
    return [i % upto for i in range(len(TEXTS))]


# The shape, the kind of base, and the task with the fields of Dataset that are set.
SHAPES = {
    "ShareGPT": (CAUSAL, {"conversations": SHAREGPT, "system": TEXTS}, "sft", {}),
    "another name of messages": (CAUSAL, {"chat": CHAT}, "sft", {"messages": "chat"}),
    "Dolly": (CAUSAL, {"instruction": TEXTS, "context": TEXTS, "response": TEXTS, "category": numbers(2)}, "sft", {}),
    "GSM8K": (CAUSAL, {"question": TEXTS, "answer": TEXTS}, "sft", {}),
    "answers that are numbers": (CAUSAL, {"question": TEXTS, "answer": numbers(40)}, "sft", {}),
    "names that no format has": (CAUSAL, {"source": TEXTS, "target": TEXTS}, "sft",
                                 {"prompt": "source", "completion": "target"}),
    "CNN/DailyMail": (ENCODER_DECODER, {"article": TEXTS, "highlights": TEXTS}, "seq2seq",
                      {"prompt": "article", "completion": "highlights"}),
    "BoolQ": (ENCODER, {"question": TEXTS, "passage": TEXTS, "answer": [bool(i) for i in numbers(2)]},
              "text-classification", {"text": ["question", "passage"], "label": "answer"}),
    "QNLI": (ENCODER, {"question": TEXTS, "sentence": TEXTS, "label": numbers(2), "idx": numbers(40)},
             "text-classification", {"text": ["question", "sentence"], "label": "label"}),
    "IMDB on a causal model": (CAUSAL, {"text": TEXTS, "label": numbers(2)}, "text-classification",
                               {"text": "text", "label": "label"}),
    "stars": (ENCODER, {"number": numbers(40), "review": TEXTS, "stars": numbers(5)}, "text-classification",
              {"text": "review", "label": "stars"}),
    "a label of no usual name": (ENCODER, {"body": TEXTS, "urgent": numbers(2)}, "text-classification",
                                 {"text": "body", "label": "urgent"}),
    "STS-B": (ENCODER, {"sentence1": TEXTS, "sentence2": TEXTS, "label": [i / 9 for i in range(40)]},
              "text-classification",
              {"text": ["sentence1", "sentence2"], "label": "label", "problem_type": "regression"}),
    "decimals of a csv": (ENCODER, {"text": TEXTS, "score": [f"{i / 7:.3f}" for i in range(40)]},
                          "text-classification", {"text": "text", "label": "score", "problem_type": "regression"}),
    "lists of labels": (ENCODER, {"text": TEXTS, "labels": [["a", "b"][: 1 + i % 2] for i in range(40)]},
                        "text-classification",
                        {"text": "text", "label": "labels", "problem_type": "multi_label_classification"}),
    "CoNLL": (ENCODER, {"tokens": [t.split() for t in TEXTS], "pos_tags": [[1] * 5] * 40, "ner_tags": [[0] * 5] * 40},
              "token-classification", {"text": "tokens", "label": "ner_tags"}),
    "spans": (ENCODER, {"text": TEXTS, "entities": [[{"start": 0, "end": 4, "label": "A"}]] * 40},
              "token-classification", {"text": "text", "label": "entities"}),
    "preferences": (CAUSAL, {"prompt": TEXTS, "chosen": TEXTS, "rejected": TEXTS}, "dpo", {}),
    "KTO": (CAUSAL, {"prompt": TEXTS, "completion": TEXTS, "label": [bool(i) for i in numbers(2)]}, "kto", {}),
    "KTO with 0 and 1": (CAUSAL, {"prompt": TEXTS, "completion": TEXTS, "label": numbers(2)}, "kto", {}),
    "LLaMA-Factory's KTO": (CAUSAL, {"messages": CHAT, "kto_tag": [bool(i) for i in numbers(2)]}, "kto", {}),
    "plain text of another name": (CAUSAL, {"story": TEXTS}, "language-modeling", {"text": "story"}),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_a_known_shape_finds_its_task_and_columns(shape):
    kind, columns, task, fields = SHAPES[shape]
    choice = chosen(kind, **columns)
    assert (choice.task, choice.dataset) == (task, fields)
    assert choice.used <= set(columns) and choice.why["task"]


# The columns, the kind of base, and what the message must say.
REFUSED = {
    "a tree of messages": (CAUSAL, {k: TEXTS for k in ("message_id", "parent_id", "text", "role")}, "Flatten it"),
    "plain text for an encoder": (ENCODER, {"text": TEXTS}, "--task text-classification --text COLUMN --label COLUMN."),
    "two labels": (ENCODER, {"body": TEXTS, "urgent": numbers(2), "open": numbers(3)}, "--text COLUMN --label COLUMN"),
    "two texts": (ENCODER, {"one": TEXTS, "two": TEXTS, "label": numbers(2)}, "--text one,two"),
    "answers and labels": (CAUSAL, {"question": TEXTS, "answer": TEXTS, "label": numbers(3)}, "--task sft for the"),
    "preferences for an encoder": (ENCODER, {"chosen": TEXTS, "rejected": TEXTS}, "--task reward"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_decided_is_refused_with_the_flag(case):
    kind, columns, message = REFUSED[case]
    with pytest.raises(RecipeError) as error:
        chosen(kind, **columns)
    assert message in str(error.value) and len(error.value.problems) == 1


def test_flags_decide_what_is_refused_otherwise():
    both = {"question": TEXTS, "answer": TEXTS, "label": numbers(3)}
    assert chosen(CAUSAL, Asked(task="sft"), **both).task == "sft"
    labels = chosen(CAUSAL, Asked(task="text-classification", text=["question"]), **both)
    assert labels.dataset == {"text": "question", "label": "label"}
    assert chosen(ENCODER, Asked(text=["two"]), one=TEXTS, two=TEXTS, label=numbers(2)).dataset["text"] == "two"
    assert chosen(CAUSAL, Asked(task="sft"), text=TEXTS).used == {"text"}


def test_the_kind_of_a_base_is_that_of_its_configuration():
    import transformers

    kinds = {
        "BertConfig": ENCODER, "RobertaConfig": ENCODER, "DistilBertConfig": ENCODER, "ModernBertConfig": ENCODER,
        "GPT2Config": CAUSAL, "LlamaConfig": CAUSAL, "Qwen2Config": CAUSAL, "GPTNeoXConfig": CAUSAL,
        "T5Config": ENCODER_DECODER, "BartConfig": ENCODER_DECODER, "MarianConfig": ENCODER_DECODER,
        "ViTConfig": "image model", "ResNetConfig": "image model",
    }  # fmt: skip
    assert {name: kind_of(getattr(transformers, name)()) for name in kinds} == kinds
