"""torch.compile as an option: the same losses, and an adapter that loads without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


def run_of(recipe, folder, **training):
    """Return run.json of lora, trained in its own process: torch.compile changes global settings."""
    recipe.with_changes({"training": training}).to_yaml(folder / "mine.yaml")
    command = [sys.executable, "-m", "peft_recipes", "train", "mine.yaml", "--arm", "lora", "--output", ".", "--json"]
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_compiled_run_has_the_same_losses(instruct, tmp_path):
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    for folder in (plain, compiled):
        folder.mkdir()
    one, two = run_of(instruct(), plain), run_of(instruct(), compiled, torch_compile=True)
    losses = [[loss for _, loss in run["training"]["losses"]] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert two["metrics"]["test"]["loss"] == pytest.approx(one["metrics"]["test"]["loss"], rel=1e-4)
    assert two["checks"]["reload"] < 1e-4 and two["checkpoint_bytes"] == one["checkpoint_bytes"]
