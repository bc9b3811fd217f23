"""Read a dataset's splits as they are: a file, a folder, a pattern (`data/*.jsonl`) or the Hub."""

from __future__ import annotations

import glob
import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.data import files, located
from peft_recipes.errors import RecipeError, root_cause
from peft_recipes.models.bases import hub_errors, is_local
from peft_recipes.recipe.addresses import address_problem
from peft_recipes.recipe.dataset import EMBEDDED, Dataset

if TYPE_CHECKING:
    import datasets

_SAVED = ("state.json", "dataset_dict.json")  # of `save_to_disk`


def read_splits(source: Dataset, notes: list[str] | None = None) -> dict[str, datasets.Dataset]:
    """Read all splits of a dataset by name, unchanged. notes: gets what is not read, or is read in an unusual way.

    Raises RecipeError: an address, a missing or empty dataset, a file that is not read, a broken line.
    """
    notes = [] if notes is None else notes
    if source.path.startswith(EMBEDDED):
        from peft_recipes.embedded.stand_ins import dataset

        return dict(dataset(source.path.removeprefix(EMBEDDED)))
    if problem := address_problem(source.path, "dataset.path"):
        raise RecipeError(problem)
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _read_folder(path, source, notes)
    if glob.has_magic(str(path)) and not path.exists():
        return _read_pattern(str(path), source.path, notes)
    if files.format_of(path):
        return read_file(path, notes)
    if is_local(source.path) or path.suffix.lower() in files.COMPRESSED:
        raise located.not_read(path, source)
    return _from_hub(source.path, source, notes)


def read_file(path: Path, notes: list[str] | None = None) -> dict[str, datasets.Dataset]:
    """Read one file of rows. Raises RecipeError: a missing or empty file, a broken line."""
    if not files.format_of(path):
        raise RecipeError(f"dataset file {path}: {files.why_not_read(path)}")
    return {"train": _read_files([path], [] if notes is None else notes)}


def _read_files(paths: list[Path], notes: list[str]) -> datasets.Dataset:
    """Read files as one set of rows. Raises RecipeError, also for files whose columns differ."""
    from datasets import concatenate_datasets

    by_reader: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    for path in paths:
        reader = files.check_file(path)
        by_reader[reader].append(path)
        if reader[0] == "csv" and reader[1] == ";":
            notes.append(f"{path.name} is read with a semicolon between its values.")
    parts = [_READERS[reader[0]](some, *reader[1:]) for reader, some in by_reader.items()]
    if any(reader[0] == "text" for reader in by_reader):
        notes.append("Each line of a .txt file is an example; empty lines are left out.")
    if len(parts) == 1:
        return parts[0]
    columns = {tuple(sorted(part.column_names)) for part in parts}
    if len(columns) > 1:
        shown = "; ".join(
            f"{some[0].name}: {', '.join(p.column_names)}" for p, some in zip(parts, by_reader.values(), strict=True)
        )
        raise RecipeError(f"The files of {paths[0].parent} have different columns ({shown}). Name one of them.")
    try:
        return concatenate_datasets(parts)
    except ValueError as error:
        raise RecipeError(f"The files of {paths[0].parent} don't fit together: {root_cause(error)}") from error


def _read_csv(paths: list[Path], delimiter: str, *columns: str) -> datasets.Dataset:
    """Every cell is text as it is written: None, NA, 011 and True too; an empty cell is empty text."""
    from datasets import Features, Value

    text = Features({name: Value("string") for name in columns})
    options = {"sep": delimiter, "column_names": list(columns), "header": 0, "features": text}
    return _load("csv", paths, keep_default_na=False, encoding="utf-8-sig", **options)


def _read_json(paths: list[Path]) -> datasets.Dataset:
    rows = _load("json", paths)
    return _from_python(paths) if _holds_times(rows.features) or _holds_arguments(rows.features) else rows


def _holds_arguments(feature: Any) -> bool:
    """Whether calls have arguments as objects, to which Arrow gives the keys, order and floats of all rows."""
    if isinstance(feature, dict):
        return isinstance(feature.get("arguments"), dict) or any(map(_holds_arguments, feature.values()))
    inner = getattr(feature, "feature", None)
    return inner is not None and _holds_arguments(inner)


def _holds_times(feature: Any) -> bool:
    """Whether Arrow's reader has taken texts for times ("2024-05-01"), which JSON has none of."""
    if isinstance(feature, dict):
        return any(map(_holds_times, feature.values()))
    inner = getattr(feature, "feature", None)
    return _holds_times(inner) if inner is not None else str(getattr(feature, "dtype", "")).startswith("timestamp")


