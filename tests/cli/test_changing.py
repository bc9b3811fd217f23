"""`peft-recipes stop` and `add` at the command line: one line, and the exit code."""

from __future__ import annotations

import json
import threading

import pytest
from typer.testing import CliRunner

from peft_recipes.cli.app import app
from peft_recipes.comparison import requests
from peft_recipes.comparison.requests import taking_requests
from peft_recipes.runs.lock import locked


@pytest.fixture
def folder(tmp_path):
    """The folder of a comparison that runs, and answers what it is asked."""
    (tmp_path / "tiny").mkdir()
    ended = threading.Event()

    def compare():
        with locked(tmp_path / "tiny"), taking_requests(tmp_path / "tiny") as inbox:
            opened.set()
            while not ended.wait(0.005):
                for request in inbox.take():
                    if request.data["arm"] == "lora":
                        request.answer(json.dumps(request.data, sort_keys=True))
                    else:
                        request.answer(problems=["Unknown arm.", "Another problem."])

    opened, thread = threading.Event(), threading.Thread(target=compare)
    thread.start()
    opened.wait()
    yield tmp_path / "tiny"
    ended.set()
    thread.join()


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_answer_is_one_line(folder):
    stopped = call("stop", folder, "lora")
    assert stopped.exit_code == 0 and json.loads(stopped.stdout) == {"arm": "lora", "do": "stop", "schema": 1}
    added = call("add", folder, "lora", "--set", "peft.r=2", "--set", "learning_rate=1e-3", "--as", "x")
    assert json.loads(added.stdout)["changes"] == ["peft.r=2", "learning_rate=1e-3"]
    assert json.loads(added.stdout)["name"] == "x" and added.stdout.count("\n") == 1 and added.stderr == ""


def test_as_json_it_is_the_request_with_what_was_said(folder):
    document = json.loads(call("add", folder, "lora", "--json").stdout)
    assert (document["do"], document["arm"], document["changes"]) == ("add", "lora", []) and '"lora"' in document[
        "said"
    ]


def test_every_problem_is_listed_with_exit_code_2(folder):
    refused = call("stop", folder, "lorra")
    assert refused.exit_code == 2 and refused.stdout == ""
    assert refused.stderr == "Error: 2 problems.\n  - Unknown arm.\n  - Another problem.\n"


@pytest.mark.parametrize(("words", "instead"), [(["stop"], "--arms alone"), (["add"], "Add the arm to the recipe")])
def test_where_nothing_runs_it_says_what_to_do(tmp_path, words, instead):
    (tmp_path / "idle").mkdir()
    refused = call(*words, tmp_path / "idle", "lora")
    assert refused.exit_code == 2 and "No comparison runs in" in refused.stderr and instead in refused.stderr
    assert refused.stderr.count("\n") == 1 and list((tmp_path / "idle").iterdir()) == []


@pytest.mark.parametrize(("error", "code"), [(requests.Unanswered("It ended."), 1), (KeyboardInterrupt("Gone."), 130)])
def test_a_request_without_an_answer_has_an_exit_code_of_its_own(folder, monkeypatch, error, code):
    def unanswered(*_):
        raise error

    monkeypatch.setattr(requests, "ask", unanswered)
    shown = call("stop", folder, "lora")
    assert shown.exit_code == code and shown.stderr.strip().removeprefix("Error: ") == str(error)


def test_a_stopped_arm_is_taken_up_where_nothing_runs(tmp_path):
    from peft_recipes.comparison.changes import Changes, read_changes

    Changes(tmp_path).stop("lora", "drop", 0, 40, 125)
    shown = call("add", tmp_path, "lora")
    assert shown.exit_code == 0 and "the same command of `compare` goes on with it" in shown.stdout
    assert read_changes(tmp_path).stopped == [] and read_changes(tmp_path).kept == ["lora"]
    again = call("add", tmp_path, "lora")
    assert again.exit_code == 2 and "No comparison runs in" in again.stderr
