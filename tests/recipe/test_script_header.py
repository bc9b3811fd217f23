"""PEP 723: each recipe module says what it needs, as pyproject.toml has it, and uv runs the file alone."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from warm_python import REAL

from peft_recipes import Recipe, load_recipe
from peft_recipes.recipe.script_header import extras, script_header

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
FILES = sorted((ROOT / "recipes").glob("*.py"))
RECIPES = [file for file in FILES if file.stem != "plain_loop"]  # that one is plain PEFT
# The regular expression of PEP 723.
_BLOCK = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")


def header(text: str) -> dict:
    """The metadata of a script, read as PEP 723 says."""
    (block,) = [found for found in _BLOCK.finditer(text) if found["type"] == "script"]
    lines = block["content"].splitlines(keepends=True)
    return tomllib.loads("".join(line[2:] if line.startswith("# ") else line[1:] for line in lines))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_shipped_file_needs_what_the_project_has(file):
    given = header(file.read_text("utf-8"))
    assert set(given) == {"requires-python", "dependencies"}
    assert given["requires-python"] == PROJECT["requires-python"]
    (package,) = map(Requirement, given["dependencies"])
    assert package.name == PROJECT["name"] and package.extras <= set(PROJECT["optional-dependencies"])
    assert package.specifier == SpecifierSet(f">={PROJECT['version']}")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_it_needs_is_installed_here_in_a_fitting_version(file):
    (package,) = map(Requirement, header(file.read_text("utf-8"))["dependencies"])
    needed = [*PROJECT["dependencies"], *(r for name in package.extras for r in PROJECT["optional-dependencies"][name])]
    for requirement in map(Requirement, needed):
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(importlib.metadata.version(requirement.name)), requirement


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_a_shipped_recipe_names_the_extras_that_its_settings_need(file):
    text, recipe = file.read_text("utf-8"), load_recipe(str(file))
    assert text.startswith(f'# /// script\n# requires-python = "{PROJECT["requires-python"]}"\n')
    (package,) = map(Requirement, header(text)["dependencies"])
    assert sorted(package.extras) == extras(recipe)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"embedded": {"model": "embedded:gpt2-docstrings"}}, ["embedded"]),
        ({"dataset": {"path": "embedded:docstring-topics"}}, ["embedded"]),
        ({"arms": {"lora": {"quantise": "nf4"}}}, ["quantised"]),
        ({"arms": {"full": {"optim": "adamw_bnb_8bit"}}}, ["quantised"]),
        ({"training": {"optim": "paged_adamw_32bit"}}, ["quantised"]),
    ],
)
def test_the_extras_follow_from_the_settings(classify, changes, expected):
    assert extras(classify().with_changes(changes)) == expected


def test_an_endpoint_as_judge_needs_an_extra_and_a_local_one_none():
    plain = load_recipe("smollm2-alpaca").to_dict() | {"metric": "preference", "embedded": {}}
    judges = [{"model": "org/judge"}, {"model": "j", "base_url": "http://localhost:8000/v1"}]
    made = [Recipe.from_dict(plain | {"judge": judge}) for judge in judges]
    assert [extras(recipe) for recipe in made] == [["benchmarks"], ["benchmarks", "judge"]]


def test_the_header_is_that_of_the_installed_package():
    given = header(script_header(["embedded", "judge"]))
    assert given["dependencies"] == [f"peft_recipes[embedded,judge]>={PROJECT['version']}"]
    assert given["requires-python"] == PROJECT["requires-python"]
    assert header(script_header([]))["dependencies"] == [f"peft_recipes>={PROJECT['version']}"]
    assert Version(PROJECT["version"]).local is None


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """A folder with the package's wheel and, for each of its dependencies, an empty wheel of the installed version.

    uv resolves and installs these without a network; the real libraries come from this environment, by PYTHONPATH.
    """
    folder = tmp_path_factory.mktemp("wheels")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    needed = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["embedded"]]
    for requirement in map(Requirement, needed):
        if requirement.marker is None or requirement.marker.evaluate():
            name, version = requirement.name.replace("-", "_"), importlib.metadata.version(requirement.name)
            _empty_wheel(folder, name, version.partition("+")[0])
    return folder


def _empty_wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "".join(f"{info}/{each},,\n" for each in ("METADATA", "WHEEL", "RECORD")))


def test_uv_runs_a_recipe_from_its_file_alone(wheels, tmp_path):
    uv = shutil.which("uv", path=f"{Path(REAL).parent}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        pytest.skip("there is no uv here")
    shutil.copy(ROOT / "recipes" / "mnist_shift.py", tmp_path / "alone.py")
    libraries = importlib.metadata.distribution("torch").locate_file("")
    env = {**os.environ, "PYTHONPATH": str(libraries), "UV_CACHE_DIR": str(tmp_path / "cache"), "UV_NO_CONFIG": "1"}
    small = ["pretraining.num_train_epochs=1", "dataset.pretrain=64", "dataset.train=32", "training.max_steps=2"]
    command = [uv, "run", "--offline", "--no-index", "--find-links", str(wheels), "--python", REAL]
    command += ["alone.py", "--arm", "lora", "--embedded", *(word for each in small for word in ("--set", each))]
    done = subprocess.run([*command, "--json"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    assert json.loads(done.stdout)["recipe"] == "mnist-shift"
    assert (tmp_path / "adapters" / "mnist-shift" / "lora" / "seed-0" / "adapter_model.safetensors").is_file()
