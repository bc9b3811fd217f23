"""The wheel is complete: recipes are found by name, with templates and metrics, from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The wheel, built and unpacked as pip does."""
    folder = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_file_of_the_package_and_the_recipes(unpacked):
    there = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    for path in (ROOT / "peft_recipes").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in there
    shipped = [p for p in (ROOT / "recipes").rglob("*") if p.suffix in (".py", ".yaml")]
    assert {f"peft_recipes/{p.relative_to(ROOT).as_posix()}" for p in shipped} <= there
    assert not any(name.startswith(("tests/", "benchmarks/", "adapters/")) for name in there)


def test_recipes_are_found_by_name_from_an_empty_folder(unpacked, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(unpacked)}
    code = "import peft_recipes; print(peft_recipes.__file__)"
    where = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert str(unpacked) in where.stdout  # the wheel's, not this checkout's
    command = [sys.executable, "-m", "peft_recipes", "list", "--json"]
    listed = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert len(json.loads(listed.stdout)) >= 5
    code = "from peft_recipes.distributed.launch import launch_files; print(*launch_files())"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert found.stdout.split() == ["ddp", "deepspeed_zero2", "fsdp2"]
    assert list(tmp_path.iterdir()) == []
