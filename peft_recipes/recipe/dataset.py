"""Dataset and Pretraining: where examples come from, and how a base without pretrained weights is trained first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft_recipes.errors import unknown
from peft_recipes.recipe.addresses import address_problem
from peft_recipes.recipe.type_checks import type_problems

EMBEDDED = "embedded:"
FORMATS = ("alpaca", "prompt-completion", "messages", "sharegpt", "text")
TRAIN_ON = LAST, ALL, WEIGHTED = "last", "all", "weighted"
# What a column can hold: the keys of `columns`, and the fields that name one column each.
COLUMNS = ("prompt", "completion", "messages", "context", "system", "history", "tools", "chosen", "rejected", "text",
           "label", "image")  # fmt: skip
TRANSFORMS = ("rotation", "noise")
# transformers' names of what a classifier learns: one class, several classes, or a number.
PROBLEM_TYPES = CLASSES, MULTI_LABEL, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)


@dataclass
class Dataset:
    """Where the examples come from, which columns they have, and how they are split.

    path: a Hub id, a file (csv, tsv, json, jsonl, parquet, txt), a folder, a pattern (data/*.jsonl), "embedded:NAME".
    name, revision: as on the Hub.
    text, label, image: column names; of prompts and answers prompt, completion; for preferences prompt (optional),
    chosen, rejected; for single answers that are desirable or not prompt, completion, label. text may name two columns,
    the two texts of a pair. For token classification text is the tokens or the text, label the tags or the spans (the
    defaults stand for the usual names as well: tokens, ner_tags, spans).
    problem_type: what the labels of texts are, in transformers' words: "single_label_classification" (a class),
    "multi_label_classification" (a list of classes) or "regression" (a number); None: as the data has them.
    messages: the column of a whole conversation. context, system, history, tools: columns of what is shown besides the
    prompt: a text that it is about, the system message, earlier turns ([[user, assistant], ...]), the tools that may be
    called. The defaults stand for the usual names as well: conversations, question and answer, ...
    columns: the same by a mapping: {"prompt": "question", "completion": "answer"}.
    format: of SFT examples: "alpaca", "prompt-completion", "messages", "sharegpt" or "text"; None detects it from the
    columns.
    train_on: the assistant's messages of a conversation that have a loss: those of its "last" turn, "all", or
    "weighted" (those without weight: 0 or train: false); None: "weighted" where messages have a weight, else "last".
    chat_template: for a tokenizer without one, or instead of its own: "chatml", a file, or the Jinja template itself.
    skip_rows: the share of a split's rows that may be left out because they can't be used (an empty answer, a
    conversation that ends with the user); one row always may.
    labels: the class names in order, if the data lacks them (and to plan without loading the data).
    train, validation, test: size of each split in examples (whole number) or as a share (below 1); None: the rest.
    train_split, validation_split, test_split: the source's splits; None: its own split of the usual name (test, eval,
    validation, valid, val, dev), if it has one, else cut from train_split. The name of train_split: cut from it.
    seed: for shuffling before the split. balance: downsample every class to the size of the smallest.
    pretrain: examples set aside first, for training the base itself (recipes with `pretraining`).
    transform: image augmentation: {"rotation": degrees, "noise": standard deviation}.
    image_size: the side in pixels that images are scaled to; None: as the model's image processor does it.
    weight: of one of several `datasets`: its share of the training examples, relative to the others' weights. None: all
    of its examples, or 1 where another one has a weight.
    streaming: read the training rows while they are trained on, never all of them; validation and test are the first
    rows. shuffle_buffer: of a stream, the rows that wait in memory, from which the next one is drawn.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    text: str | list[str] = "text"
    label: str = "label"
    image: str = "image"
    prompt: str = "prompt"
    completion: str = "completion"
    chosen: str = "chosen"
    rejected: str = "rejected"
    messages: str = "messages"
    context: str | None = None
    system: str = "system"
    history: str = "history"
    tools: str = "tools"
    columns: dict[str, Any] | None = None
    format: str | None = None
    train_on: str | None = None
    chat_template: str | None = None
    skip_rows: float = 0.01
    labels: list[str] | None = None
    problem_type: str | None = None
    train: int | float | None = None
    validation: int | float | None = 0.1
    test: int | float | None = 0.2
    train_split: str = "train"
    validation_split: str | None = None
    test_split: str | None = None
    seed: int = 42
    balance: bool = False
    pretrain: int = 0
    transform: dict[str, float] | None = None
    image_size: int | None = None
    weight: float | None = None
    streaming: bool = False
    shuffle_buffer: int = 1_000

    def __post_init__(self) -> None:
        """Move the columns that the mapping names to their own fields; `problems` reports the rest."""
        if isinstance(self.columns, dict):
            for key in set(self.columns) & set(COLUMNS):
                setattr(self, key, self.columns[key])
            self.columns = {key: name for key, name in self.columns.items() if key not in COLUMNS} or None

    @property
    def text_columns(self) -> list[str]:
        """The columns of texts: one, or the two of a pair."""
        return [self.text] if isinstance(self.text, str) else self.text

    def problems(self, where: str = "dataset") -> list[str]:
        """Return every problem of this dataset, one line each."""
        if problems := type_problems(self, f"{where}."):
            return problems  # the checks below rely on the types
        if not self.path.strip():
            problems.append(f"{where}.path: expected a Hub id, a file, a folder or embedded:NAME, got {self.path!r}.")
        if address := address_problem(self.path, f"{where}.path"):
            problems.append(address)
        for split in ("train", "validation", "test"):
            size = getattr(self, split)
            if size is not None and not (0 < size < 1 or (float(size).is_integer() and size >= 1)):
                problems.append(
                    f"{where}.{split}: expected a number of rows, a share between 0 and 1, or null; got {size!r}."
                )
        total = sum(s for s in (self.train, self.validation, self.test) if isinstance(s, float) and 0 < s < 1)
        if total > 1 + 1e-9:
            problems.append(f"{where}: the shares of train, validation and test add up to {total:g}, more than 1.")
        if self.format not in (None, *FORMATS):
            problems.append(unknown("format", self.format, FORMATS, where))
        if self.train_on not in (None, *TRAIN_ON):
            problems.append(unknown("choice", self.train_on, TRAIN_ON, f"{where}.train_on"))
        if not 0 <= self.skip_rows < 1:
            problems.append(f"{where}.skip_rows: expected a share from 0 to below 1, got {self.skip_rows!r}.")
        problems += [unknown("key", str(key), COLUMNS, f"{where}.columns") for key in self.columns or {}]
        if not isinstance(self.text, str) and (len(self.text) != 2 or len(set(self.text)) != 2):
            problems.append(f"{where}.text: expected a column, or the two columns of a pair; got {self.text!r}.")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            problems.append(unknown("problem type", self.problem_type, PROBLEM_TYPES, where))
        if self.problem_type == REGRESSION and self.labels:
            problems.append(f"{where}.labels: the labels of a regression are numbers, which have no class names.")
        if self.balance and self.problem_type in (MULTI_LABEL, REGRESSION):
            problems.append(f"{where}.balance: needs one class per example, which {self.problem_type} has not.")
        strange = [key for key in self.transform or {} if key not in TRANSFORMS]
        problems += [unknown("key", key, TRANSFORMS, f"{where}.transform") for key in strange]
        for key in ("pretrain", "seed"):
            if getattr(self, key) < 0:
                problems.append(f"{where}.{key}: expected a whole number of 0 or more, got {getattr(self, key)!r}.")
        if self.image_size is not None and self.image_size < 1:
            problems.append(f"{where}.image_size: expected a number of pixels above 0, got {self.image_size!r}.")
        if self.weight is not None and self.weight <= 0:
            problems.append(f"{where}.weight: expected a number above 0, got {self.weight:g}.")
        if self.shuffle_buffer < 1:
            problems.append(f"{where}.shuffle_buffer: expected a number of rows above 0, got {self.shuffle_buffer}.")
        if self.labels is not None and len(set(self.labels)) < max(len(self.labels), 2):
            problems.append(f"{where}.labels: expected two or more names, no name twice; got {self.labels!r}.")
        return problems


@dataclass
class Pretraining:
    """How a base without pretrained weights (the small CNN) is trained first, on the `pretrain` examples."""

    num_train_epochs: int = 5
    batch_size: int = 128
    learning_rate: float = 1e-3
    seed: int = 0

    def problems(self, where: str = "pretraining") -> list[str]:
        """Return every problem, one line each."""
        return type_problems(self, f"{where}.") or [
            f"{where}.{key}: expected a number above 0, got {getattr(self, key)!r}."
            for key in ("num_train_epochs", "batch_size", "learning_rate")
            if getattr(self, key) <= 0
        ]
