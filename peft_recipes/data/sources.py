"""Load a recipe's `Dataset` from the Hub, local files or embedded stand-ins, and split it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from peft_recipes.data.cells import typed
from peft_recipes.data.columns import column_values
from peft_recipes.data.reading import read_file, read_splits
from peft_recipes.errors import RecipeError, nearest, unknown
from peft_recipes.recipe.dataset import Dataset

if TYPE_CHECKING:
    import datasets

__all__ = ["load_splits", "load_test", "missing_column", "read_file", "read_splits"]

# Names of a dataset's own splits, the usual one first.
USUAL_SPLITS = {"validation": ("validation", "valid", "val", "dev"), "test": ("test", "eval", "evaluation")}


def load_splits(source: Dataset, notes: list[str] | None = None) -> dict[str, datasets.Dataset]:
    """Load the splits "train", "validation", "test" ("pretrain" too, where set), each with an `id` column.

    The splits depend on `source` alone, never on a run's seed: every arm and every seed gets the same ones. Rows are
    shuffled with `source.seed` first, as many datasets are sorted by label (IMDB is). A test or validation split is the
    one that `source` names, else the dataset's own, else cut from train. notes: gets which splits of the dataset are
    used, and what is not read.
    Raises RecipeError: a missing or empty dataset, an impossible split or size, a broken line in a file.
    """
    notes = [] if notes is None else notes
    raw = typed(read_splits(source, notes), source)
    single = len(raw) == 1
    train = next(iter(raw)) if single else source.train_split
    named: dict[str, str | None] = {"train": train, "validation": source.validation_split, "test": source.test_split}
    for split, name in named.items():
        if single and split != "train":
            named[split] = None
        elif name is not None and name not in raw:
            raise RecipeError(unknown("split", name, raw, f"dataset '{source.path}'") + f" Set dataset.{split}_split.")
    own = {} if single else _own_splits(raw, named, source, notes)
    pool = _shuffled(_with_ids(raw[train], train), source)
    splits: dict[str, datasets.Dataset] = {}
    for split in ("validation", "test"):
        name = own.get(split) or named[split]
        if name is not None and name != train:
            rows = _shuffled(_with_ids(raw[name], name), source)
            splits[split] = rows.select(range(_size_of(split, len(rows), source, at_most=split in own)))
    if source.pretrain:
        count = _count(source.pretrain, len(pool), len(pool), "pretrain", source)
        splits["pretrain"], pool = pool.select(range(count)), pool.select(range(count, len(pool)))
    splits |= _cut(pool, [s for s in ("train", "validation", "test") if s not in splits], _rescaled(source, own))
    return {split: splits[split] for split in ("pretrain", "train", "validation", "test") if split in splits}


def load_test(source: Dataset, notes: list[str] | None = None, at_most: bool = False) -> datasets.Dataset:
    """Load a further evaluation set: the split that `source` names, the dataset's own test or validation split, or its
    only one; without blank texts.

    Nothing is held back for training. at_most: `source.test` is the size of another set's test split, so a share does
    not apply and a number is a limit. Raises RecipeError as `load_splits` does.
    """
    notes = [] if notes is None else notes
    raw = typed(read_splits(source, notes), source)
    name = next(iter(raw)) if len(raw) == 1 else source.test_split
    if name is None:
        usual = [own for own in (*USUAL_SPLITS["test"], *USUAL_SPLITS["validation"]) if own in raw]
        name = next((own for own in usual if _has_labels(raw[own], None, source)), "test")
        if name in raw:
            notes.append(f"'{source.path}' is evaluated on its split '{name}' ({len(raw[name])} examples).")
    if name not in raw:
        raise RecipeError(unknown("split", name, raw, f"dataset '{source.path}'") + " Set its test_split.")
    rows = _shuffled(_with_ids(raw[name], name), source)
    for column in source.text_columns:
        if column in rows.column_names:
            texts = rows[column]
            rows = rows.select([i for i, text in enumerate(texts) if not isinstance(text, str) or text.strip()])
    return rows.select(range(_size_of("test", len(rows), source, at_most)))


def _own_splits(
    raw: dict[str, datasets.Dataset], named: dict[str, str | None], source: Dataset, notes: list[str]
) -> dict[str, str]:
    """The dataset's own splits for the test and validation splits that the recipe does not name; notes say which."""
    own: dict[str, str] = {}
    for split, usual in USUAL_SPLITS.items():
        if named[split] is not None:
            continue
        for name in (name for name in usual if name in raw and name not in named.values()):
            cut = f"--set dataset.{split}_split={source.train_split}"
            if not _has_labels(raw[name], raw[named["train"]], source):
                notes.append(f"The dataset's split '{name}' has no labels and is not used: the {split} split is cut "
                             f"from '{named['train']}'.")  # fmt: skip
                continue
            own[split] = name
            count = _size_of(split, len(raw[name]), source, at_most=True)
            shown = f"{count} of its {len(raw[name])}" if count < len(raw[name]) else f"all {count}"
            notes.append(f"The {split} split is the dataset's own split '{name}' ({shown} examples). {cut} cuts it "
                         f"from '{source.train_split}' instead.")  # fmt: skip
            break
    return own


