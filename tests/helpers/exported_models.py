"""Small random language models that llama.cpp can run, one of each architecture, with a trained byte-level BPE."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from byte_base import CHATML

# With the BOS token first, and "model" as a role, as Gemma's.
LIKE_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "<|im_start|>{{ role }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi")
WIDTH = 64


@functools.cache
def _tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from peft_recipes.exporting.verify import PROMPTS

    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own.train_from_iterator(
        [*PROMPTS, CHATML], trainers.BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=alphabet)
    )
    return own.to_str()


def bpe_tokenizer(template: str | None = CHATML, bos: bool = False) -> Any:
    """A byte-level BPE that ends turns with <|im_end|>. bos: whether it puts <|endoftext|> before every text."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer.from_str(_tokenizer_json())
    if bos:
        own.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    options = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": "<|endoftext|>" if bos else None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, **options)
    tokenizer.chat_template = template
    return tokenizer


def config_of(kind: str, vocabulary: int) -> Any:
    """The configuration of a model of two layers, with weights large enough that greedy tokens are no near ties."""
    from transformers import AutoConfig

    given = AutoConfig.for_model(kind).to_dict()
    sizes = dict(
        hidden_size=WIDTH, n_embd=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2, n_layer=2,
        num_attention_heads=4, n_head=4, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16,
        max_position_embeddings=512, n_positions=512, sliding_window=256, initializer_range=0.2,
        bos_token_id=None, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    if kind in ("phi", "gpt_neox"):
        sizes |= {"tie_word_embeddings": False, "num_key_value_heads": 4}
    sizes = {key: value for key, value in sizes.items() if key in given or key.endswith("token_id")}
    sizes |= {key: 0.0 for key, value in given.items() if "drop" in key and isinstance(value, float)}
    return AutoConfig.for_model(kind, vocab_size=vocabulary, **sizes)


def save_model(folder: Path, kind: str = "llama", tokenizer: Any = None, seed: int = 0) -> Path:
    """Save a random model and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizer or bpe_tokenizer()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(kind, len(tokenizer)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases start as ones and zeros, which would hide a mistake
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" in name or "wte" in name:
                parameter.normal_(std=0.1 if kind in ("gemma2", "gemma3_text") else 1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def targets_of(kind: str) -> Any:
    from peft_recipes.models.architectures import targets

    return targets("llama" if kind == "gemma" else kind, "all-linear")
