"""The playground in a real process, through gradio's client and a headless browser."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess

import pytest
from comparison_fixture import image_comparison
from saved_adapters import lora, saved
from small import tokenizer
from tagged import base_with, tag_recipe, tagged, wordpiece, written
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from warm_python import warm

from peft_recipes import train
from peft_recipes.adapters.open import open_adapters
from peft_recipes.cli.app import app
from peft_recipes.inference.playground_evidence import evidence_markdown

gradio_client = pytest.importorskip("gradio_client", reason="gradio is not installed (the extra `playground`)")
pytest.importorskip("gradio", reason="gradio is not installed (the extra `playground`)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


# The command line in a process that reports and blocks every request to another machine.
GUARDED = """
import socket, sys
OWN = (None, "", "127.0.0.1", "localhost", "::1")
connect, look_up = socket.socket.connect, socket.getaddrinfo
def guarded_connect(self, place):
    if isinstance(place, tuple) and place[0] not in OWN:
        print("ASKED", place, flush=True)
        raise OSError("no other machine is asked")
    return connect(self, place)
def guarded_look_up(host, *rest, **more):
    if host not in OWN:
        print("ASKED", host, flush=True)
    return look_up(host, *rest, **more)
socket.socket.connect, socket.getaddrinfo = guarded_connect, guarded_look_up
from peft_recipes.cli.app import app
app(sys.argv[1:])
"""


@pytest.fixture
def served(tmp_path):
    """served(folder, ...) -> the address of a playground process; it may contact no other machine."""
    opened = []

    def start(*folders):
        port = free_port()
        words = warm("-c", GUARDED, "playground", *map(str, folders), "--port", str(port))
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                                   env=os.environ | {"GRADIO_TEMP_DIR": str(tmp_path / "gradio")})  # fmt: skip
        opened.append(process)
        line = process.stdout.readline()
        assert line.startswith(f"http://127.0.0.1:{port}"), line + process.stderr.read()
        return line.split()[0]

    yield start
    for process in opened:
        process.terminate()
        rest, _ = process.communicate()
        assert "ASKED" not in rest


@pytest.fixture(scope="module")
def writers(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("writers")
    AutoModelForCausalLM.from_pretrained(tiny("llama")).save_pretrained(root / "base")
    tokenizer(chat=True).save_pretrained(root / "base")
    return [saved(root / "base", root / name, lora(), seed) for seed, name in enumerate(["first", "second"])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")
    from browser import Browser

    opened = Browser(CHROMIUM, tmp_path / "browser")
    yield opened
    opened.close()


# JavaScript that types text into a field and clicks a button, once they are there.
TYPED = """(() => {{ const field = document.querySelector('#{0} textarea');
    Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set.call(field, '{1}');
    return field.dispatchEvent(new Event('input', {{bubbles: true}})) }})()"""
CLICKED = "document.querySelector('button#ask').click() === undefined"
PAGE = "document.body.innerText"


def test_language_models_answer_next_to_each_other(served, writers, browser):
    address = served(*writers)
    client = gradio_client.Client(address, verbose=False, analytics_enabled=False)
    texts = client.predict("good film", 6, 0, 1, 0, api_name="/ask")
    command = ["generate", *map(str, writers), "--prompt", "good film", "--max-new-tokens", "6", "--json"]
    wanted = json.loads(CliRunner().invoke(app, command).stdout)[0]["answers"]
    assert list(texts[0::2]) == [wanted[name]["text"] for name in ("base", "first", "second")]
    assert all("tokens/s" in speed for speed in texts[1::2])
    with pytest.raises(Exception, match="Write a prompt first"):
        client.predict(" ", 6, 0, 1, 0, api_name="/ask")
    answered = "document.querySelector('#answer-second textarea').value"
    answer, page = browser.visit(address, [TYPED.format("prompt", "good film"), CLICKED, answered, PAGE])[2:]
    assert answer == client.predict("good film", 96, 0, 1, 0, api_name="/ask")[4]
    for words in ("Temperature", "tokens/s", "nothing is known of it"):
        assert words in page, words
    own = (f"{address}/", "data:", "blob:", "about:")  # nothing is loaded from elsewhere, not even a font
    assert len(browser.requests) > 3 and [place for place in browser.requests if not place.startswith(own)] == []
    with socket.socket() as other, pytest.raises(OSError):  # it listens on 127.0.0.1 only
        other.connect(("127.0.0.2", int(address.rpartition(":")[2])))


def test_a_classifier_shows_probabilities_and_its_evidence(served, classify, runs, browser):
    folder = train(classify(), "lora", output=runs).folder
    address = served(folder)
    answer = gradio_client.Client(address, verbose=False).predict("good lovely film", api_name="/ask")
    answer = answer[0] if isinstance(answer, (list, tuple)) else answer  # one adapter, one answer: its head is its own
    wanted = CliRunner().invoke(app, ["predict", str(folder), "--text", "good lovely film", "--json"])
    assert answer["label"] == json.loads(wanted.stdout)[0]["label"]
    assert {row["label"] for row in answer["confidences"]} == {"good", "bad"}
    shown = "document.querySelector('#answer-lora').innerText.includes('%')"
    page = browser.visit(address, [TYPED.format("text", "good lovely film"), CLICKED, shown, PAGE])[3]
    accuracy = json.loads((folder / "run.json").read_text())["metrics"]["test"]["accuracy"]
    for words in ("Evidence", "test accuracy", f"{100 * accuracy:.1f} %", "Latency, merged", answer["label"]):
        assert words in page, words


def test_a_tagger_marks_the_entities_of_a_text(served, tmp_path):
    base = base_with(wordpiece(), "distilbert", tmp_path / "base")
    folder = train(tag_recipe(base, written(tmp_path / "rows.jsonl", tagged(160))), "lora", output=tmp_path).folder
    text = "we saw splendid bright films"
    answer = gradio_client.Client(served(folder), verbose=False).predict(text, api_name="/ask")
    answer = answer[0] if isinstance(answer, tuple) else answer
    shown = CliRunner().invoke(app, ["predict", str(folder), "--text", text, "--json"]).stdout
    wanted = json.loads(shown)[0]["entities"]
    marked = [(part["token"], part["class_or_confidence"]) for part in answer if part["class_or_confidence"]]
    assert marked == [(entity["text"], entity["label"]) for entity in wanted] and wanted


def test_two_seeds_of_an_arm_have_a_column_each_and_one_verdict(served, classify, tmp_path, browser):
    recipe = classify(training={"max_steps": 1})
    folders = [train(recipe, "lora", seed=seed, output=tmp_path).folder for seed in (0, 1)]
    (folders[0].parent.parent / "comparison.json").write_text(json.dumps(image_comparison()))
    assert evidence_markdown(open_adapters(folders)).count("\n\n> ") == 1
    edge = "document.querySelector('{}').getBoundingClientRect().right"
    fits = f"{edge.format('#evidence table')} <= Math.min({edge.format('#evidence')}, innerWidth) + 1 ? 'yes' : 'no'"
    there = "document.querySelector('#evidence table') !== null"
    _, page, shown = browser.visit(served(*folders), [there, PAGE, fits])
    assert "Against full" in page and "lora-seed-1" in page and shown == "yes"


def test_user_mistakes(writers, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for words, message in (
            ([writers[0], "--port", taken.getsockname()[1]], "is not available"),
            ([tmp_path], "no adapter"),
            ([writers[0], writers[0]], "given twice"),
        ):
            done = CliRunner().invoke(app, ["playground", *map(str, words)])
            assert done.exit_code == 2 and message in " ".join(done.stderr.split()), done.stderr


def test_the_evidence_is_the_runs_own(classify, runs):
    folder = train(classify(), "lora", output=runs, resume=True).folder
    run = json.loads((folder / "run.json").read_text())
    markdown = evidence_markdown(open_adapters([folder]))
    assert f"{100 * run['metrics']['test']['accuracy']:.1f} %" in markdown
    assert f"{run['parameters']['trainable']:,}" in markdown and "Latency, adapter" in markdown
