"""Malformed inputs give the right exit code and one message with the location, no traceback, and change no file."""

from __future__ import annotations

import pytest
from malformed_cases import CASES
from typer.testing import CliRunner

from peft_recipes import train
from peft_recipes.cli.app import app


@pytest.fixture(scope="session")
def valid(tmp_path_factory):
    return {"root": tmp_path_factory.mktemp("valid")}


@pytest.fixture
def inputs(valid, classify, tiny):
    """A valid recipe, a valid adapter and another base, built once."""
    if "adapter" not in valid:
        root = valid["root"]
        classify().to_yaml(root / "classify.yaml")
        valid |= {"classify": root / "classify.yaml", "gpt2": tiny("gpt2")}
        valid["adapter"] = train(classify(), "lora", output=root / "runs").folder
    return valid


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}: {case.name}")
def test_a_malformed_input_gives_one_clear_message(case, inputs, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "given").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    arguments = case.make(tmp_path / "given", inputs)
    before = sorted(p for p in tmp_path.rglob("*"))
    result = CliRunner().invoke(app, arguments)
    text = " ".join((result.stdout + result.stderr).split())
    assert (result.exit_code, case.message in text) == (case.code, True), text[-800:]
    assert "Traceback" not in text
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_there_are_at_least_150_distinct_cases():
    assert len({(case.kind, case.name) for case in CASES}) == len(CASES) >= 150
