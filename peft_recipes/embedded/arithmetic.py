"""Word problems with a number as their answer, made from templates; train and test have other texts and numbers.

Each problem takes two operations, and its answer is worked out as in GSM8K: the steps, then `####` and the number.
"""

from __future__ import annotations

import hashlib
import inspect
import random
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

SEED = 0
TRAIN, TEST = 2_000, 400
_NAMES = {
    "train": ("Anna", "Ben", "Carla", "David", "Ella", "Farid", "Grace", "Hugo", "Ines", "Jonas"),
    "test": ("Kofi", "Lena", "Mateo", "Nora", "Omar", "Priya"),
}
_THINGS = {
    "train": ("apples", "marbles", "stickers", "books", "pencils", "shells", "coins", "cards", "stamps", "buttons"),
    "test": ("oranges", "beads", "postcards", "tickets", "candles", "badges"),
}

# operations -> the texts of its problems. a, b and c are the numbers in the order in which they are used.
_TRAIN: dict[str, tuple[str, ...]] = {
    "+-": (
        "{name} has {a} {things} and buys {b} more. Then {name} gives {c} of them to a friend. "
        "How many {things} are left?",
        "A shop opens with {a} {things}. It receives {b} {things} at noon and sells {c} before closing. "
        "How many {things} does it have in the evening?",
        "{name} counted {a} {things} in one room and {b} in another. {c} of them were broken. How many were whole?",
    ),
    "-+": (
        "{name} had {a} {things}, lost {b} of them and later found {c} others. How many {things} does {name} have now?",
        "There were {a} {things} in a box. {name} took out {b} and put in {c}. How many {things} are in the box?",
        "A library had {a} {things}. It sold {b} and was given {c}. How many {things} has it now?",
    ),
    "++": (
        "{name} collected {a} {things} on Monday, {b} on Tuesday and {c} on Wednesday. How many {things} in total?",
        "There are {a} {things} on the table, {b} on the floor and {c} in a bag. How many {things} are there?",
    ),
    "--": (
        "{name} starts with {a} {things}, sells {b} in the morning and {c} in the afternoon. How many {things} remain?",
        "Of {a} {things}, {b} are red and {c} are blue. The others are green. How many are green?",
    ),
    "*+": (
        "{name} buys {a} packs with {b} {things} each and finds {c} more at home. How many {things} does {name} have?",
        "A row holds {b} {things}, and there are {a} full rows and {c} loose {things}. How many {things} are there?",
        "{name} reads {b} pages on each of {a} days and {c} pages on Sunday. How many pages is that?",
    ),
    "*-": (
        "{name} fills {a} bags with {b} {things} each, then takes {c} {things} out again. How many are in the bags?",
        "Tickets for {a} people cost {b} dollars each. {name} has a voucher of {c} dollars. How much is to be paid?",
        "A baker makes {a} trays of {b} rolls. {c} rolls are burnt. How many rolls are good?",
    ),
}
_TEST: dict[str, tuple[str, ...]] = {
    "+-": (
        "In the first hour {a} people came to the fair, in the second {b}. By lunch {c} had gone home. "
        "How many people were at the fair?",
    ),
    "-+": ("A bus carries {a} passengers. At the station {b} get off and {c} get on. How many are on the bus?",),
    "++": ("{name} drove {a} miles on Friday, {b} on Saturday and {c} on Sunday. How far did {name} drive?",),
    "--": ("{name} had {a} dollars and spent {b} on {things} and {c} on lunch. How many dollars were left?",),
    "*+": (
        "A garden has {a} beds of {b} roses, and {c} roses grow along the wall. How many roses does the garden have?",
        "{name} saves {b} dollars a week for {a} weeks and gets {c} dollars as a present. How much money is that?",
    ),
    "*-": ("{a} crates hold {b} {things} each. {name} sells {c} of them. How many {things} are not sold?",),
}


def arithmetic() -> dict[str, Dataset]:
    """`question` and `answer` as in openai/gsm8k, splits train and test; no numbers of a problem are in both splits."""
    from datasets import Dataset

    return {
        split: Dataset.from_list(list(_problems(split, templates, count)))
        for split, templates, count in (("train", _TRAIN, TRAIN), ("test", _TEST, TEST))
    }


def inputs() -> dict[str, Any]:
    """Return what determines the rows: this file."""
    return {"code": inspect.getsource(sys.modules[__name__])}


def _problems(split: str, templates: dict[str, tuple[str, ...]], count: int) -> Iterator[dict[str, str]]:
    draw, seen = random.Random(f"{SEED} {split}"), set()
    flat = [(operations, text) for operations, texts in templates.items() for text in texts]
    while len(seen) < count:
        operations, text = flat[len(seen) % len(flat)]
        numbers = _numbers(draw, operations)
        names = {"name": draw.choice(_NAMES[split]), "things": draw.choice(_THINGS[split])}
        question = text.format(**dict(zip("abc", numbers, strict=True)), **names)
        if _split_of(operations, numbers) == split and question not in seen:
            seen.add(question)
            yield {"question": question, "answer": _worked_out(operations, numbers)}


def _numbers(draw: random.Random, operations: str) -> tuple[int, int, int]:
    """Three numbers from 2 to 99 whose results are positive; a factor and a product's other number are smaller."""
    while True:
        first = draw.randint(2, 9) if operations[0] == "*" else draw.randint(10, 99)
        second = draw.randint(2, 20) if operations[0] == "*" else draw.randint(2, 60)
        third = draw.randint(2, 40)
        if min(_results(operations, (first, second, third))) > 0:
            return first, second, third


def _results(operations: str, numbers: tuple[int, int, int]) -> tuple[int, int]:
    a, b, c = numbers
    first = {"+": a + b, "-": a - b, "*": a * b}[operations[0]]
    return first, first + c if operations[1] == "+" else first - c


def _worked_out(operations: str, numbers: tuple[int, int, int]) -> str:
    (a, b, c), (first, second) = numbers, _results(operations, numbers)
    return f"{a} {operations[0]} {b} = {first}\n{first} {operations[1]} {c} = {second}\n#### {second}"


def _split_of(operations: str, numbers: tuple[int, int, int]) -> str:
    """The split that problems of these numbers belong to: test for every fifth, by a hash."""
    return "test" if hashlib.sha256(f"{operations} {numbers}".encode()).digest()[0] % 5 == 0 else "train"
