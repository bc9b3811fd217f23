"""What the README shows is what the files say, and its commands are real."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from peft_recipes import load_recipe, read_comparison
from peft_recipes.cli.app import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
KEPT = ROOT / "adapters" / "mnist-shift"


@pytest.fixture(scope="module")
def writer():
    spec = importlib.util.spec_from_file_location("write_readme", ROOT / "adapters" / "write_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figures_are_those_of_the_kept_comparison(writer):
    kept = read_comparison(KEPT).data
    assert writer.readme(README, kept) == README
    assert kept["differences"]["lora"]["ci95"] and len(kept["seeds"]) == 3
    assert (ROOT / "adapters" / "README.md").read_text(encoding="utf-8") == writer.index(writer.kept())
    measured = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert writer.with_cost(measured) == measured and "| 16 | 128 |" in measured


def test_the_plot_and_the_links_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_a_kept_adapter_is_whole_and_its_bytes_are_those_in_the_table():
    arms = read_comparison(KEPT).data["arms"]
    for name, arm in arms.items():
        if name == "full":
            continue
        folder = KEPT / arm["folder"]
        files = ["head.safetensors"] if name == "head" else ["adapter_model.safetensors", "adapter_config.json"]
        stored = sum((folder / file).stat().st_size for file in files)
        # Since the measurement the module of the small CNN, which adapter_config.json names, has moved into `models`.
        moved = "peft_recipes.models.small_cnn" in (folder / files[-1]).read_text(errors="ignore")
        assert stored - moved * len("models.") == arm["checkpoint_bytes"]
        with safe_open(folder / files[0], "pt") as tensors:
            sizes = [tensors.get_tensor(key).numel() for key in tensors.keys()]  # noqa: SIM118
        assert sum(sizes) == arm["trainable_parameters"]
    assert not list(KEPT.rglob("model.safetensors")) or not (ROOT / ".git").exists() or _ignored()


def _ignored() -> bool:
    import subprocess

    tracked = subprocess.run(["git", "ls-files", str(KEPT)], cwd=ROOT, capture_output=True, text=True, check=True)
    return not any(line.endswith("/model.safetensors") for line in tracked.stdout.splitlines())


def test_every_command_and_flag_of_the_readme_exists():
    lines = [
        line.split("#")[0] for line in README.replace("\\\n", " ").splitlines() if line.startswith("peft-recipes ")
    ]
    assert len(lines) >= 6
    for line in lines:
        words = line.split()
        help_text = CliRunner().invoke(app, [words[1], "--help"], terminal_width=200).output
        assert "Usage" in help_text, line
        assert all(flag in help_text for flag in words if flag.startswith("--")), line


def test_the_settings_of_the_readme_can_be_made():
    for line in README.replace("\\\n", " ").splitlines():
        if line.startswith("peft-recipes compare") and "--set" in line:
            words = line.split()
            load_recipe(words[2], changes=[words[i + 1] for i, word in enumerate(words) if word == "--set"])


def test_the_recipe_that_is_shown_is_a_recipe():
    code = re.search(r"```python\n(from peft import.*?)```", README, re.DOTALL)[1]
    space: dict = {"__name__": "shown"}
    exec(code, space)
    shipped = load_recipe("gpt2-sms-spam")
    assert space["recipe"].arms == shipped.arms and space["recipe"].model == shipped.model
