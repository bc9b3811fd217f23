"""The layout of the package: what lies at its top, who imports whom, and the words that it is written in."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import grimp
import pytest
from importlinter.application.use_cases import SUCCESS, lint_imports
from importlinter.configuration import configure

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_recipes"
PACKAGES = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))

# Words of an earlier style, with what to write instead. Readers of transformers and PEFT stumble over them.
PRIVATE_WORDS = {
    r"held against": "compared with",
    r"stands? beside": "is next to, is shown with",
    r"heeds?": "handles",
    r"whatever becomes of": "whether or not ... succeeds",
    r"what it brought": "its new weights",
    r"(is|are|was) told": "say what happens: reports, warns, prints, raises",
    r"told by": "determined from",
    r"(can't|can not|to) be had": "is not available",
    r"vocabulary head": "LM head",
    r"shared rows?": "prefix-shared packing",
    r"the main process": "rank 0",
    r"the other processes": "the other ranks",
}


def test_only_packages_and_four_modules_are_at_the_top():
    modules = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert modules == {"__init__.py", "__main__.py", "errors.py", "py.typed"}


def test_packages_import_downwards_and_in_no_circle(monkeypatch):
    monkeypatch.chdir(ROOT)
    configure()
    assert lint_imports(config_filename="pyproject.toml", cache_dir=None) == SUCCESS


def test_the_longest_chain_of_package_imports_is_at_most_12():
    graph = grimp.build_graph("peft_recipes", cache_dir=None)
    for package in PACKAGES:
        graph.squash_module(f"peft_recipes.{package.name}")

    @functools.cache
    def chain(module: str) -> int:
        return 1 + max(map(chain, graph.find_modules_directly_imported_by(module)), default=0)

    assert max(chain(f"peft_recipes.{package.name}") for package in PACKAGES) - 1 <= 12  # without errors.py


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_says_what_is_in_it_and_holds_no_code(package):
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    assert len(tree.body) == 1 and len(ast.get_docstring(tree).splitlines()) > 1


@pytest.mark.parametrize("word", PRIVATE_WORDS)
def test_private_words_do_not_come_back(word):
    pattern = re.compile(rf"\b{word}\b", re.IGNORECASE)
    files = [
        path for folder in ("peft_recipes", "recipes", "benchmarks", "docs") for path in (ROOT / folder).rglob("*")
    ]
    files += [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in files
        if path.suffix in (".py", ".md", ".j2", ".yml", ".yaml")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"write {PRIVATE_WORDS[word]!r} instead:\n" + "\n".join(found)
