"""Tokenise the texts of a classifier, single ones or pairs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    import datasets
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    max_length: int,
    config: PretrainedConfig,
) -> dict[str, list[list[int]]]:
    """Return input_ids and attention_mask of each text, and token_type_ids of pairs where the model takes them.

    pairs: the second text of each pair, None for single texts. Of a pair that is too long, the longer text is cut
    first, as by the tokenizer's `truncation=True`.
    """
    if not texts:
        return {"input_ids": [], "attention_mask": []}
    second = {} if pairs is None else {"text_pair": list(pairs)}
    encoded = tokenizer(list(texts), **second, truncation=True, max_length=max_length)
    columns = {"input_ids": encoded["input_ids"], "attention_mask": [[1] * len(ids) for ids in encoded["input_ids"]]}
    if pairs is not None and "token_type_ids" in encoded and _takes_token_types(config):
        columns["token_type_ids"] = encoded["token_type_ids"]
    return columns


def check_ends(input_ids: Sequence[Sequence[int]], config: PretrainedConfig, what: str) -> None:
    """Raise RecipeError for texts that an encoder-decoder classifier can't take.

    BART's and T5's read the class at the end token, and want as many of them in each text of a batch. what: the texts,
    for the message.
    """
    end = getattr(config, "eos_token_id", None)
    if not config.is_encoder_decoder or end is None or not input_ids:
        return
    counts = [list(ids).count(end) for ids in input_ids]
    usual = max(set(counts), key=counts.count)
    reads = f"{what}: this encoder-decoder reads the class at the end token (id {end})"
    if not usual:
        raise RecipeError(f"{reads}, which its tokenizer does not put behind a text. Save the base with a tokenizer "
                          "that does.")  # fmt: skip
    if wrong := [i for i, count in enumerate(counts) if count != usual]:
        raise RecipeError(f"{reads}, and {len(wrong)} of {len(counts)} texts hold it more or less often than the "
                          f"others, first number {wrong[0] + 1}. Take the token out of these texts.")  # fmt: skip


def whole_lengths(
    tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, encoded: Sequence[Sequence[int]], max_length: int
) -> list[int]:
    """The tokens of each text, or pair of texts, before truncation; only those that may be cut are tokenised again."""
    lengths = [len(ids) for ids in encoded]
    full = [i for i, length in enumerate(lengths) if length >= max_length]
    if full:
        cut = rows.select(full)
        texts = [list(cut[name]) for name in ("text", "text_pair") if name in cut.column_names]
        for i, ids in zip(full, tokenizer(*texts)["input_ids"], strict=True):
            lengths[i] = len(ids)
    return lengths


def separates_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a token between the two texts of a pair; GPT-2's does not."""
    ids, alone = tokenizer("a", "a")["input_ids"], tokenizer("a")["input_ids"]
    return len(ids) > 2 * len(alone) - tokenizer.num_special_tokens_to_add(pair=False)


def _takes_token_types(config: PretrainedConfig) -> bool:
    """Whether the classifier's forward takes token_type_ids (BERT's does, DistilBERT's does not)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS

    if type(config) in CLASSIFIERS:
        return "token_type_ids" in inspect.signature(CLASSIFIERS[type(config)].forward).parameters
    return getattr(config, "type_vocab_size", 0) > 1  # a class of the repository's own code
