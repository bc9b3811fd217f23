"""Small random models, tokenizers and sentences, and a comparison in this process; used by fixtures and tests."""

from __future__ import annotations

import random
from pathlib import Path

GOOD = ["bright", "lovely", "warm", "happy", "fine", "splendid", "glad", "sweet"]


BAD = ["awful", "cold", "nasty", "sad", "grim", "dull", "poor", "bitter"]


FILLER = ["the", "a", "film", "day", "was", "is", "and", "it", "this", "that", "very", "so", "we", "saw"]


_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return distinct texts with the label "good" or "bad", which three words of each text determine."""
    draw, labels = random.Random(seed), {}
    while len(labels) < count:
        label = ("bad", "good")[len(labels) % 2]
        words = draw.sample(FILLER, 3) + draw.sample(GOOD if label == "good" else BAD, 3)
        draw.shuffle(words)
        labels[" ".join(words)] = label
    return list(labels.items())


def tokenizer(chat: bool = False):
    """Return a word-level tokenizer of the sentences' words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
    words = [*special, *sorted({*GOOD, *BAD, *FILLER, "good", "bad", "say", "in", "###", "Instruction:", "Response:"})]
    words_only = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=words_only, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"], model_max_length=64,
    )  # fmt: skip
    if chat:
        wrapped.chat_template = _TEMPLATE
    return wrapped


def tiny_config(kind: str, vocab: int, width: int = 32):
    """Return the configuration of a model with a few thousand weights."""
    from transformers import BartConfig, DistilBertConfig, GPT2Config, LlamaConfig, T5Config

    if kind == "distilbert":
        return DistilBertConfig(vocab_size=vocab, dim=width, hidden_dim=2 * width, n_layers=2, n_heads=2,
                                max_position_embeddings=64, pad_token_id=0)  # fmt: skip
    if kind == "gpt2":
        return GPT2Config(vocab_size=vocab, n_embd=width, n_layer=2, n_head=2, n_positions=64, bos_token_id=1,
                          eos_token_id=1, pad_token_id=None)  # fmt: skip
    if kind == "t5":
        return T5Config(vocab_size=vocab, d_model=width, d_kv=width // 2, d_ff=2 * width, num_layers=2, num_heads=2,
                        dropout_rate=0.0, eos_token_id=1, pad_token_id=0, decoder_start_token_id=0)  # fmt: skip
    if kind == "bart":
        return BartConfig(vocab_size=vocab, d_model=width, encoder_ffn_dim=2 * width, decoder_ffn_dim=2 * width,
                          encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
                          max_position_embeddings=64, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=1,
                          decoder_start_token_id=1, forced_eos_token_id=None)  # fmt: skip
    return LlamaConfig(vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None,
                       eos_token_id=1, pad_token_id=0, tie_word_embeddings=True)  # fmt: skip


def compared_here(recipe, arms, seeds, output: Path):
    """Compare as `compare` does, but with every run in this process, which is faster."""
    from peft_recipes import train
    from peft_recipes.arms.selection import choose_arms
    from peft_recipes.comparison.collecting import collect

    recipe = choose_arms(recipe, arms).recipe
    for arm, seed in [("base", seeds[0]), *((arm, seed) for seed in seeds for arm in arms)]:
        train(recipe, arm, seed=seed, output=output, resume=True)
    recipe.to_yaml(output / recipe.name / "recipe.yaml")
    return collect(recipe, arms, seeds, output)
