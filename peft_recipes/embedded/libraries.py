"""Source files and syntax trees of the documented libraries; nothing is imported or run."""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib.util
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

# Dependencies of torch or datasets, so the same versions give the same rows on every machine. "." is the complete
# library, or with other folders its top-level files: parsing 5 MB of source takes a second, so only the folders that
# most people read are taken from the largest libraries.
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
PYTHON = "python"  # the standard library, used like a library's name
_SKIPPED_FOLDERS = {
    *("tests", "test", "testing", "_testing", "benchmarks", "sandbox", "_vendor", "__pycache__"),
    *("f2py", "idlelib", "lib2to3", "turtledemo", "ensurepip", "distutils", "pydoc_data"),
}
_SKIPPED_MODULES = {"antigravity", "this", "turtle", "conftest", "setup", "__main__", "__phello__"}


def installed() -> list[str]:
    """Return the installed ones of `LIBRARIES`, sorted."""
    return [library for library in sorted(LIBRARIES) if importlib.util.find_spec(library)]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries: they determine the rows."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {PYTHON: python} | {library: metadata.version(library) for library in installed()}


def syntax_trees(library: str) -> Iterator[tuple[str, str, ast.Module]]:
    """Yield (dotted module name, source, syntax tree) of each file that this Python can parse."""
    for name, file in _source_files(library):
        try:
            source = file.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in the libraries' strings
                tree = ast.parse(source)
        except (SyntaxError, ValueError, OSError):
            continue  # a template, or written for another Python
        yield name, source, tree


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Turn off garbage collection, two thirds of the time to parse: syntax trees are many objects without cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _source_files(library: str) -> Iterator[tuple[str, Path]]:
    """Yield (dotted module name, file) in sorted order, without tests; a package's own file ends in `.__init__`."""
    if library == PYTHON:
        root = Path(sysconfig.get_paths()["stdlib"])
        names = sorted(name for name in sys.stdlib_module_names if not name.startswith("_"))
        groups = [[*root.glob(f"{name}.py"), *(root / name).glob("**/*.py")] for name in names]
    else:
        folder = Path(next(iter(importlib.util.find_spec(library).submodule_search_locations)))
        root, folders = folder.parent, LIBRARIES[library]
        groups = [(folder / name).glob("*.py" if name == "." and len(folders) > 1 else "**/*.py") for name in folders]
    for file in (file for group in groups for file in sorted(group)):
        parts = file.relative_to(root).with_suffix("").parts
        if not _SKIPPED_FOLDERS & set(parts) and parts[-1] not in _SKIPPED_MODULES:
            yield ".".join(parts), file
