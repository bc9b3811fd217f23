"""Words: a text split into words, and the words of sentences encoded with their first pieces found.

A word is labelled, and predicted, at its first piece.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

# As the pre-tokenizers of BERT and CoNLL's annotators have it: a run of letters, digits and underscores, or a mark.
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Encoded:
    """One sentence: its token ids, with special tokens, and for each word the position of its first piece.

    first: None for a word without a piece: one behind max_length, or one that the tokenizer removes (a control
    character).
    """

    input_ids: list[int]
    first: list[int | None]

    @property
    def cut(self) -> int:
        """Words at the end of the sentence that have no piece."""
        last = max((i for i, position in enumerate(self.first) if position is not None), default=-1)
        return len(self.first) - last - 1


def words_of(text: str) -> list[tuple[int, int]]:
    """Start and end of each word of a text, in characters."""
    return [match.span() for match in _WORD.finditer(text)]


def spaces_of(text: str, words: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether white space is in front of each word of a text; False for the first."""
    return [start > 0 and i > 0 and text[start - 1].isspace() for i, (start, _) in enumerate(words)]


def check_fast(tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """Raise RecipeError for a slow tokenizer, which does not tell which word a piece belongs to."""
    if not tokenizer.is_fast:
        raise RecipeError(
            f"model '{model}': its tokenizer ({type(tokenizer).__name__}) has no fast version, so its pieces can't be "
            "assigned to words. Choose a base whose tokenizer has a tokenizer.json."
        )


def encode(
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[Sequence[str]],
    spaces: Sequence[Sequence[bool]],
    max_length: int,
) -> list[Encoded]:
    """Encode sentences of words, truncated at max_length tokens.

    spaces: whether white space is in front of each word. A byte-level BPE (GPT-2, RoBERTa, Llama 3) takes it as part of
    the word, so there the words are encoded with it, as in running text.
    """
    if not sentences:
        return []
    encoded = tokenizer(
        _spaced(tokenizer, sentences, spaces), is_split_into_words=True, truncation=True, max_length=max_length
    )
    ids = encoded["input_ids"]
    return [Encoded(ids[i], _first_pieces(encoded.word_ids(i), len(words))) for i, words in enumerate(sentences)]


def whole_lengths(tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, encoded: Sequence[Encoded]) -> list[int]:
    """The tokens of each sentence before truncation; only those with words cut are tokenised again."""
    lengths = [len(sentence.input_ids) for sentence in encoded]
    cut = [i for i, sentence in enumerate(encoded) if sentence.cut]
    if cut:
        given = rows.select(cut)
        whole = tokenizer(_spaced(tokenizer, given["words"], given["spaces"]), is_split_into_words=True)
        for i, ids in zip(cut, whole["input_ids"], strict=True):
            lengths[i] = len(ids)
    return lengths


def windows(
    tokenizer: PreTrainedTokenizerBase, sentence: Sequence[str], spaces: Sequence[bool], max_length: int
) -> list[Encoded]:
    """Encode one sentence of words in consecutive windows of at most max_length tokens, so that nothing is cut.

    The first piece of each word is in exactly one of them.
    """
    encoded = tokenizer(
        _spaced(tokenizer, [sentence], [spaces]), is_split_into_words=True, truncation=True, max_length=max_length,
        return_overflowing_tokens=True,
    )  # fmt: skip
    found: set[int] = set()
    result = []
    for i, ids in enumerate(encoded["input_ids"]):
        first = _first_pieces(encoded.word_ids(i), len(sentence))
        first = [None if word in found else position for word, position in enumerate(first)]
        found |= {word for word, position in enumerate(first) if position is not None}
        result.append(Encoded(ids, first))
    return result


def _first_pieces(word_ids: Sequence[int | None], count: int) -> list[int | None]:
    first: list[int | None] = [None] * count
    for position, word in enumerate(word_ids):
        if word is not None and first[word] is None:
            first[word] = position
    return first


def _spaced(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[Sequence[str]], spaces: Sequence[Sequence[bool]]
) -> list[list[str]]:
    if not _takes_spaces(tokenizer):
        return [list(words) for words in sentences]
    return [
        [f" {word}" if space else word for word, space in zip(words, before, strict=True)]
        for words, before in zip(sentences, spaces, strict=True)
    ]


def _takes_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether words have to be given with the space in front of them to be encoded as in running text.

    `add_prefix_space=True` is transformers' way, which a tokenizer that is read from its tokenizer.json ignores.
    """

    def ids(given: Any) -> list[int]:
        return tokenizer(given, is_split_into_words=not isinstance(given, str), add_special_tokens=False)["input_ids"]

    text = ids("a a")
    return ids(["a", "a"]) != text and ids(["a", " a"]) == text
