"""Every malformed input: the right exit code, one message that says where, no traceback, nothing written or lost."""

from __future__ import annotations

import pytest
from malformed import CASES
from typer.testing import CliRunner

from peft_recipes import train
from peft_recipes.cli.app import app


@pytest.fixture(scope="session")
def there(tmp_path_factory):
    return {"root": tmp_path_factory.mktemp("there")}


@pytest.fixture
def inputs(there, classify, tiny):
    """A sound recipe, a sound adapter and another base; made once a session."""
    if "adapter" not in there:
        root = there["root"]
        classify().to_yaml(root / "classify.yaml")
        there |= {"classify": root / "classify.yaml", "gpt2": tiny("gpt2")}
        there["adapter"] = train(classify(), "lora", output=root / "runs").folder
    return there


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}: {case.name}")
def test_it_is_answered(case, inputs, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "given").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    words = case.make(tmp_path / "given", inputs)
    before = sorted(p for p in tmp_path.rglob("*"))
    shown = CliRunner().invoke(app, words)
    text = " ".join((shown.stdout + shown.stderr).split())
    assert (shown.exit_code, case.said in text) == (case.code, True), text[-800:]
    assert "Traceback" not in text
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_there_are_enough_of_them():
    assert len({(case.kind, case.name) for case in CASES}) == len(CASES) >= 60
