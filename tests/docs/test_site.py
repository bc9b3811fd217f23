"""The site builds strictly, and nothing public is missing from it."""

from __future__ import annotations

import dataclasses
import re
import sys

import pytest
from blocks import PAGES, ROOT

import peft_recipes
from peft_recipes import Arm, Dataset, Recipe
from peft_recipes.arms.methods import METHODS
from peft_recipes.catalog.recipes import recipe_files
from peft_recipes.models.architecture_table import ARCHITECTURES
from peft_recipes.recipe.options import GUARDS, TASKS

sys.path.append(str(ROOT / "docs"))
import write_reference


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. One build for the tests below."""
    mkdocs = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    mkdocs.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def test_it_builds_with_every_page_report_and_plot(site):
    for path in PAGES:
        if path.is_relative_to(ROOT / "docs"):
            assert (site / path.relative_to(ROOT / "docs").with_suffix(".html")).is_file(), path
    for folder in (ROOT / "adapters").glob("*/comparison.json"):
        name = folder.parent.name
        assert (site / "gallery" / name / "comparison.html").is_file()
        assert (site / "gallery" / name / "plots" / "parameters.png").is_file()
        assert f"{name}/comparison.html" in (site / "gallery" / f"{name}.html").read_text(encoding="utf-8")
    assert not list(site.rglob("*.py"))
    for path in site.rglob("*.html"):
        for source in re.findall(r'<img [^>]*src="([^":]+)"', path.read_text(encoding="utf-8")):
            assert (path.parent / source).is_file(), f"{path}: {source}"


def test_it_loads_nothing_from_elsewhere(site):
    loaded = r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)|<link[^>]+rel="stylesheet"[^>]+href="(https?:[^"]+)'
    for path in site.rglob("*.html"):
        if path.name != "comparison.html":
            assert not re.findall(loaded, path.read_text(encoding="utf-8")), path


def test_every_public_name_is_documented_in_the_code_and_on_the_site(site):
    assert write_reference.undocumented() == []
    text = (site / "reference" / "python.html").read_text() + (site / "reference" / "recipe.html").read_text()
    for name in peft_recipes.__all__:
        assert re.search(rf'id="peft_recipes\.[\w.]*\b{name}"', text), name


def test_every_command_and_option_is_on_the_site(site):
    from typer.main import get_command

    from peft_recipes.cli.app import app

    text = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    for name, command in get_command(app).commands.items():
        assert f'<h2 id="{name}">' in text, name
        section = text.split(f'<h2 id="{name}">')[1].split("<h2 ")[0]
        for option in command.params:
            assert option.name == "help" or all(f"<code>{flag}</code>" in section for flag in option.opts
                                                if flag.startswith("--")), (name, option.opts)  # fmt: skip


@pytest.mark.parametrize("kind", [Recipe, Dataset, Arm])
def test_every_field_of_a_recipe_is_described(kind):
    text = kind.__doc__ + page("docs/reference/recipe.md")
    for field in dataclasses.fields(kind):
        assert re.search(rf"\b{field.name}\b", text), field.name


def test_tables_written_by_hand_name_what_the_code_has():
    assert set(re.findall(r"^\| `([\w-]+)` \|", page("docs/concepts/guards.md"), re.MULTILINE)) == set(GUARDS)
    started = re.findall(r"^\| `([\w-]+)` \|", page("docs/get-started.md"), re.MULTILINE)
    assert set(started) == set(recipe_files())
    assert set(TASKS) <= set(re.findall(r"`([\w-]+)`", page("docs/guides/your-data.md")))
    assert set(re.findall(r"^\| `([\w-]+)` \|", page("docs/methods.md"), re.MULTILINE)) == set(METHODS)


def test_the_table_of_architectures_has_every_row():
    text = write_reference.architectures()
    assert all(f"| `{name}` |" in text for name in ARCHITECTURES)


def test_the_packages_are_listed_from_top_to_bottom_as_the_import_rule_has_them():
    listed = re.findall(r"^\| `(\w+)` \| ", page("docs/contributing.md"), re.MULTILINE)
    folders = {path.parent.name for path in (ROOT / "peft_recipes").glob("*/__init__.py")}
    assert set(listed) == folders | {"errors"} and len(listed) == len(set(listed))
    order = re.search(r"```text\n(cli publishing.*?)```", page("CONTRIBUTING.md"), re.DOTALL)[1].split()
    assert order == listed


def test_links_from_one_page_to_another_or_to_a_file_lead_somewhere():
    for path in PAGES:
        for target in re.findall(r'(?:\]\(|src=")([^)#"\s]+)', path.read_text(encoding="utf-8")):
            assert target.startswith("http") or (path.parent / target).exists(), f"{path}: {target}"
