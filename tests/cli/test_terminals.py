"""Terminals without UTF-8, full disks, and libraries that talk: one line each, or none."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest
import typer
from rich.console import Console
from safetensors import SafetensorError

from peft_recipes.cli.common import handle_errors, show
from peft_recipes.distributed.quiet import quiet_libraries


def printed(monkeypatch, encoding, function):
    """What a command prints to a terminal of that encoding."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        handle_errors(function)()
    return stream.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_table_is_printed_where_the_terminal_lacks_its_characters(monkeypatch, encoding):
    text = printed(monkeypatch, encoding, lambda: Console(width=40).print("▼ worse ± 0.5 │ 模型"))
    assert "worse" in text and "0.5" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_json_keeps_its_text_where_the_terminal_lacks_it(monkeypatch, encoding):
    text = printed(monkeypatch, encoding, lambda: show(True, {"text": "模型"}, print, ensure_ascii=False))
    assert json.loads(text) == {"text": "模型"}


@pytest.mark.parametrize("error", [
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    OSError(28, "No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc:595] . PytorchStreamWriter failed: file write failed"),
])  # fmt: skip
def test_a_full_disk_is_one_line_whichever_library_writes(capsys, error):
    def write():
        raise error

    with pytest.raises(typer.Exit) as ended:
        handle_errors(write)()
    assert ended.value.exit_code == 1
    assert "the disk is full" in capsys.readouterr().err


def test_other_errors_are_not_taken_for_a_full_disk():
    def fail():
        raise ValueError("anything else")

    with pytest.raises(ValueError, match="anything else"):
        handle_errors(fail)()


def test_bitsandbytes_does_not_talk_where_it_is_only_imported():
    quiet_libraries()
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


def test_an_error_that_is_its_own_cause_is_no_full_disk():
    from peft_recipes.runs.checkpoints import disk_full

    error = FloatingPointError("The loss is nan")
    error.__cause__ = error
    assert not disk_full(error)
