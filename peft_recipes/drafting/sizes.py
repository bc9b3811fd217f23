"""How much of a dataset is for training, validation and testing, and how long its examples are."""

from __future__ import annotations

from typing import Any

from peft_recipes.data import sources
from peft_recipes.data.prepared import Prepared
from peft_recipes.errors import RecipeError
from peft_recipes.inspection.summary import percentile
from peft_recipes.recipe.dataset import Dataset

MOST_TEST, MOST_VALIDATION = 1_000, 500  # examples: enough for an interval of a few points, and soon evaluated
FEWEST = 4  # rows: one to train on, one for validation, two for the interval of a difference
NO_LIMIT = 8_192  # tokens of an example at most, for a base without a limit of its own


def read_splits(source: Dataset) -> dict[str, Any]:
    """The splits of a source as they are, before any is cut. Raises RecipeError if it can't be read."""
    return sources.read_splits(source, [])


def split_fields(raw: dict[str, Any], label: str | None, path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields of `Dataset` that set the splits, and why. raw: the source's splits; label: its column of labels."""
    names = list(raw)
    train = "train" if "train" in raw or len(raw) > 1 else names[0]
    if train not in raw:
        raise RecipeError(
            f"dataset '{path}' has the splits {', '.join(names)}, and none is 'train'. Name it: --train-split SPLIT."
        )
    fields: dict[str, Any] = {} if train == "train" else {"train_split": train}
    why: dict[str, str] = {}
    total, single = len(raw[train]), len(raw) == 1
    test = None if single else _own(raw, sources.USUAL_SPLITS["test"], label)
    validation = None if single else _own(raw, sources.USUAL_SPLITS["validation"], label)
    if not single and test is None and validation is not None:  # GLUE's test splits have no labels
        test, validation = validation, None
        why["test"] = f"its own split '{test}', as no other one has labels"
    for split, own, most, share in (("validation", validation, MOST_VALIDATION, 0.1), ("test", test, MOST_TEST, 0.2)):
        if own:
            rows = len(raw[own])
            fields |= {f"{split}_split": own, split: most if rows > most else None}
            why.setdefault(split, f"{f'{most:,} of ' if rows > most else ''}the {rows:,} rows of its own split")
        else:
            fields[split], why[split] = _cut(total, most, share, split, path)
    return fields, why


def _own(raw: dict[str, Any], names: tuple[str, ...], label: str | None) -> str | None:
    """The first of these splits that exists and has labels."""
    for name in names:
        if name in raw and len(raw[name]):
            labels = raw[name][label] if label in raw[name].column_names else []
            if not len(labels) or not all(value in (-1, None) for value in labels[:100]):
                return name
    return None


def _cut(total: int, most: int, share: float, split: str, path: str) -> tuple[int | float, str]:
    """The size of a split that is cut from `total` rows: a share, at most `most`, at least what an interval needs."""
    if total < FEWEST:
        raise RecipeError(
            f"dataset '{path}' has {total} rows: {FEWEST} are the fewest that a comparison can be made with (one to "
            "train on, one for validation, two for the test)."
        )
    fewest = 1 if split == "validation" else 2
    if total * share > most:
        return most, f"of {total:,} rows"
    if int(total * share) < fewest:
        return fewest, f"of {total:,} rows, which are few: expect a wide interval"
    return share, f"{int(total * share):,} of {total:,} rows"


def longest(positions: int | None, tokenizer: Any) -> int:
    """The most tokens that an example may have: the base's positions, or the tokenizer's limit where it has none."""
    if positions:
        return positions
    limit = getattr(tokenizer, "model_max_length", None)
    return min(limit, NO_LIMIT) if isinstance(limit, int) and limit > 1 else NO_LIMIT


def max_length_of(prepared: Prepared, limit: int) -> tuple[int, str]:
    """max_length, and why: the 95th percentile of the lengths, rounded up, at most the base's positions."""
    lengths = prepared.whole["train"]["tokens"] if prepared.whole else []
    if not lengths:  # prompts of grpo, whose answers have no length yet
        prompts = [len(row["prompt_ids"]) for rows in prepared.prompts.values() for row in rows]
        lengths = [2 * length + 64 for length in prompts]
    share = percentile(lengths, 0.95)
    rounded = min(rounded_up(share), limit)
    longer = sum(length > rounded for length in lengths)
    cut = f"; {longer:,} of {len(lengths):,} examples are longer" if longer else "; no example is longer"
    if rounded < share:
        return rounded, f"all positions of the base; 95 % of the examples have up to {share:,} tokens{cut}"
    return rounded, f"95 % of the examples have up to {share:,} tokens{cut}"


def rounded_up(length: float) -> int:
    """The next multiple of 8 (to 128), 16 (to 512) or 64: sizes that kernels like, close to what is needed."""
    step = 8 if length <= 128 else 16 if length <= 512 else 64
    return max(int(-(-length // step) * step), 16)
