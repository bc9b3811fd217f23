"""Addresses (https://, hf://) where a path is expected: refused by name, with what to give instead."""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)", re.DOTALL)  # a Path has one slash left of an address' two
_HUB = ("huggingface.co", "www.huggingface.co", "hf.co")


def address_problem(path: str, key: str) -> str | None:
    """Why a path is an address that is not read, and what to do; None for a path. key: its option ("dataset.path")."""
    found = _ADDRESS.fullmatch(path)
    if found is None or len(found[1]) < 2:  # C:/data is a drive
        return None
    kind, rest = found[1].lower(), found[2]
    if kind == "file":
        return f"{key}: '{path}' is an address. Give the path itself: /{rest}."
    name = _hub_name(kind, rest)
    if name and key.endswith(".path"):
        return f"{key}: '{path}' is an address. Give the Hub's name of the dataset: {name}."
    file = rest.rpartition("/")[2].partition("?")[0] or "FILE"
    return (
        f"{key}: '{kind}://{rest}' is an address, and files are not downloaded. Download it, and name the file: {file}."
    )


def _hub_name(kind: str, rest: str) -> str | None:
    """ORG/NAME of a dataset in an address of the Hub."""
    parts = rest.split("?")[0].split("/")
    if kind in ("http", "https") and parts[0] in _HUB:
        parts = parts[1:]
    elif kind != "hf":
        return None
    if len(parts) >= 3 and parts[0] == "datasets":
        return f"{parts[1]}/{parts[2].partition('@')[0]}"
    return None
