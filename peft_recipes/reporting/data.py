"""What was trained on, as rows and sentences: for the terminal (`peft-recipes data`) and a comparison's report."""

from __future__ import annotations

from typing import Any

from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import plain


def split_rows(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A table of the splits: its header, and a row for each."""
    splits = data["splits"]
    has_lengths = any(split["lengths"] for split in splits.values())
    has_labels = any(split["labelled_tokens"] is not None for split in splits.values())
    header = ["split", "rows", "examples"]
    if has_lengths:
        header += ["tokens: least", "median", "95 %", "most", "truncated"]
    if has_labels:
        header += ["labelled tokens", "cut"]
    rows = []
    for name, split in splits.items():
        row = [name, _count(split["rows"]), fmt.count(split["examples"])]
        if has_lengths:
            lengths = split["lengths"] or {}
            row += [_count(lengths.get(key)) for key in ("min", "median", "p95", "max")]
            row.append(fmt.count(split["truncated"]))
        if has_labels:
            row += [_count(split["labelled_tokens"]), fmt.count(split["labelled_tokens_cut"])]
        rows.append(row)
    return header, rows


def truncation_line(data: dict[str, Any]) -> str | None:
    """What max_length costs the training examples, in one sentence; None if none is longer."""
    train = data["splits"]["train"]
    if not train["truncated"]:
        return None
    total = (train["labelled_tokens"] or 0) + train["labelled_tokens_cut"]
    cost = ""
    if train["labelled_tokens_cut"]:
        cut = train["labelled_tokens_cut"]
        cost = f", which costs {fmt.count(cut)} of {fmt.count(total)} labelled tokens ({fmt.percent(cut / total)})"
    return (
        f"{fmt.count(train['truncated'])} training examples have more than max_length {data['max_length']:,} tokens"
        f"{cost}. The longest has {train['lengths']['max']:,}."
    )


def duplicate_lines(data: dict[str, Any]) -> list[str]:
    """Which splits repeat examples, in themselves or of a later split."""
    lines = []
    for name, split in data["splits"].items():
        if split.get("repeated"):
            count = split["repeated"]
            lines.append(f"{_examples(count)} of {name} {'repeats' if count == 1 else 'repeat'} another one of it.")
        for other, count in (split.get("also_in") or {}).items():
            also = (
                f"{'is' if count == 1 else 'are'} also in {other}, as the model sees {'it' if count == 1 else 'them'}"
            )
            lines.append(f"{_examples(count)} of {name} {also}.")
    return lines


def _examples(count: int) -> str:
    return "1 example" if count == 1 else f"{fmt.count(count)} examples"


def _count(value: float | None) -> str:
    return "-" if value is None else fmt.count(value)


def section(comparison: dict[str, Any]) -> dict[str, Any] | None:
    """The section of a report: variables for its template; None for a comparison that did not store its data."""
    data = comparison.get("data")
    if not data:
        return None
    header, rows = split_rows(data)
    bins = data["splits"]["train"]["histogram"] or []
    most = max((one["examples"] for one in bins), default=1)
    classes = data["splits"]["train"]["classes"] or {}
    return {
        "header": header,
        "rows": rows,
        "lines": [line for line in (truncation_line(data), *duplicate_lines(data)) if line],
        "bins": [
            {
                "label": f"{one['from']:,} to {one['to']:,}",
                "share": round(one["examples"] / most, 3),
                "count": fmt.count(one["examples"]),
                "cut": one["from"] > data["max_length"],
            }
            for one in bins
        ],
        "splits": list(data["splits"]),
        "classes": [
            (plain(name), [fmt.count((split["classes"] or {}).get(name, 0)) for split in data["splits"].values()])
            for name in classes
        ],
        "examples": [_plain(example) for example in data.get("examples", [])],
        "marks": any(part["labelled"] for example in data.get("examples", []) for part in example["parts"]),
    }


def _plain(value: Any) -> Any:
    """An example without control characters in its texts."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return plain(value) if isinstance(value, str) else value
