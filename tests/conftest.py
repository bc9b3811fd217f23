"""Small random models and datasets, built here: no test needs a network, a Hub or a file outside this folder."""

from __future__ import annotations

import csv
import gc
import os
import shutil
from pathlib import Path

import pytest
import warm_python
from small import FILLER, sentences, tiny_config, tokenizer

# Set before any library reads them: no test may contact a Hub or touch the user's caches.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PEFT_RECIPES_TESTING="1")

_GPU = "needs a CUDA GPU"
# The files that take longest: a worker begins with one of them, so that none is left for the end.
_LONGEST = (
    "distributed/test_distributed.py", "docs/test_commands.py", "arms/test_methods.py", "training/test_resume.py",
    "properties/test_any_architecture.py", "comparison/test_comparison.py", "scoring/test_benchmarks.py",
    "publishing/test_push.py", "distributed/test_preference_tasks.py", "comparison/test_ray.py", "search/test_scan.py",
)  # fmt: skip


def pytest_configure(config):
    """Let the workers of this process share a warm Python."""
    if folder := warm_python.share():
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` selects
def pytest_collection_modifyitems(items):
    """Skip the tests marked `gpu` without a CUDA GPU. A module's own condition that says so counts as the mark."""
    rank = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get("/".join(item.path.parts[-2:]), len(rank)))
    for item in items:
        if any(_GPU in str(mark.kwargs.get("reason")) for mark in item.iter_markers("skipif")):
            item.add_marker(pytest.mark.gpu)
    if needing := [item for item in items if item.get_closest_marker("gpu")]:
        import torch

        if not torch.cuda.is_available():
            for item in needing:
                item.add_marker(pytest.mark.skip(reason=_GPU))


def pytest_terminal_summary(terminalreporter):
    """Count the tests that were skipped since they need a GPU."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "gpu" in report.keywords]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests need a CUDA GPU and were skipped (pytest -m gpu).")


@pytest.fixture(autouse=True, scope="session")
def imported():
    """Import the libraries that most tests use, before the heap is frozen."""
    import peft  # noqa: F401
    from transformers import Trainer  # noqa: F401
    from trl import DPOTrainer, SFTTrainer  # noqa: F401


@pytest.fixture(autouse=True, scope="module")
def frozen_heap(imported):
    """Keep what is there before a file's tests out of garbage collection.

    A run ends with a collection, and so does a batch of answers: most of a second each with all that the libraries and
    earlier tests have left.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def own_caches(tmp_path_factory):
    """Put every cache into a temporary folder of this test session."""
    root = tmp_path_factory.mktemp("caches")
    before = {name: os.environ.get(name) for name in ("PEFT_RECIPES_CACHE", "HF_HOME", "HF_DATASETS_CACHE")}
    os.environ.update(PEFT_RECIPES_CACHE=str(root / "own"), HF_HOME=str(root / "hf"))
    os.environ["HF_DATASETS_CACHE"] = str(root / "datasets")
    import datasets.config

    datasets.config.HF_DATASETS_CACHE = root / "datasets"
    yield root
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(autouse=True, scope="session")
def warm_processes(imported, own_caches, tmp_path_factory):
    """Fork the processes that tests start, and those that the commands start: each starts 5 s earlier (warm_python.py).

    A test whose claim is about the start of a process itself uses `warm_python.REAL`.
    """
    from peft_recipes.comparison import forking

    if forking.can_fork():
        warm_python.install(tmp_path_factory.mktemp("warm"))


@pytest.fixture(scope="session")
def reviews(tmp_path_factory) -> Path:
    """A csv of 160 short texts with the columns text and label."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(sentences(160))
    return path


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    """A jsonl of 48 Alpaca examples of unequal length."""
    import json

    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = [
        {"instruction": f"say {word} in a film", "input": FILLER[i % 5] if i % 3 else "", "output": f"{text} {word}"}
        for i, (text, word) in enumerate(sentences(48, seed=3))
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.fixture(scope="session")
def preferences(tmp_path_factory) -> Path:
    """A jsonl of 56 preference pairs of unequal length: good words are chosen, bad words rejected."""
    import json

    path = tmp_path_factory.mktemp("data") / "preferences.jsonl"
    texts = {label: [text for text, kind in sentences(112, seed=7) if kind == label] for label in ("good", "bad")}
    rows = [
        {"prompt": f"say {FILLER[i % 7]} in {FILLER[i % 5]} film", "chosen": good + " we" * (i % 3), "rejected": bad}
        for i, (good, bad) in enumerate(zip(texts["good"], texts["bad"], strict=True))
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(kind, width) -> the folder of a random base with its tokenizer, built once.

    kind: "gpt2", "llama", "distilbert", "t5" or "bart".
    """
    import transformers

    folders: dict[tuple[str, int], Path] = {}

    def make(kind: str, width: int = 32) -> Path:
        if (kind, width) not in folders:
            folder = tmp_path_factory.mktemp(f"tiny-{kind}")
            words = tokenizer(chat=kind == "llama")
            transformers.set_seed(0)
            config = tiny_config(kind, len(words), width)
            autos = {"distilbert": "AutoModel", "t5": "AutoModelForSeq2SeqLM", "bart": "AutoModelForSeq2SeqLM"}
            auto = getattr(transformers, autos.get(kind, "AutoModelForCausalLM"))
            auto.from_config(config).save_pretrained(folder)
            words.save_pretrained(folder)
            folders[kind, width] = folder
        return folders[kind, width]

    return make


@pytest.fixture(scope="session")
def classify(tiny, reviews):
    """classify(kind) -> a recipe that runs in two seconds: tiny DistilBERT, 160 texts, arms full, head and lora."""
    from peft import LoraConfig

    from peft_recipes import Arm, Dataset, Recipe, targets

    def make(kind: str = "distilbert", **changes):
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets(kind, "all-linear"))
        options = {
            "name": "tiny",
            "task": "text-classification",
            "model": str(tiny(kind)),
            "dataset": Dataset(str(reviews), train=96, validation=24, test=40),
            "max_length": 16,
            "training": {"num_train_epochs": 2, "per_device_train_batch_size": 16, "use_cpu": True, "bf16": False},
            "arms": {
                "full": Arm(learning_rate=5e-3),
                "head": Arm("head", learning_rate=1e-2),
                "lora": Arm(lora, learning_rate=2e-2),
            },
        }
        return Recipe(**{**options, **changes})

    return make


@pytest.fixture(scope="session")
def instruct(tiny, questions):
    """instruct(kind) -> a recipe that runs in a few seconds: tiny Llama, 48 questions, arms full and lora."""
    from peft import LoraConfig

    from peft_recipes import Arm, Dataset, Recipe, targets

    def make(kind: str = "llama", **changes):
        options = {
            "name": "tiny-sft",
            "task": "sft",
            "model": str(tiny(kind)),
            "dataset": Dataset(str(questions), train=32, validation=8, test=8),
            "max_length": 48,
            "training": {"num_train_epochs": 1, "per_device_train_batch_size": 8, "use_cpu": True, "bf16": False},
            "arms": {
                "full": Arm(learning_rate=1e-3),
                "lora": Arm(LoraConfig(r=4, target_modules=targets(kind, "attention")), learning_rate=1e-2),
            },
            "prompts": [{"kind": "question", "prompt": "say good in a film"}],
        }
        return Recipe(**{**options, **changes})

    return make


@pytest.fixture(scope="session")
def prefer(tiny, preferences):
    """prefer(kind) -> a recipe that runs in a few seconds: tiny Llama, 56 preference pairs, arms full and lora."""
    from peft import LoraConfig

    from peft_recipes import Arm, Dataset, Recipe, targets

    def make(kind: str = "llama", **changes):
        options = {
            "name": "tiny-dpo",
            "task": "dpo",
            "model": str(tiny(kind)),
            "dataset": Dataset(str(preferences), train=32, validation=8, test=16),
            "max_length": 40,
            "training": {"num_train_epochs": 2, "per_device_train_batch_size": 8, "use_cpu": True, "bf16": False},
            "arms": {
                "full": Arm(learning_rate=1e-3),
                "lora": Arm(LoraConfig(r=4, target_modules=targets(kind, "attention")), learning_rate=2e-2),
            },
            "prompts": [{"kind": "question", "prompt": "say good in a film"}],
        }
        return Recipe(**{**options, **changes})

    return make


@pytest.fixture(scope="session")
def summaries(tmp_path_factory) -> Path:
    """A jsonl of 48 inputs and targets of unequal length."""
    import json

    path = tmp_path_factory.mktemp("data") / "summaries.jsonl"
    rows = [
        {"input": f"{text}{' the film' * (i % 4)}", "target": f"it was {word}{' and very warm' * (i % 3)}"}
        for i, (text, word) in enumerate(sentences(48, seed=11))
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.fixture(scope="session")
def translate(tiny, summaries):
    """translate(kind) -> a recipe that runs in a few seconds: tiny T5 or BART, 48 inputs, arms full and lora."""
    from peft import LoraConfig

    from peft_recipes import Arm, Dataset, Recipe, targets

    def make(kind: str = "t5", **changes):
        options = {
            "name": "tiny-seq2seq",
            "task": "seq2seq",
            "model": str(tiny(kind)),
            "dataset": Dataset(str(summaries), train=32, validation=8, test=8),
            "max_length": 24,
            "training": {"num_train_epochs": 1, "per_device_train_batch_size": 8, "use_cpu": True, "bf16": False},
            "arms": {
                "full": Arm(learning_rate=1e-3),
                "lora": Arm(LoraConfig(r=4, target_modules=targets(kind, "all-linear")), learning_rate=1e-2),
            },
            "prompts": [{"kind": "question", "prompt": "this film was very sad"}],
        }
        return Recipe(**{**options, **changes})

    return make
