"""Table of architectures: the names of attention, MLP, embedding and head modules, one row per model type."""

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
    """`target_modules` (a list of names or one regular expression), with a note if they come from a model's blocks."""

    names: list[str] | str
    note: str = ""


@dataclass(frozen=True)
class Architecture:
    """One row: the module names of an architecture, as PEFT matches them.

    `linear` overrides what "all-linear" selects (default: attention and mlp); it never contains a new head.
    `patterns` maps a group to a regular expression where no list of names matches it exactly. `heads` lists the head
    modules of all tasks.
    """

    model_type: str
    blocks: str = ""  # the ModuleList of transformer blocks, by its full name in a model with a head
    attention: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    layer: Literal["Linear", "Conv1D"] = "Linear"
    patterns: Mapping[str, str] = field(default_factory=dict)
    linear: tuple[str, ...] = ()
    convolutions: tuple[str, ...] = ()
    note: str = ""  # how the row was determined, if it is not in the table

    @property
    def fan_in_fan_out(self) -> bool:
        """LoraConfig's option: True where weights are stored as (in, out), as Conv1D does, instead of (out, in)."""
        return self.layer == "Conv1D"

    def group(self, which: str) -> list[str] | str:
        """Return the targets of a group; an empty list if the architecture has none."""
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
_DECODER = ("lm_head", "score")
_BERT_ATTENTION = ("query", "key", "value", "attention.output.dense")
_BERT_MLP = ("intermediate.dense", "output.dense")
# `output.dense` also matches `attention.output.dense`, so only a pattern selects the MLP alone
_BERT_PATTERNS = {"mlp": r"(.*\.)?layer\.\d+\.(intermediate|output)\.dense"}

_ROWS = (
    *(  # "llama" is SmolLM2's type, too
        Architecture(
            model_type,
            blocks="model.layers",
            attention=_QKVO,
            mlp=("gate_proj", "up_proj", "down_proj"),
            embeddings=("embed_tokens",),
            heads=_DECODER,
        )
        for model_type in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
    ),
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
        heads=("pre_classifier", "classifier", "vocab_transform", "vocab_layer_norm", "vocab_projector"),
    ),
    Architecture(
        "bert",
        blocks="bert.encoder.layer",
        attention=_BERT_ATTENTION,
        mlp=_BERT_MLP,
        embeddings=("embeddings",),
        heads=("classifier", "cls"),  # the pooler before the classifier is pretrained: part of the base
        patterns=_BERT_PATTERNS,
    ),
    Architecture(
        "roberta",
        blocks="roberta.encoder.layer",
        attention=_BERT_ATTENTION,
        mlp=_BERT_MLP,
        embeddings=("embeddings",),
        heads=("classifier", "lm_head"),
        patterns=_BERT_PATTERNS,
    ),
    Architecture(
        "vit",
        blocks="vit.layers",
        attention=_QKVO,
        mlp=("mlp.fc1", "mlp.fc2"),
        embeddings=("embeddings",),
        heads=("classifier",),
    ),
    Architecture(
        "small-cnn",
        heads=("classifier",),
        linear=("fc1", "classifier"),  # its base has a trained head, which is a target like any other layer
        convolutions=("conv1", "conv2"),
    ),
)

ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in _ROWS}


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of a model's head modules: those in the table, else its children outside the base model."""
    row = ARCHITECTURES.get(model.config.model_type)
    children = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
    if row is not None:
        return [name for name in children if name in row.heads]
    return [name for name in children if name != model.base_model_prefix and model.base_model is not model]
