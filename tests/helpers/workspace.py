"""A folder in which the commands of the documentation run as they are written, in seconds.

The names in the documentation are real: a recipe is found by its name, a model by its id, a run in adapters/. Here they
stand for small things: the ids of the Hub are folders with tiny random models and small files, the recipes are the
shipped ones with fewer rows and three steps, and what a page expects to be there was trained once.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark_files import choices
from exported_models import save_model
from saved_adapters import saved
from small import compared_here, sentences
from tagged import tagged, written

from peft_recipes import Recipe, load_recipe, train

# The Hub's models of the documentation -> the tiny model that stands there.
MODELS = {
    "openai-community/gpt2": "gpt2",
    "distilbert/distilbert-base-uncased": "distilbert",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "llama",
    "Qwen/Qwen2.5-1.5B-Instruct": "llama",
    "my-org/my-bert": "distilbert",
    "my-org/my-model": "llama",
}
_ROWS = {"train": 16, "validation": 8, "test": 8, "test_split": None}
_PLAIN = {"plain": {"path": "plain.jsonl", "name": None, "test_split": None, "test": 8}}
# The shipped recipes, with what makes each small.
RECIPES: dict[str, dict[str, Any]] = {
    "gpt2-sms-spam": {"dataset": _ROWS},
    "distilbert-imdb": {"dataset": _ROWS},
    "distilbert-pairs": {"dataset": {**_ROWS, "name": None}},
    "gpt2-code": {"dataset": _ROWS, "evaluate_also": _PLAIN},
    "smollm2-alpaca": {"dataset": _ROWS, "evaluate_also": _PLAIN},
    "smollm2-arithmetic": {"dataset": {**_ROWS, "name": None}},
    "smollm2-dpo": {"dataset": _ROWS},
    "mnist-shift": {
        "dataset": {**_ROWS, "path": "embedded:mnist", "pretrain": 64},
        "pretraining": {"num_train_epochs": 1},
    },
}
_SMALL = {
    "training": {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "eval_strategy": "no",
        "use_cpu": True,
        "bf16": False,
    },
    "max_length": 48,
    "prompts": [],
    "benchmarks": [],  # their data is on the Hub
}
# What is trained before a page is run: the runs that pages read from adapters/.
TRAINED = {"gpt2-sms-spam": ["full", "lora"], "smollm2-alpaca": ["lora", "lora-all"], "smollm2-arithmetic": ["lora"],
           "mnist-shift": ["lora"]}  # fmt: skip
SEEDS = {"smollm2-alpaca": [0, 1]}  # else one: two adapters of that recipe are combined


def make(root: Path, tiny: Callable[..., Path]) -> None:
    """Fills `root`, which must be the current folder."""
    for name, kind in MODELS.items():
        shutil.copytree(tiny(kind), root / name)
    saved(save_model(root / "byte-pairs" / "base"), root / "byte-pairs" / "adapter")
    _data(root)
    (root / "named").mkdir()
    for name, changes in RECIPES.items():
        recipe = load_recipe(name).with_changes({**changes, **_SMALL})
        recipe = dataclasses.replace(recipe, embedded={"title": recipe.title})
        recipe.to_yaml(root / "named" / f"{name}.yaml")
        code = (
            f"from peft_recipes import Recipe\n\nrecipe = Recipe.from_yaml({str(root / 'named' / f'{name}.yaml')!r})\n"
        )
        (root / "named" / f"{name.replace('-', '_')}.py").write_text(code)
    for name, arms in TRAINED.items():
        compared_here(Recipe.from_yaml(root / "named" / f"{name}.yaml"), arms, SEEDS.get(name, [0]), root / "adapters")
    shutil.copytree(root / "adapters" / "gpt2-sms-spam" / "lora" / "seed-0", root / "me" / "spam-lora")


def recipe_files(root: Path) -> dict[str, Path]:
    """What `catalog.recipes.recipe_files` gives in the workspace."""
    return {name: root / "named" / f"{name.replace('-', '_')}.py" for name in RECIPES}


class ThisProcess(contextlib.AbstractContextManager):
    """In place of the executors, which start a process for each run: tests/comparison tests those."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.notes, self._orders = [], []

    def __exit__(self, *_: Any) -> None:
        pass

    def spread_of(self, arm: Any, hardware: Any) -> None:
        return None

    def rest(self) -> None:
        pass

    def submit(self, order: Any) -> None:
        self._orders.append(order)

    def cancel(self, order: Any) -> None:
        self._orders = [each for each in self._orders if each is not order]

    def finished(self) -> Any:
        while self._orders:
            order = self._orders.pop(0)
            order.report("running")
            options = {"seed": order.job[1], "output": order.output, "data": order.data, "overwrite": not order.turns}
            if order.turns:
                (order.folder / "run.json").unlink(missing_ok=True)
                options |= {"resume": True, "pause_at": order.pause_at}
            run = train(Recipe.from_yaml(order.yaml), order.job[0], **options)
            order.report(run.data["status"])
            yield order


def _data(root: Path) -> None:
    """The datasets of the recipes and the users' files that the pages name."""
    texts = [text for text, _ in sentences(96, seed=1)]
    good = [text for text, label in sentences(96, seed=2) if label == "good"]
    bad = [text for text, label in sentences(96, seed=2) if label == "bad"]
    answers = [{"instruction": f"say {a}", "input": "", "output": b} for a, b in itertools.pairwise(texts)]
    pairs = [{"prompt": f"say {a}", "chosen": b, "rejected": c} for a, b, c in zip(texts, good, bad, strict=False)]
    _lines(root / "ucirvine/sms_spam", [{"sms": t, "label": i % 2} for i, t in enumerate(texts)])
    _lines(root / "stanfordnlp/imdb", [{"text": t, "label": i % 2} for i, t in enumerate(texts)])
    equal = [{"sentence1": a, "sentence2": b, "label": i % 2} for i, (a, b) in enumerate(itertools.pairwise(texts))]
    _lines(root / "nyu-mll/glue", equal)
    _lines(root / "flytech/python-codes-25k", [{"output": t} for t in texts])
    _lines(root / "tatsu-lab/alpaca", answers)
    _lines(root / "openai/gsm8k", [{"question": t, "answer": f"{t} #### {i}"} for i, t in enumerate(texts)])
    _lines(root / "trl-lib/ultrafeedback_binarized", pairs)
    (root / "my_scores.py").write_text("def polite(prediction, row):\n    return float('please' in prediction)\n")
    choices(root, "my_task")
    (root / "plain.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[:16]))
    written(root / "sentences.jsonl", tagged(96))
    (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    chats = [[{"role": "user", "content": "say"}, {"role": "assistant", "content": text}] for text in texts]
    (root / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    with (root / "support.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ticket", "reply", "tone"])
        writer.writerows((row["instruction"], row["output"], "kind") for row in answers)
    named = [{"prompt": p["prompt"], "better": p["chosen"], "worse": p["rejected"]} for p in pairs]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    for name in ("entailment", "tags", "similarity"):
        rows = [
            {"text": row["sentence1"], "premise": row["sentence1"], "hypothesis": row["sentence2"], **row,
             "tags": ["a", "b"][: i % 3], "score": i % 5 + 0.5}
            for i, row in enumerate(equal)
        ]  # fmt: skip
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (root / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["body", "stars"])
        writer.writerows((text, 1 if label == "bad" else 5) for text, label in sentences(96, seed=4))


def _lines(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
