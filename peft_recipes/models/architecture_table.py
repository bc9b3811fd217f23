"""The table of architectures: the names of attention, MLP, embedding and head modules, one row per model type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import nn


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
