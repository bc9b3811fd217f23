"""The rows of a `datasets.Dataset`: the values of a column, and rows made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

_AT_A_TIME = 100  # of decoded images this fits in memory


def column_values(rows: Any, column: str) -> Iterator[Any]:
    """Yield the values of a column. rows: a `datasets.Dataset`, or anything whose columns are sequences.

    Iterating over `rows[column]` itself decodes one row at a time.
    """
    found = rows[column]
    for start in range(0, len(found), _AT_A_TIME):
        yield from found[start : start + _AT_A_TIME]


def map_in_memory(rows: datasets.Dataset, function: Callable[..., Any], **options: Any) -> datasets.Dataset:
    """`rows.map(function, **options)`, kept in memory.

    Under a random fingerprint: the one that `map` computes, for a cache that is not used, pickles the function with its
    tokenizer each time.
    """
    from datasets.fingerprint import generate_random_fingerprint

    fingerprint = generate_random_fingerprint()
    return rows.map(function, keep_in_memory=True, load_from_cache_file=False, new_fingerprint=fingerprint, **options)
