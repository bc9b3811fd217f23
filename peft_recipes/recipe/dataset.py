"""Dataset and Pretraining: where a recipe's examples come from, and how a base without weights is trained first."""

from __future__ import annotations

from dataclasses import dataclass

from peft_recipes.errors import unknown
from peft_recipes.recipe.type_checks import type_problems


@dataclass
class Dataset:
    """Where the examples come from, which columns they have, and how they are cut into splits.

    path: a Hub id, a file (csv, jsonl, parquet), a folder, or "embedded:NAME"; name, revision: the Hub's.
    text, label, image: column names; of preferences prompt (may be missing), chosen, rejected.
    format: of SFT rows: "alpaca", "prompt-completion", "messages" or "text"; None finds it by the columns.
    labels: the class names in order, where the data does not carry them (and so that a plan needs no data).
    train, validation, test: rows (whole number) or share (below 1) of each split, None: all that is left.
    train_split, validation_split, test_split: the source's splits; a split that is None is cut from train_split.
    seed: of the shuffle before cutting. balance: as many rows of each class as the smallest has.
    pretrain: rows put aside first, for training the base itself (recipes with `pretraining`).
    transform: what is done to images: {"rotation": degrees, "noise": standard deviation}.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    text: str = "text"
    label: str = "label"
    image: str = "image"
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    format: str | None = None
    labels: list[str] | None = None
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

    def problems(self, where: str = "dataset") -> list[str]:
        """What is wrong with it, one line each."""
        if found := type_problems(self, f"{where}."):
            return found  # the rest takes the types for granted
        if not self.path.strip():
            found.append(f"{where}.path: expected a Hub id, a file, a folder or embedded:NAME, got {self.path!r}.")
        for split in ("train", "validation", "test"):
            size = getattr(self, split)
            if size is not None and not (0 < size < 1 or (float(size).is_integer() and size >= 1)):
                found.append(
                    f"{where}.{split}: expected a number of rows, a share between 0 and 1, or null; got {size!r}."
                )
        shares = [s for s in (self.train, self.validation, self.test) if isinstance(s, float) and 0 < s < 1]
        if sum(shares) > 1 + 1e-9:
            found.append(f"{where}: the shares of train, validation and test add up to {sum(shares):g}, more than 1.")
        if self.format not in (None, "alpaca", "prompt-completion", "messages", "text"):
            found.append(unknown("format", self.format, ["alpaca", "prompt-completion", "messages", "text"], where))
        for key in self.transform or {}:
            if key not in ("rotation", "noise"):
                found.append(unknown("key", key, ["rotation", "noise"], f"{where}.transform"))
        for key in ("pretrain", "seed"):
            if getattr(self, key) < 0:
                found.append(f"{where}.{key}: expected a whole number of 0 or more, got {getattr(self, key)!r}.")
        if self.labels is not None and len(set(self.labels)) < max(len(self.labels), 2):
            found.append(f"{where}.labels: expected two or more names, no name twice; got {self.labels!r}.")
        return found


@dataclass
class Pretraining:
    """How the base itself is trained first, where no pretrained one exists (the small CNN), on the `pretrain` rows."""

    num_train_epochs: int = 5
    batch_size: int = 128
    learning_rate: float = 1e-3
    seed: int = 0

    def problems(self, where: str = "pretraining") -> list[str]:
        """What is wrong with it, one line each."""
        found = type_problems(self, f"{where}.")
        return found or [
            f"{where}.{key}: expected a number above 0, got {getattr(self, key)!r}."
            for key in ("num_train_epochs", "batch_size", "learning_rate")
            if getattr(self, key) <= 0
        ]


EMBEDDED = "embedded:"