def _has_labels(rows: datasets.Dataset, train: datasets.Dataset | None, source: Dataset) -> bool:
    """Whether a split has what is learnt: unlabelled test splits lack it, or have -1 or nothing in each row."""
    usual = ("output", "answer", "response", "target", "conversations")
    columns = (source.label, source.completion, source.chosen, source.messages, *usual)
    learnt = [name for name in columns if name in (rows if train is None else train).column_names]
    return all(
        name in rows.column_names and any(v not in (None, -1, "") for v in column_values(rows, name)) for name in learnt
    )


def _size_of(split: str, total: int, source: Dataset, at_most: bool) -> int:
    """The number of rows of a split that the source has.

    at_most: all, or as many as `source` says if there are more; a share says how much of train to cut off.
    """
    size = getattr(source, split)
    if not at_most:
        return _count(size, total, total, split, source)
    return total if size is None or size < 1 else min(int(size), total)


def _rescaled(source: Dataset, own: dict[str, str]) -> Dataset:
    """The shares of what is cut from train, where all shares add up to one and some splits are the dataset's own."""
    shares = {split: getattr(source, split) for split in ("train", "validation", "test")}
    if not own or not all(isinstance(share, float) and share < 1 for share in shares.values()):
        return source
    if abs(sum(shares.values()) - 1) > 1e-9:
        return source
    left = {split: share for split, share in shares.items() if split not in own}
    if len(left) == 1:
        return replace(source, train=None)
    return replace(source, **{split: round(share / sum(left.values()), 9) for split, share in left.items()})


def _cut(pool: datasets.Dataset, splits: list[str], source: Dataset) -> dict[str, datasets.Dataset]:
    """Cut one shuffled pool into `splits`; those without a size share the rest equally."""
    total, sizes = len(pool), {}
    for split in splits:
        if getattr(source, split) is not None:
            sizes[split] = _count(getattr(source, split), total, total - sum(sizes.values()), split, source)
    rest, unsized = total - sum(sizes.values()), [s for s in splits if s not in sizes]
    for i, split in enumerate(unsized):
        sizes[split] = rest // len(unsized) + (0 if i else rest % len(unsized))
    shares = [getattr(source, s) for s in splits]
    if all(isinstance(s, float) and s < 1 for s in shares) and abs(sum(shares) - 1) < 1e-9:
        sizes[splits[-1]] += total - sum(sizes.values())  # the rows that rounding down left over
    cut, start = {}, 0
    for split in splits:
        if sizes[split] < 1:
            raise RecipeError(f"dataset '{source.path}' has {total} rows: none is left for {split}.")
        cut[split] = pool.select(range(start, start + sizes[split]))
        start += sizes[split]
    return cut


def _count(size: int | float | None, total: int, left: int, split: str, source: Dataset) -> int:
    """The number of rows of a split whose size is a count, a share of `total`, or None for all that are left."""
    if size is None:
        return left
    count = int(total * size) if size < 1 else int(size)
    if size < 1 and count < 1:
        raise RecipeError(
            f"dataset '{source.path}' has {total} rows, too few for a {split} split of {size:g} of them: {split} would "
            "be empty."
        )
    if count > left or count < 1:
        raise RecipeError(
            f"dataset '{source.path}' has {total} rows, {left} of them left for {split}, and dataset.{split} asks for "
            f"{size:g}. Set fewer rows or a share: --set dataset.{split}={0.2 if split != 'train' else 0.7}."
        )
    return count


def _with_ids(rows: datasets.Dataset, split: str) -> datasets.Dataset:
    if not len(rows):
        raise RecipeError(f"The dataset's split '{split}' is empty: it has no rows.")
    if "id" in rows.column_names:
        rows = rows.remove_columns("id")
    return rows.add_column("id", [f"{split}-{i}" for i in range(len(rows))])


def _shuffled(rows: datasets.Dataset, source: Dataset) -> datasets.Dataset:
    """The rows in random order, and with `source.balance` as many of each class."""
    rows = rows.shuffle(seed=source.seed)
    if not source.balance:
        return rows
    if source.label not in rows.column_names:
        raise RecipeError(missing_column(source.label, "label", rows.column_names, source.path))
    by_class: dict[object, list[int]] = {}
    for i, label in enumerate(column_values(rows, source.label)):
        if isinstance(label, list):
            raise RecipeError(
                f"dataset '{source.path}': dataset.balance needs one class per example; '{source.label}' holds lists."
            )
        by_class.setdefault(label, []).append(i)
    smallest = min(len(indices) for indices in by_class.values())
    # Shuffled again, as the kept rows of a common class come before the last ones of a rare class.
    return rows.select([i for indices in by_class.values() for i in indices[:smallest]]).shuffle(seed=source.seed)


def missing_column(column: str, key: str, columns: list[str], path: str) -> str:
    """The message for a missing column: the nearest, all that exist, and how to name another."""
    names = [name for name in columns if name != "id"]
    return (
        f"dataset '{path}' has no column '{column}'.{nearest(column, names)} It has: {', '.join(names)}. "
        f"Name the right one with --set dataset.{key}=COLUMN."
    )
