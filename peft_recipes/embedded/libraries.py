"""Which source files the documented libraries have, and their syntax trees: nothing is imported, nothing is run."""

from __future__ import annotations

import ast
import gc
import importlib.util
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

# Each of these comes with torch or with datasets, so the same versions give the same rows on every machine.
# "." alone is the whole library, among others the files of its top folder; of the largest libraries only the parts that
# most people read, because a second parses about 5 MB of source.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "networkx": (".",),
    "numpy": (".",),
    "pandas": (".",),
    "sympy": (
        *(".", "calculus", "combinatorics", "concrete", "core", "functions", "geometry", "integrals", "logic"),
        *("matrices", "ntheory", "series", "sets", "simplify", "solvers", "stats", "tensor", "vector"),
    ),
    "torch": (
        *(".", "amp", "autograd", "backends", "cuda", "distributed", "distributions", "fft", "func", "futures", "jit"),
        *("linalg", "masked", "nested", "nn", "optim", "package", "profiler", "signal", "sparse", "special", "utils"),
    ),
}
PYTHON = "python"  # the standard library, where a library's name is asked for
_SKIPPED_FOLDERS = {
    *("tests", "test", "testing", "_testing", "benchmarks", "sandbox", "_vendor", "__pycache__"),
    *("f2py", "idlelib", "lib2to3", "turtledemo", "ensurepip", "distutils", "pydoc_data"),
}
_SKIPPED_MODULES = {"antigravity", "this", "turtle", "conftest", "setup", "__main__", "__phello__"}


def installed() -> list[str]:
    """The documented libraries that are there, in sorted order."""
    return [library for library in sorted(LIBRARIES) if importlib.util.find_spec(library)]


def versions() -> dict[str, str]:
    """What decides the rows: the versions of Python and of the documented libraries."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {PYTHON: python} | {library: metadata.version(library) for library in installed()}


def source_files(library: str) -> list[tuple[str, Path]]:
    """(dotted module name, file) in sorted order, without tests and jokes; a package's own file keeps `.__init__`."""
    if library == PYTHON:
        root = Path(sysconfig.get_paths()["stdlib"])
        names = sorted(name for name in sys.stdlib_module_names if not name.startswith("_"))
        found = [[*root.glob(f"{name}.py"), *(root / name).glob("**/*.py")] for name in names]
    else:
        folder = Path(next(iter(importlib.util.find_spec(library).submodule_search_locations)))
        root, parts = folder.parent, LIBRARIES[library]
        found = [(folder / part).glob("*.py" if part == "." and len(parts) > 1 else "**/*.py") for part in parts]
    files = [(file.relative_to(root).with_suffix("").parts, file) for group in found for file in sorted(group)]
    return [(".".join(parts), file) for parts, file in files if not _skipped(parts)]


def syntax_trees(library: str) -> Iterator[tuple[str, str, ast.Module]]:
    """(dotted module name, source, syntax tree) of each file of `source_files` that this Python can parse."""
    for name, file in source_files(library):
        try:
            source = file.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in other people's strings
                tree = ast.parse(source)
        except (SyntaxError, ValueError, OSError):
            continue  # a template, or written for another Python
        yield name, source, tree


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Syntax trees are millions of small objects without cycles: collecting would take two thirds of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _skipped(parts: tuple[str, ...]) -> bool:
    return bool(_SKIPPED_FOLDERS & set(parts)) or parts[-1] in _SKIPPED_MODULES
