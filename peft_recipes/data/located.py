"""Which files make which split of a dataset: of a file, a folder or a pattern (`data/*.jsonl`)."""

from __future__ import annotations

import glob
import re
from collections import defaultdict
from pathlib import Path

from peft_recipes.data import files
from peft_recipes.errors import RecipeError
from peft_recipes.models.bases import is_local
from peft_recipes.recipe.dataset import Dataset

# How `datasets` finds the split of a file or folder: a word of its name. The shards of one are NAME-00000-of-00003.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}.*")


def matching(pattern: str, given: str) -> list[Path]:
    """The files of a pattern that are read, by name. Raises RecipeError where there is none."""
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
    read = [path for path in found if files.format_of(path)]
    if not read:
        what = f"no file of its {len(found)} is read" if found else "no file has such a name"
        raise RecipeError(f"dataset '{given}': {what}. Files that are read: {files.KINDS}.")
    return read


def local_files(path: Path, source: Dataset) -> dict[str, list[Path]] | None:
    """The files of each split of a file, folder or pattern, unread. None: for `datasets` to find (the Hub, others)."""
    if path.is_dir():
        inside = [p for p in sorted(path.rglob("*")) if p.is_file() and not hidden(p.relative_to(path))]
        read = data_files(inside)
        return None if not read or source.name or configured(path) else by_split(read, path)
    if glob.has_magic(str(path)) and not path.exists():
        return by_split(matching(str(path), source.path), Path(*until_magic(path.parts)))
    if files.format_of(path):
        return {"train": [path]}
    if is_local(source.path) or path.suffix.lower() in files.COMPRESSED:
        raise not_read(path, source)
    return None


def not_read(path: Path, source: Dataset) -> RecipeError:
    """The error for a local path that is missing or of another kind."""
    there = "is not there" if not path.exists() else "is not read"
    return RecipeError(f"dataset '{source.path}' {there}. {files.why_not_read(path)} Or name a folder of them.")


def until_magic(parts: tuple[str, ...]) -> list[str]:
    """The folders of a pattern before the first one with a wildcard."""
    kept: list[str] = []
    for part in parts[:-1]:
        if glob.has_magic(part):
            break
        kept.append(part)
    return kept


def by_split(paths: list[Path], base: Path) -> dict[str, list[Path]]:
    """The files of each split, by the words in their names or folders; all of them are "train" where none has one."""
    splits: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        splits[_split_of(path.relative_to(base) if path.is_relative_to(base) else path)].append(path)
    unnamed = splits.pop("", [])
    if unnamed:
        splits["train"] = sorted([*splits["train"], *unnamed])
    order = [*_WORDS, *splits]
    return {split: splits[split] for split in dict.fromkeys(order) if splits.get(split)}


def _split_of(path: Path) -> str:
    stem = path.name.partition(".")[0]
    if (shard := _SHARD.fullmatch(path.name)) and path.parent.name == "data":
        return _named(shard[1]) or shard[1]
    for part in (*path.parts[:-1], stem):
        if split := _named(part):
            return split
    return ""


def _named(name: str) -> str | None:
    words = re.split(r"[-._ 0-9]+", name.lower())
    return next((split for split, known in _WORDS.items() if any(word in known for word in words)), None)


_PAGES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")


def data_files(inside: list[Path]) -> list[Path] | None:
    """The files of rows of a folder; .txt only where it has no others. None for a folder of images or the like."""
    from datasets.packaged_modules import _EXTENSION_TO_MODULE

    ours = [p for p in inside if files.format_of(p) and p.name not in _PAGES]
    folders = {module for module, _ in _EXTENSION_TO_MODULE.values() if module.endswith("folder")}
    others = {_EXTENSION_TO_MODULE.get(p.suffix.lower(), ("",))[0] for p in inside}
    if others & {*folders, "webdataset", "arrow"}:
        return None
    return [p for p in ours if files.format_of(p) != "text"] or ours


def hidden(path: Path) -> bool:
    """Whether a file, or a folder that it is in, is hidden or private (.git, __pycache__)."""
    return any(part.startswith((".", "__")) for part in path.parts)


def configured(path: Path) -> bool:
    """Whether the folder's README.md says which files make which split, as on the Hub."""
    readme = path / "README.md"
    if not readme.is_file():
        return False
    head = readme.read_text(encoding="utf-8", errors="replace").partition("\n---")[0]
    return head.startswith("---") and bool(re.search(r"^configs:", head, re.MULTILINE))