def _from_python(paths: list[Path]) -> datasets.Dataset:
    """Read JSON files by Python's parser, which leaves texts alone, with the arguments of calls as JSON."""
    from datasets import Dataset as Rows

    rows: list[dict[str, Any]] = []
    for path in paths:
        with files.opened_text(path) as file:
            text = file.read()
        if text.lstrip().startswith("["):
            rows += files.parse_json(text, path)
        else:
            rows += [files.parse_json(line, path, n) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [{name: _arguments_as_json(row.get(name)) for name in columns} for row in rows]
    return Rows.from_list(table, on_mixed_types="use_json")


def _arguments_as_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_arguments_as_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: json.dumps(item, ensure_ascii=False)
        if key == "arguments" and isinstance(item, dict)
        else _arguments_as_json(item)
        for key, item in value.items()
    }


def _read_text(paths: list[Path]) -> datasets.Dataset:
    from datasets import Dataset as Rows

    lines: list[str] = []
    for path in paths:
        with files.opened_text(path) as file:
            lines += [line for line in file.read().splitlines() if line.strip()]
    if not lines:
        raise RecipeError(f"{paths[0]} is empty.")
    return Rows.from_dict({"text": lines})


def _read_parquet(paths: list[Path]) -> datasets.Dataset:
    return _load("parquet", paths)


_READERS: dict[str, Any] = {"csv": _read_csv, "json": _read_json, "parquet": _read_parquet, "text": _read_text}


def _load(reader: str, paths: list[Path], **options: Any) -> datasets.Dataset:
    import datasets

    try:
        return datasets.load_dataset(reader, data_files=[glob.escape(str(p)) for p in paths], **options)["train"]
    except Exception as error:  # datasets wraps what its readers raise
        raise RecipeError(f"dataset file {paths[0]} can't be read: {root_cause(error)}") from error


def _read_pattern(pattern: str, given: str, notes: list[str]) -> dict[str, datasets.Dataset]:
    read = located.matching(pattern, given)
    splits = located.by_split(read, Path(*located.until_magic(Path(pattern).parts)))
    shown = "; ".join(f"{split}: {', '.join(p.name for p in paths)}" for split, paths in splits.items())
    notes.append(f"'{given}' names {len(read)} files ({shown if len(shown) < 200 else ', '.join(splits)}).")
    return {split: _read_files(paths, notes) for split, paths in splits.items()}


def _read_folder(path: Path, source: Dataset, notes: list[str]) -> dict[str, datasets.Dataset]:
    import datasets

    if any((path / name).is_file() for name in _SAVED):
        try:
            loaded = datasets.load_from_disk(str(path))
        except Exception as error:
            raise RecipeError(f"dataset '{source.path}' can't be read: {root_cause(error)}") from error
        return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    inside = [p for p in sorted(path.rglob("*")) if p.is_file() and not located.hidden(p.relative_to(path))]
    read = located.data_files(inside)
    if read is None or source.name or located.configured(path):
        return _from_hub(str(path), source, notes)
    if not read:
        raise RecipeError(
            f"dataset '{source.path}': no file of the folder is read. Files that are read: {files.KINDS}."
        )
    splits = located.by_split(read, path)
    others = [p.name for p in inside if p not in read and p.suffix.lower() not in _BESIDE]
    if others:
        notes.append(
            f"Files of '{source.path}' that are not read: {', '.join(others[:5])}{', ...' * (len(others) > 5)}."
        )
    return {split: _read_files(paths, notes) for split, paths in splits.items()}


_BESIDE = (".md", ".py", ".yaml", ".yml", ".lock", ".license", "")  # beside data, without a note


def _from_hub(name: str, source: Dataset, notes: list[str]) -> dict[str, datasets.Dataset]:
    """Read what `datasets` finds itself: a dataset of the Hub, a folder of images, a folder with a README.md."""
    import datasets

    with hub_errors("dataset", source.path):
        try:
            builder = datasets.load_dataset_builder(name, source.name, revision=source.revision)
            if type(builder).__module__.endswith("packaged_modules.csv.csv") and builder.config.features is None:
                return _csv_of(builder, name, source)
            return dict(datasets.load_dataset(name, source.name, revision=source.revision))
        except datasets.exceptions.DatasetGenerationError as error:
            raise RecipeError(f"dataset '{source.path}' can't be read: {root_cause(error)}") from error


def _csv_of(builder: Any, name: str, source: Dataset) -> dict[str, datasets.Dataset]:
    """The csv files that `datasets` found, with every cell as text."""
    import datasets

    listed = {split: [str(p) for p in paths] for split, paths in builder.config.data_files.items()}
    if all(Path(p).is_file() for paths in listed.values() for p in paths):
        return {split: _read_files([Path(p) for p in paths], []) for split, paths in listed.items()}
    inferred = dict(datasets.load_dataset(name, source.name, revision=source.revision))
    columns = next(iter(inferred.values())).column_names
    text = datasets.Features({column: datasets.Value("string") for column in columns})
    options = {"features": text, "keep_default_na": False, "revision": source.revision}
    return dict(datasets.load_dataset(name, source.name, **options))
