"""SKILL.md: its front matter, its length, and that what it names exists. test_commands.py runs its commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from blocks import SKILL
from typer.main import get_command
from typer.testing import CliRunner

from peft_recipes.cli.app import app

TEXT = SKILL.read_text("utf-8")
FRONT = yaml.safe_load(TEXT.split("---\n")[1])


def test_the_front_matter_is_as_the_format_has_it():
    assert FRONT["name"] == SKILL.parent.name and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", FRONT["name"])
    assert len(FRONT["name"]) <= 64 and 20 < len(FRONT["description"]) <= 1024 and "Use when" in FRONT["description"]
    assert set(FRONT) <= {"name", "description", "license", "compatibility", "metadata", "allowed-tools"}


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 150 and max(map(len, TEXT.split("---\n", 2)[2].splitlines())) <= 132


def test_every_option_that_it_names_exists():
    commands = get_command(app).commands
    known = {option for command in commands.values() for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT)) <= known | {"--help"}
    assert set(re.findall(r"peft-recipes ([a-z]+)", TEXT.split("---\n", 2)[2])) <= set(commands)


def test_every_verdict_is_explained():
    from peft_recipes.reporting.sentences import VERDICTS

    table = TEXT.partition("| verdict |")[2].partition("\n\n")[0]
    assert all(verdict in table for verdict in VERDICTS)


def test_the_command_says_where_it_is_prints_it_and_copies_it(tmp_path):
    shown = CliRunner().invoke(app, ["skill"])
    assert shown.exit_code == 0 and Path(shown.stdout.strip()) == SKILL
    assert CliRunner().invoke(app, ["skill", "--print"]).stdout == TEXT
    copied = CliRunner().invoke(app, ["skill", "--output", str(tmp_path / "skills")])
    assert copied.exit_code == 0 and (tmp_path / "skills" / "peft-recipes" / "SKILL.md").read_text("utf-8") == TEXT


@pytest.mark.parametrize("output", ["/dev/null/x", "/proc/x"])
def test_a_folder_that_cannot_be_made_is_one_line_and_exit_code_2(output):
    shown = CliRunner().invoke(app, ["skill", "--output", output])
    assert shown.exit_code == 2 and len(shown.stderr.strip().splitlines()) == 1 and "Traceback" not in shown.stderr
