"""Which modules of a model are its attention, its mlp, its embeddings and its head: one table, and what it answers.

PEFT hits a module when a target is its whole name or the end of it after a dot (`c_proj` hits `h.0.attn.c_proj` and
`h.0.mlp.c_proj`), or, when the targets are one string, when that regular expression matches the whole name. The names
here are as long as they must be to hit what they say and nothing else. They are those of transformers 5; tests build
every row's models and compare. Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from peft_recipes.errors import RecipeError, nearest, unknown
from peft_recipes.models.module_matching import matched_modules, nearest_modules, target_names, unmatched

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Targets",
    "architecture_of",
    "component_of",
    "head_modules",
    "head_names",
    "matched_modules",
    "nearest_modules",
    "parameters_by_component",
    "target_names",
    "targets",
    "targets_of",
    "unmatched",
]

Component = Literal["embeddings", "attention", "mlp", "head", "other"]
COMPONENTS: tuple[Component, ...] = ("embeddings", "attention", "mlp", "head", "other")
GROUPS = ("attention", "mlp", "all-linear", "convolutions")


class Targets(NamedTuple):
    """Names for `target_modules` (a list, or one regular expression) and, where they were guessed, a note."""

    names: list[str] | str
    note: str = ""


@dataclass(frozen=True)
class Architecture:
    """One row: the names of an architecture's parts, as PEFT matches them.

    `linear` is what "all-linear" means, attention and mlp unless given; it never holds a freshly made head. `patterns`
    holds a regular expression for each group that no list of names can hit exactly. `heads` maps a kind of task to the
    modules that only that task has.
    """

    model_type: str
    blocks: str  # the name of the list of repeated blocks, in a model with a head
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    embeddings: tuple[str, ...]
    heads: Mapping[str, tuple[str, ...]]
    layer: Literal["Linear", "Conv1D"] = "Linear"
    patterns: Mapping[str, str] = field(default_factory=dict)
    linear: tuple[str, ...] = ()
    convolutions: tuple[str, ...] = ()
    note: str = ""  # how a row that is not of the table came about

    @property
    def fan_in_fan_out(self) -> bool:
        """What LoraConfig wants to know: whether weights are stored (in, out), as Conv1D does, not (out, in)."""
        return self.layer == "Conv1D"

    def group(self, which: str) -> list[str] | str:
        """The targets of a group; an empty list for a group that this architecture does not have."""
        if which in self.patterns:
            return self.patterns[which]
        names = {
            "attention": self.attention,
            "mlp": self.mlp,
            "all-linear": self.linear or self.attention + self.mlp,
            "convolutions": self.convolutions,
        }
        return list(names[which])


_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_DECODER = {"language-modeling": ("lm_head",), "text-classification": ("score",)}

_BERT_ATTENTION = ("query", "key", "value", "attention.output.dense")
_BERT_MLP = ("intermediate.dense", "output.dense")
# `output.dense` ends `attention.output.dense` too, so the mlp alone can only be told by what stands before it
_BERT_PATTERNS = {"mlp": r"(.*\.)?layer\.\d+\.(intermediate|output)\.dense"}

_ROWS = (
    #            model_type     blocks              attention  mlp     embeddings         heads
    Architecture("llama", "model.layers", _QKVO, _GATED, ("embed_tokens",), _DECODER),  # and SmolLM2
    Architecture("mistral", "model.layers", _QKVO, _GATED, ("embed_tokens",), _DECODER),
    Architecture("qwen2", "model.layers", _QKVO, _GATED, ("embed_tokens",), _DECODER),
    Architecture("qwen3", "model.layers", _QKVO, _GATED, ("embed_tokens",), _DECODER),
    Architecture("gemma2", "model.layers", _QKVO, _GATED, ("embed_tokens",), _DECODER),
    Architecture("gemma3_text", "model.layers", _QKVO, _GATED, ("embed_tokens",), _DECODER),
    Architecture(
        "gpt2",
        blocks="transformer.h",
        attention=("attn.c_attn", "attn.c_proj"),
        mlp=("mlp.c_fc", "mlp.c_proj"),
        embeddings=("wte", "wpe"),
        heads=_DECODER,
        layer="Conv1D",
    ),
    Architecture(
        "gpt_neox",
        blocks="gpt_neox.layers",
        attention=("query_key_value", "attention.dense"),
        mlp=("dense_h_to_4h", "dense_4h_to_h"),
        embeddings=("embed_in",),
        heads=_DECODER,
    ),
    Architecture(
        "opt",
        blocks="model.decoder.layers",
        attention=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=("fc1", "fc2"),
        embeddings=("embed_tokens", "embed_positions"),
        heads=_DECODER,
    ),
    Architecture(
        "phi",
        blocks="model.layers",
        attention=("q_proj", "k_proj", "v_proj", "self_attn.dense"),
        mlp=("mlp.fc1", "mlp.fc2"),
        embeddings=("embed_tokens",),
        heads=_DECODER,
    ),
    Architecture(
        "distilbert",
        blocks="distilbert.transformer.layer",
        attention=("q_lin", "k_lin", "v_lin", "out_lin"),
        mlp=("ffn.lin1", "ffn.lin2"),
        embeddings=("embeddings",),
        heads={
            "text-classification": ("pre_classifier", "classifier"),
            "masked-language-modeling": ("vocab_transform", "vocab_layer_norm", "vocab_projector"),
        },
    ),
    Architecture(
        "bert",
        blocks="bert.encoder.layer",
        attention=_BERT_ATTENTION,
        mlp=_BERT_MLP,
        embeddings=("embeddings",),
        # the pooler before the classifier is pretrained: a part of the base, not of the head
        heads={"text-classification": ("classifier",), "masked-language-modeling": ("cls",)},
        patterns=_BERT_PATTERNS,
    ),
    Architecture(
        "roberta",
        blocks="roberta.encoder.layer",
        attention=_BERT_ATTENTION,
        mlp=_BERT_MLP,
        embeddings=("embeddings",),
        heads={"text-classification": ("classifier",), "masked-language-modeling": ("lm_head",)},
        patterns=_BERT_PATTERNS,
    ),
    Architecture(
        "vit",
        blocks="vit.layers",
        attention=_QKVO,
        mlp=("mlp.fc1", "mlp.fc2"),
        embeddings=("embeddings",),
        heads={"image-classification": ("classifier",)},
    ),
    Architecture(
        "small-cnn",
        blocks="",
        attention=(),
        mlp=(),
        embeddings=(),
        heads={"image-classification": ("classifier",)},
        linear=("fc1", "classifier"),  # its base comes with a trained head, so the head is a target like any other
        convolutions=("conv1", "conv2"),
    ),
)

ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in _ROWS}


def targets(model_type: str, which: str) -> list[str] | str:
    """Names for `target_modules` that hit exactly one group of layers, in every block and never in a new head.

    `which` is "attention", "mlp", "all-linear" (both; every linear layer inside the blocks) or, for a network with
    convolutions, "convolutions". The answer is a list, or one regular expression where no list is exact (BERT's mlp).
    Raises RecipeError, naming the nearest, for a model type without a row or a group the architecture does not have.
    """
    return _group(architecture_of(model_type), which)


def targets_of(config: PreTrainedConfig, which: str) -> Targets:
    """`targets` for a model's configuration; one without a row is answered from its repeated blocks, with a note."""
    architecture = architecture_of(config)
    return Targets(_group(architecture, which), architecture.note)


def architecture_of(what: str | PreTrainedConfig) -> Architecture:
    """The row of a model type or of a configuration.

    A configuration whose model type has no row is built on the meta device (no weights) and read off its blocks; such
    a row says so in its `note`. A string without a row, and a model that can't be read, raise RecipeError.
    """
    model_type = what if isinstance(what, str) else what.model_type
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    if isinstance(what, str):
        hint = " For any other architecture ask targets_of(config, which)."
        raise RecipeError(unknown("model type", model_type, ARCHITECTURES) + hint)
    from peft_recipes.models.architecture_walk import walk_config

    return walk_config(what)


def head_names(model_type: str, task: str) -> tuple[str, ...]:
    """The modules that a task puts on top of the base, as PEFT matches them (`modules_to_save`).

    `task` is a recipe's task or "masked-language-modeling"; "sft" and "dpo" have the head of "language-modeling".
    Raises RecipeError for a task that the architecture has no head for.
    """
    row = architecture_of(model_type)
    kind = "language-modeling" if task in ("sft", "dpo") else task
    if kind not in row.heads:
        raise RecipeError(unknown("task", task, row.heads, where=f"the heads of {model_type}"))
    return row.heads[kind]


def head_modules(model: nn.Module) -> list[str]:
    """The names of the head modules in a real (or meta) model: its row's, else its children outside the base model."""
    row = ARCHITECTURES.get(model.config.model_type)
    children = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
    if row is not None:
        known = {name for names in row.heads.values() for name in names}
        return [name for name in children if name in known]
    if model.base_model is model:
        return []
    return [name for name in children if name != model.base_model_prefix]


def component_of(architecture: Architecture, parameter_name: str) -> Component:
    """Which part of the model a parameter belongs to.

    attention and mlp are the layers that those targets hit; the blocks' norms are "other"; everything inside the
    embedding modules (BERT's norm and ViT's class token too) is "embeddings". A layer that PEFT wrapped, and the
    adapter on it, count as the layer. Tied weights carry the embedding's name, as `named_parameters` gives them.
    """
    parts = parameter_name.split(".")
    paths = [".".join(parts[: end + 1]) for end in range(len(parts))]
    names: dict[Component, list[str] | str] = {
        "head": [name for heads in architecture.heads.values() for name in heads],
        "embeddings": list(architecture.embeddings),
        "attention": architecture.group("attention"),
        "mlp": architecture.group("mlp"),
    }
    for component, hits in names.items():
        if any(_hit(hits, path) for path in paths):
            return component
    return "other"


def parameters_by_component(model: nn.Module) -> dict[Component, int]:
    """How many parameters each part of a real (or meta) model has; shared ones count once, so the sum is the total."""
    architecture = ARCHITECTURES.get(model.config.model_type)
    if architecture is None:
        from peft_recipes.models.architecture_walk import walk

        architecture = walk(model)
    counts = dict.fromkeys(COMPONENTS, 0)
    for name, parameter in model.named_parameters():
        counts[component_of(architecture, name)] += parameter.numel()
    return counts


def _group(architecture: Architecture, which: str) -> list[str] | str:
    groups = [group for group in GROUPS if architecture.group(group)]
    if which in groups:
        return architecture.group(which)
    if which in GROUPS:
        raise RecipeError(f"'{architecture.model_type}' has no {which} layers to target. Valid: {', '.join(groups)}.")
    guess = nearest(which, groups) or nearest(which.replace("_", "-"), groups)
    raise RecipeError(
        f"Unknown target group '{which}' of '{architecture.model_type}'.{guess} Valid: {', '.join(groups)}."
    )


def _hit(names: list[str] | str, path: str) -> bool:
    """PEFT's rule, without PEFT: this runs on names alone."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)
