"""Small random causal models of several architectures, for tests of packed batches."""

from __future__ import annotations

import transformers
from small import tiny_config

VOCABULARY = 60


KINDS = ("gpt2", "llama", "qwen2")


def model_of(kind: str, attention: str = "sdpa", seed: int = 0):
    if kind == "qwen2":
        config = transformers.Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256,
        )  # fmt: skip
    else:
        config = tiny_config(kind, VOCABULARY)
    transformers.set_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
