"""Tiny random models of many of transformers' architectures, for tests of a promise on any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from small import tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

_DECODERS = (
    "apertus arcee biogpt bloom codegen cohere cohere2 diffllama ernie4_5 exaone4 falcon gemma gemma2 gemma3_text "
    "glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite helium hunyuan_v1_dense jetmoe llama "
    "mamba minimax ministral mistral mixtral modernbert-decoder mpt nanochat nemotron olmo olmo2 olmo3 olmoe "
    "openai-gpt opt persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next seed_oss smollm3 stablelm "
    "starcoder2 xglm"
)
_ENCODERS = (
    "albert bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra ernie esm eurobert "
    "fnet megatron-bert mobilebert modernbert mpnet nomic_bert nystromformer rembert roberta "
    "roberta-prelayernorm roformer xlm xlm-roberta xlm-roberta-xl"
)
_ENCODER_DECODERS = (
    "bart bigbird_pegasus blenderbot led longt5 m2m_100 marian mbart mt5 mvp pegasus pegasus_x plbart "
    "switch_transformers t5 umt5"
)
DECODERS, ENCODERS = _DECODERS.split(), _ENCODERS.split()
ENCODER_DECODERS = _ENCODER_DECODERS.split()
CLASSIFIERS = [kind for kind in (*DECODERS, *ENCODERS) if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES]

# transformers' usual names of a size, and those that some configurations use instead.
_SIZES: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=64,
    max_position_embeddings=96, pad_token_id=0, bos_token_id=1, eos_token_id=1, initializer_range=0.2,
)  # fmt: skip
_IF_PRESENT: dict[str, Any] = dict(
    n_embd=32, n_layer=2, n_head=4, n_positions=96, n_inner=64, d_model=32, ffn_dim=64, dim=32, n_layers=2, n_heads=4,
    hidden_dim=64, rotary_dim=4, embedding_size=24, num_experts=4, num_local_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, sliding_window=64,
    block_size=8,
)  # fmt: skip
_OF_AN_ENCODER_DECODER: dict[str, Any] = dict(
    d_model=32, hidden_size=32, encoder_layers=2, decoder_layers=2, num_layers=2, num_decoder_layers=2,
    num_encoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, num_heads=2,
    num_encoder_attention_heads=2, num_decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, d_kv=16,
    d_ff=64, max_position_embeddings=96, max_encoder_position_embeddings=96, max_decoder_position_embeddings=96,
    pad_token_id=0, bos_token_id=1, eos_token_id=1, forced_eos_token_id=None, dropout=0.0, dropout_rate=0.0,
    num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, attention_window=8, block_size=4,
    num_random_blocks=1,
)  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "falcon": {"head_dim": ...},  # a property there
    "exaone4": {"sliding_window_pattern": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 256},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2,
                   "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}  # fmt: skip


def tiny_architecture(model_type: str) -> transformers.PretrainedConfig:
    """The configuration of a model with a few ten thousand weights, without dropout."""
    defaults = transformers.AutoConfig.for_model(model_type)
    given = defaults.to_dict()
    sizes = {**_SIZES, **{key: value for key, value in _IF_PRESENT.items() if key in given}}
    sizes |= {
        key: 0.0 for key, value in given.items() if ("drop" in key or "pdrop" in key) and isinstance(value, float)
    }
    sizes |= _OWN.get(model_type, {})
    sizes = {key: value for key, value in sizes.items() if value is not ...}
    return transformers.AutoConfig.for_model(model_type, vocab_size=len(tokenizer()), **sizes)


def save_tiny_encoder_decoder(model_type: str, folder: Path) -> Path:
    """Write a random encoder-decoder of this architecture, with a tokenizer; return the folder."""
    given = transformers.AutoConfig.for_model(model_type).to_dict()
    sizes = {key: value for key, value in _OF_AN_ENCODER_DECODER.items() if key in given}
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=len(tokenizer()), decoder_start_token_id=0, **sizes
    )
    transformers.set_seed(0)
    transformers.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_tiny_base(model_type: str, folder: Path) -> Path:
    """Write a random base of this architecture, with a tokenizer; return the folder."""
    transformers.set_seed(0)
    auto = transformers.AutoModelForCausalLM if model_type in DECODERS else transformers.AutoModel
    auto.from_config(tiny_architecture(model_type)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
