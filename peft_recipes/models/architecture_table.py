"""Table of architectures: the names of attention, MLP, embedding and head modules, one row per model type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from torch import nn

Component = Literal["embeddings", "attention", "mlp", "head", "other"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
TIMM = "timm_wrapper"  # transformers' model type of every model of timm
GROUPS = ("attention", "mlp", "all-linear", "convolutions")


@dataclass(frozen=True)
class Architecture:
    """One row: the module names of an architecture, as PEFT matches them.

    `linear` overrides what "all-linear" selects (default: attention and mlp); it never contains a new head.
    `patterns` maps a group to a regular expression where no list of names matches it exactly. `heads` lists the head
    modules of all tasks.
    """

    model_type: str
    blocks: str  # the ModuleList of transformer blocks, by its full name in a model with a head
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    embeddings: tuple[str, ...]
    heads: tuple[str, ...]
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
        if which == "all-linear":
            return list(self.linear or self.attention + self.mlp)
        return list(getattr(self, which))


def _row(
    model_type: str, blocks: str, attention: str, mlp: str, embeddings: str, heads: str, **options: Any
) -> Architecture:
    names = (tuple(text.split()) for text in (attention, mlp, embeddings, heads))
    return Architecture(model_type, blocks, *names, **options)


_LLAMA = ("q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj", "embed_tokens", "lm_head score")
_BERT = ("query key value attention.output.dense", "intermediate.dense output.dense", "embeddings")
# `output.dense` also matches `attention.output.dense`, so only a pattern selects the MLP alone
_BERT_PATTERNS = {"mlp": r"(.*\.)?layer\.\d+\.(intermediate|output)\.dense"}
_T5_PATTERNS = {
    "mlp": r"(.*\.)?DenseReluDense\.(wi|wi_0|wi_1|wo)",
    "all-linear": r"(.*\.)?((SelfAttention|EncDecAttention)\.[qkvo]|DenseReluDense\.(wi|wi_0|wi_1|wo))",
}

# fmt: off
_ROWS = (
    # model_type, blocks,
    #     attention, mlp,
    #     embeddings, heads
    _row("llama", "model.layers", *_LLAMA),  # also SmolLM2
    _row("mistral", "model.layers", *_LLAMA),
    _row("qwen2", "model.layers", *_LLAMA),
    _row("qwen3", "model.layers", *_LLAMA),
    _row("gemma2", "model.layers", *_LLAMA),
    _row("gemma3_text", "model.layers", *_LLAMA),
    _row("gpt2", "transformer.h",
         "attn.c_attn attn.c_proj", "mlp.c_fc mlp.c_proj",
         "wte wpe", "lm_head score classifier", layer="Conv1D"),
    _row("gpt_neox", "gpt_neox.layers",
         "query_key_value attention.dense", "dense_h_to_4h dense_4h_to_h",
         "embed_in", "lm_head score classifier"),
    _row("opt", "model.decoder.layers",
         "q_proj k_proj v_proj out_proj", "fc1 fc2",
         "embed_tokens embed_positions", "lm_head score"),
    _row("phi", "model.layers",
         "q_proj k_proj v_proj self_attn.dense", "mlp.fc1 mlp.fc2",
         "embed_tokens", "lm_head score"),
    _row("distilbert", "distilbert.transformer.layer",
         "q_lin k_lin v_lin out_lin", "ffn.lin1 ffn.lin2",
         "embeddings", "pre_classifier classifier vocab_transform vocab_layer_norm vocab_projector"),
    # the pooler before the classifier is pretrained: part of the base
    _row("bert", "bert.encoder.layer", *_BERT, "classifier cls", patterns=_BERT_PATTERNS),
    _row("roberta", "roberta.encoder.layer", *_BERT, "classifier lm_head", patterns=_BERT_PATTERNS),
    _row("vit", "vit.layers",
         "q_proj k_proj v_proj o_proj", "mlp.fc1 mlp.fc2",
         "embeddings", "classifier"),
    # its depthwise convolutions have too many groups for LoRA, and its squeeze-and-excitation few weights
    _row("efficientnet", "", "", "", "", "classifier",
         convolutions=("embeddings.convolution", "expand_conv", "project_conv", "top_conv")),
    # wi in T5, wi_0 and wi_1 in T5 1.1: only a pattern names no layer that a base lacks
    *(_row(name, "encoder.block, decoder.block", "SelfAttention.q SelfAttention.k SelfAttention.v SelfAttention.o "
           "EncDecAttention.q EncDecAttention.k EncDecAttention.v EncDecAttention.o", "",
           "shared embed_tokens relative_attention_bias", "lm_head classification_head qa_outputs",
           patterns=_T5_PATTERNS) for name in ("t5", "mt5")),
    *(_row(name, "model.encoder.layers, model.decoder.layers",
           "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj "
           "encoder_attn.q_proj encoder_attn.k_proj encoder_attn.v_proj encoder_attn.out_proj", "fc1 fc2",
           "shared embed_tokens embed_positions", "lm_head classification_head qa_outputs")
      for name in ("bart", "mbart", "marian", "pegasus")),
    # its base has a trained head, which is a target like any other layer
    _row("small-cnn", "", "", "", "", "classifier", linear=("fc1", "classifier"), convolutions=("conv1", "conv2")),
)
# fmt: on
ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in _ROWS}


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of a model's head modules: those in the table, else its children outside the base model.

    A timm model is one child with its head inside, which timm names itself.
    """
    row = ARCHITECTURES.get(model.config.model_type)
    if model.config.model_type == TIMM:
        names = (model.timm_model.pretrained_cfg or {}).get("classifier") or ()
        return [f"timm_model.{name}" for name in ([names] if isinstance(names, str) else names)]
    children = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
    if row is not None:
        return [name for name in children if name in row.heads]
    return [name for name in children if name != model.base_model_prefix and model.base_model is not model]
