"""What columns mean: raw rows made into text and label, prompt and completion, or text alone; held against the task."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from peft_recipes.data.sources import missing_column
from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    import datasets

    from peft_recipes.recipe.dataset import Dataset

# The prompt of the Alpaca project, for a base whose tokenizer has no chat template.
PLAIN_PROMPT = "### Instruction:\n{prompt}\n\n### Response:\n"

_FORMATS = {
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}


def class_labels(splits: dict[str, datasets.Dataset], source: Dataset) -> list[str]:
    """The class names in the order of their numbers, from the data itself or from `source.labels`.

    Raises RecipeError: no label column, a label that is neither a whole number nor text, names that don't agree.
    """
    from datasets import ClassLabel

    train = splits["train"]
    if source.label not in train.column_names:
        raise RecipeError(missing_column(source.label, "label", train.column_names, source.path))
    feature = train.features[source.label]
    if isinstance(feature, ClassLabel):
        if source.labels and [n.lower() for n in source.labels] != [n.lower() for n in feature.names]:
            raise RecipeError(
                f"dataset '{source.path}' names its classes {', '.join(feature.names)}; dataset.labels says "
                f"{', '.join(source.labels)}. Leave it out: --set dataset.labels=null."
            )
        return list(source.labels or feature.names)
    seen: dict[Any, str] = {}
    for rows in splits.values():
        for row, value in zip(rows["id"], rows[source.label], strict=True):
            if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
                raise RecipeError(
                    f"dataset '{source.path}', row {row}, column '{source.label}': a label is a whole number or text, "
                    f"got {value!r} ({type(value).__name__})."
                )
            seen.setdefault(value, row)
    if source.labels:
        strange = [v for v in seen if _number(v, source.labels) is None]
        if strange:
            raise RecipeError(
                f"dataset '{source.path}', row {seen[strange[0]]}: label {strange[0]!r} is not one of dataset.labels: "
                f"{', '.join(source.labels)}."
            )
        return list(source.labels)
    if all(isinstance(v, int) for v in seen):
        if min(seen) < 0 or max(seen) > 9_999:
            raise RecipeError(
                f"dataset '{source.path}': labels run from {min(seen)} to {max(seen)}; expected 0, 1, ..."
            )
        return [str(i) for i in sorted(seen)]
    return sorted(str(v) for v in seen)


def _number(value: Any, labels: list[str]) -> int | None:
    """The class of a label: by its name, or a whole number by its place where the names are no numbers themselves."""
    if str(value) in labels:
        return labels.index(str(value))
    by_place = isinstance(value, int) and not all(label.isdigit() for label in labels)
    return value if by_place and 0 <= value < len(labels) else None


def classification_rows(rows: datasets.Dataset, source: Dataset, column: str, labels: list[str]) -> datasets.Dataset:
    """Rows with exactly `id`, `column` ("text" or "image") and `label` (a number). Raises RecipeError with the row."""
    from datasets import ClassLabel

    name = getattr(source, column)
    if name not in rows.column_names:
        raise RecipeError(missing_column(name, column, rows.column_names, source.path))
    own = isinstance(rows.features[source.label], ClassLabel)  # then values are places already
    made = [value if own else _number(value, labels) for value in rows[source.label]]
    for row, number in zip(rows["id"], made, strict=True):
        if number is None or not 0 <= number < len(labels):
            raise RecipeError(
                f"dataset '{source.path}', row {row}: label {number} is outside 0 to {len(labels) - 1} "
                f"({', '.join(labels)})."
            )
    if column == "text":
        check_text(rows, name, source.path)
    kept = rows.select_columns(["id", name]).rename_columns({name: column} if name != column else {})
    return kept.add_column("label", made)


def check_text(rows: datasets.Dataset, column: str, path: str) -> None:
    """Raises RecipeError for the first value of a column that is not text, with its row."""
    for row, value in zip(rows["id"], rows[column], strict=True):
        if not isinstance(value, str):
            raise RecipeError(
                f"dataset '{path}', row {row}, column '{column}': expected text, got {value!r} "
                f"({type(value).__name__})."
            )


def _needed(source: Dataset) -> dict[str, tuple[str, ...]]:
    return {**_FORMATS, "text": (source.text,)}


def sft_format(columns: list[str], source: Dataset) -> str:
    """Which of the SFT formats these columns are, or what `source.format` says. Raises RecipeError if none fits."""
    if source.format:
        needed = _needed(source)[source.format]
        missing = [c for c in needed if c not in columns]
        if missing:
            raise RecipeError(
                f"dataset '{source.path}' has no column '{missing[0]}', which the format '{source.format}' needs "
                f"({', '.join(needed)}). Its columns: {', '.join(columns)}."
            )
        return source.format
    for name, needed in _needed(source).items():
        if all(column in columns for column in needed):
            return name
    wanted = "; ".join(f"{name} ({', '.join(needed)})" for name, needed in _needed(source).items())
    raise RecipeError(
        f"dataset '{source.path}' has the columns {', '.join(c for c in columns if c != 'id')}, which is none of the "
        f"formats of supervised fine-tuning: {wanted}."
    )


def sft_rows(rows: datasets.Dataset, source: Dataset, chat: bool) -> tuple[datasets.Dataset, int]:
    """Rows with `id` and `prompt`/`completion` (or `text`), as trl takes them, and how many had an empty answer.

    chat: the tokenizer has a chat template, so prompts are messages; otherwise they are plain text.
    Rows without an answer teach nothing (Alpaca has 28) and are left out.
    """
    kind = sft_format(rows.column_names, source)
    if kind == "text":
        rows, empty = filled(rows, source.text)
        check_text(rows, source.text, source.path)
        renames = {source.text: "text"} if source.text != "text" else {}
        return rows.select_columns(["id", source.text]).rename_columns(renames), empty
    rows, empty = filled(rows, _FORMATS[kind][-1])
    if kind != "messages":
        for column in _FORMATS[kind]:
            if not isinstance(rows[0][column], list):
                check_text(rows, column, source.path)
    made = [_prompt_completion(row, kind, source.path) for row in rows]
    answered = [(i, p, c) for i, (p, c) in enumerate(made) if c.strip()]
    empty += len(made) - len(answered)
    import datasets

    ids = rows["id"]
    built = [{"id": ids[i], **_as_trl(prompt, completion, chat)} for i, prompt, completion in answered]
    if not built:
        raise RecipeError(f"dataset '{source.path}': no row has an answer to learn.")
    return datasets.Dataset.from_list(built), empty


def filled(rows: datasets.Dataset, column: str) -> tuple[datasets.Dataset, int]:
    """The rows that have something in a column, and how many have nothing (what a csv makes of an empty value)."""
    kept = [i for i, value in enumerate(rows[column]) if value is not None]
    return (rows if len(kept) == len(rows) else rows.select(kept)), len(rows) - len(kept)


def _prompt_completion(row: dict[str, Any], kind: str, path: str) -> tuple[list[dict[str, str]], str]:
    """A row as the messages before the answer, and the answer."""
    if kind == "alpaca":
        extra = str(row.get("input") or "")
        text = row["instruction"] + (f"\n\n{extra}" if extra.strip() else "")
        return [{"role": "user", "content": text}], row["output"]
    if kind == "messages":
        messages = said(row["messages"], "messages", row["id"], path)
        if len(messages) < 2 or messages[-1].get("role") != "assistant":
            raise RecipeError(f"dataset '{path}', row {row['id']}: messages must end with an answer of the assistant.")
        return [dict(m) for m in messages[:-1]], messages[-1]["content"]
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list):
        prompt = said(prompt, "prompt", row["id"], path)
    if isinstance(completion, list):
        completion = said(completion, "completion", row["id"], path)
    messages = [dict(m) for m in prompt] if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return messages, completion[-1]["content"] if isinstance(completion, list) else completion


def said(messages: Any, column: str, row: str, path: str) -> list[dict[str, str]]:
    """Messages that are ones. Raises RecipeError with the row where a role or a content is no text."""
    sound = isinstance(messages, list) and all(
        isinstance(m, dict) and all(isinstance(m.get(key), str) for key in ("role", "content")) for m in messages
    )
    if not sound or not messages:
        raise RecipeError(
            f"dataset '{path}', row {row}, column '{column}': expected a list of messages, each with 'role' and "
            f"'content' as text, got {str(messages)[:120]}."
        )
    return messages


def _as_trl(prompt: list[dict[str, str]], completion: str, chat: bool) -> dict[str, Any]:
    if chat:
        return {"prompt": prompt, "completion": [{"role": "assistant", "content": completion}]}
    return {"prompt": plain_prompt("\n\n".join(m["content"] for m in prompt)), "completion": completion}


def plain_prompt(text: str) -> str:
    """A question as a base without a chat template sees it."""
    return PLAIN_PROMPT.format(prompt=text)


def without_test_examples(
    splits: dict[str, datasets.Dataset], columns: list[str]
) -> tuple[dict[str, datasets.Dataset], int]:
    """The splits without the train and validation rows whose `columns` stand in a later split too, and their count.

    IMDB has 123 texts in both train and test, SMS spam 403 exact repeats: a model is not tested on what it learnt.
    """

    def keys(rows: datasets.Dataset) -> list[str]:
        return [json.dumps(values, sort_keys=True) for values in zip(*(rows[c] for c in columns), strict=True)]

    test = set(keys(splits["test"])) if "test" in splits else set()
    kept, dropped = dict(splits), 0
    held_out = test | set(keys(splits["validation"])) if "validation" in splits else test
    for split in ("train", "validation"):
        if split in splits:
            forbidden = held_out if split == "train" else test
            stay = [i for i, key in enumerate(keys(splits[split])) if key not in forbidden]
            dropped += len(splits[split]) - len(stay)
            if not stay:
                raise RecipeError(f"Every {split} example stands in the test split too; nothing is left.")
            kept[split] = splits[split].select(stay)
    return kept, dropped


def fingerprint(splits: dict[str, datasets.Dataset]) -> str:
    """16 hex digits that change when any example of any split does; paths, times and caches don't count."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        digest.update(f"\n{name}:{len(splits[name])}".encode())
        for row in splits[name]:
            plain = {k: _hashable(v) for k, v in row.items()}
            digest.update(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()[:16]


def _hashable(value: Any) -> Any:
    # An image is decoded to PIL; its pixels are what counts, not how the file was compressed.
    return hashlib.sha256(value.tobytes()).hexdigest() if hasattr(value, "tobytes") else value
