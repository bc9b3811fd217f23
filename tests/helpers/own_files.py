"""Ten files as people have them, one for each shape of data: the name of the base that learns it, and the writer."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pictures import pictures
from small import sentences

COUNT = 40


def _texts(seed: int = 0, count: int = COUNT) -> list[tuple[str, str]]:
    return sentences(count, seed)


def _csv(path: Path, header: list[str], rows: list[tuple]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reviews(folder: Path) -> Path:
    return _csv(folder / "reviews.csv", ["id", "review", "sentiment"],
                [(i, text, label) for i, (text, label) in enumerate(_texts())])  # fmt: skip


def pairs(folder: Path) -> Path:
    first, second = _texts(1), _texts(2)
    rows = [(text, second[(3 * i // 2) % COUNT]) for i, text in enumerate(first)]
    return _jsonl(folder / "pairs.jsonl", [
        {"premise": a, "hypothesis": b, "label": int(first == second)} for (a, first), (b, second) in rows
    ])  # fmt: skip


def prompts(folder: Path) -> Path:
    return _jsonl(folder / "prompts.jsonl", [{"prompt": f"say {word}", "completion": t} for t, word in _unique()])


def alpaca(folder: Path) -> Path:
    rows = [{"instruction": f"say {word}", "input": "", "output": text} for text, word in _unique()]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    return folder / "alpaca.json"


def messages(folder: Path) -> Path:
    return _jsonl(folder / "chats.jsonl", [
        {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": text}]}
        for text, word in _unique()
    ])  # fmt: skip


def questions(folder: Path) -> Path:
    return _csv(folder / "faq.csv", ["question", "answer"], [(f"say {word}", text) for text, word in _unique()])


def tickets(folder: Path) -> Path:
    """Columns of no usual name."""
    return _csv(folder / "tickets.tsv.csv", ["ticket", "reply"], [(f"say {word}", text) for text, word in _unique()])


def preferences(folder: Path) -> Path:
    good = [text for text, label in _texts(3, 2 * COUNT) if label == "good"]
    bad = [text for text, label in _texts(3, 2 * COUNT) if label == "bad"]
    return _jsonl(folder / "preferred.jsonl", [
        {"prompt": f"say the film {i % 9}", "chosen": a, "rejected": b}
        for i, (a, b) in enumerate(zip(good, bad, strict=True))
    ])  # fmt: skip


def plain(folder: Path) -> Path:
    return _jsonl(folder / "plain.jsonl", [{"text": text} for text, _ in _texts(4)])


def images(folder: Path) -> Path:
    return pictures(folder / "photos", train=16, test=6)


def _unique() -> list[tuple[str, str]]:
    """A text, and what its prompt asks for: no two prompts are equal."""
    return [(text, text.split()[0] + f" {i}") for i, (text, _) in enumerate(_texts(5))]


# name -> the kind of base, the writer, the task that must be found, further flags.
FILES: dict[str, tuple[str, Callable[[Path], Path], str, list[str]]] = {
    "reviews": ("distilbert", reviews, "text-classification", []),
    "pairs": ("distilbert", pairs, "text-classification", []),
    "prompts": ("llama", prompts, "sft", []),
    "alpaca": ("llama", alpaca, "sft", []),
    "messages": ("llama", messages, "sft", []),
    "questions": ("llama", questions, "sft", []),
    "tickets": ("gpt2", tickets, "sft", ["--prompt", "ticket", "--completion", "reply"]),
    "preferences": ("llama", preferences, "dpo", []),
    "plain": ("gpt2", plain, "language-modeling", []),
    "images": ("vit", images, "image-classification", []),
}
