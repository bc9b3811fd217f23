"""Runs of two ranks under `accelerate launch`, and their comparison with those of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas
import psutil
import torch
from safetensors.torch import load_file

from peft_recipes.distributed.launch import launch_files
from peft_recipes.runs.folder import run_folder


def launch(root, name, config, jobs, check=True, **variables):
    """Run the jobs under `accelerate launch`, which must leave no process behind."""
    file = root / f"{name}.json"
    file.write_text(json.dumps(jobs))
    script = str(Path(__file__).with_name("distributed_runs.py"))
    command = ["-m", "accelerate.commands.launch", "--config_file", str(launch_files()[config]), script, str(file)]
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=300)
    left = [p for p in psutil.process_iter(["cmdline"]) if str(file) in (p.info["cmdline"] or [])]
    assert left == []
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def run_of(root, output, recipe, arm):
    from peft_recipes.runs.folder import read_run

    return read_run(run_folder(root / output, recipe, arm, 0))


def assert_same(first, second):
    """Assert the same losses of each step, final weights and predictions, to 1e-5, and the same counts."""
    one, two = first.data["training"], second.data["training"]
    assert [s for s, _ in one["losses"]] == [s for s, _ in two["losses"]]
    torch.testing.assert_close(
        torch.tensor([loss for _, loss in one["losses"]]), torch.tensor([loss for _, loss in two["losses"]]),
        rtol=0, atol=1e-5,
    )  # fmt: skip
    for key in ("steps", "tokens", "examples"):
        assert one[key] == two[key], key
    for file in first.folder.glob("*.safetensors"):
        if file.name.startswith("verification"):
            continue
        ours, theirs = load_file(file), load_file(second.folder / file.name)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5)
            assert theirs[name].abs().sum() > 0 or tensor.abs().sum() == 0, name
    tables = [pandas.read_parquet(run.folder / "predictions.parquet") for run in (first, second)]
    assert list(tables[0]["id"]) == list(tables[1]["id"]) and not tables[1].duplicated(["split", "id"]).any()
    pandas.testing.assert_frame_equal(*tables, check_exact=False, rtol=0, atol=1e-5)
