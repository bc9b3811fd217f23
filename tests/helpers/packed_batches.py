"""Examples, small models and the losses and gradients of a batch, for tests of the kernels for packed batches."""

from __future__ import annotations

import random

import torch
import transformers
from causal_models import VOCABULARY, model_of

from peft_recipes.data.packing import IGNORED
from peft_recipes.tasks.causal_losses import labelled_losses, tensors

WINDOW = 6  # of the sliding layers, shorter than the examples


def tokens(count: int, seed: int) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(3, VOCABULARY) for i in range(count)]


def example(prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


SYSTEM = tokens(9, 99)
SHARED = [example(SYSTEM + tokens(n, n), tokens(m, n + 50)) for n, m in ((3, 4), (7, 2), (1, 9), (5, 5))]
APART = [example(tokens(n, n), tokens(n + 1, n + 9)) for n in (4, 8, 6)]
LONG = [example(SYSTEM * 15 + tokens(n, n), tokens(m, n + 50)) for n, m in ((60, 40), (17, 30), (90, 7), (5, 80))]
PAIRS = [
    {"prompt_ids": SYSTEM + tokens(n, n), "chosen_ids": tokens(m, n + 50), "rejected_ids": tokens(k, n + 70)}
    for n, m, k in ((3, 4, 9), (6, 2, 1), (1, 8, 3))
]


def small(kind: str):
    """A small random model; gemma3 looks back 6 tokens in two of three layers, gemma2 caps its scores as well."""
    if kind in ("llama", "gpt2"):
        return model_of(kind)
    size = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}  # fmt: skip
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = {
        "qwen3": lambda: transformers.Qwen3Config(**size, num_hidden_layers=2),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **size, num_hidden_layers=3, sliding_window=WINDOW, layer_types=kinds
        ),
        "gemma2": lambda: transformers.Gemma2Config(
            **size, num_hidden_layers=3, sliding_window=WINDOW, layer_types=kinds, attn_logit_softcapping=0.1
        ),
    }[kind]()  # fmt: skip
    transformers.set_seed(0)
    attention = "eager" if kind == "gemma2" else "sdpa"  # sdpa has no cap
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():  # larger scores, so that the cap and the window matter
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(8)
    return model


def losses_and_gradients(model, batch):
    """Each example's losses in order, and the gradients of their sum."""
    model.zero_grad()
    losses = labelled_losses(model, tensors(batch))[0]
    losses.sum().backward()
    kept = losses.detach()[losses.detach() != 0].sort().values
    return kept, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
