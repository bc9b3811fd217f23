"""`peft-recipes serve`: its start, its end on a signal, and what it refuses before it starts."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import urllib.request

import pytest
from saved_adapters import lora, saved
from typer.testing import CliRunner

from peft_recipes.cli.app import app
from peft_recipes.errors import RecipeError
from peft_recipes.serving.names import Given, served_names
from peft_recipes.serving.server import Server, read_key


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return saved(tiny("llama"), tmp_path_factory.mktemp("command") / "mine", lora())


def serve(*words):
    return CliRunner().invoke(app, ["serve", *map(str, words)])


@pytest.mark.parametrize(("number", "code", "line"), [(signal.SIGTERM, 0, "Ended."),
                                                      (signal.SIGINT, 130, "Ended by Ctrl-C.")])  # fmt: skip
def test_it_answers_until_a_signal_and_ends_with_one_line(folder, monkeypatch, number, code, line):
    run, answers = Server.run, []

    def ask_and_end(server: Server) -> None:
        body = json.dumps({"model": "mine", "prompt": "say good", "max_tokens": 3}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.url}/completions", body, headers)
        try:
            answers.append(json.load(urllib.request.urlopen(request, timeout=30)))
        finally:
            os.kill(os.getpid(), number)

    def run_and_ask(server: Server, on_ready) -> None:
        def ready() -> None:
            on_ready()
            threading.Thread(target=ask_and_end, args=(server,)).start()

        run(server, ready)

    monkeypatch.setattr(Server, "run", run_and_ask)
    done = serve(folder, "--port", "0")
    assert answers and answers[0]["usage"]["completion_tokens"] <= 3
    assert done.exit_code == code and done.stderr.splitlines()[1:] == [line], done.stderr
    assert "mine at http://127.0.0.1:" in done.stderr


def test_what_can_not_be_served_is_refused_in_one_line(tiny, folder, tmp_path, monkeypatch):
    classifier = saved(tiny("distilbert"), tmp_path / "classes",
                       lora(target_modules=["q_lin"], task_type="SEQ_CLS"), labels=2)  # fmt: skip
    other = saved(tiny("gpt2"), tmp_path / "other", lora(target_modules=["c_attn"], fan_in_fan_out=True))
    import transformers

    encoding = saved(tiny("t5"), tmp_path / "t5", lora(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"),
                     auto_class=transformers.AutoModelForSeq2SeqLM)  # fmt: skip
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    empty = tmp_path / "key"
    empty.touch()
    wrong = {
        (tmp_path / "nothing",): "is no folder",
        ("org/nothing",): "adapter 'org/nothing'",
        (classifier,): "it writes no text: use `predict`",
        (folder, other): "Adapters of one base only",
        (encoding,): "encoder-decoder, which `serve` does not take",
        (folder, folder): "mine': name them apart, NAME=ADAPTER",
        (f"a={folder}", f"b={folder}"): "is given twice",
        (f"base={folder}",): "'base' is the base",
        (f"={folder}",): "expected a folder, a repository id, or NAME=ADAPTER",
        (folder, "--port", taken.getsockname()[1]): "is not available (Address already in use)",
        (folder, "--host", "no.such.host.invalid"): "is not available",
        (folder, "--api-key-file", empty): "is empty",
        (folder, "--api-key-file", tmp_path / "nothing"): "can't be read: No such file",
    }
    for words, message in wrong.items():
        done = serve(*words, *([] if "--port" in words else ["--port", "0"]))
        assert done.exit_code == 2, (words, done.stderr)
        assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1, (words, done.stderr)
    taken.close()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'peft_recipes[serve]'" in serve(folder).stderr


def test_names_are_the_run_the_folder_the_repository_or_the_given_one(tmp_path):
    runs = [tmp_path / "a" / "lora" / "seed-0", tmp_path / "a" / "lora" / "seed-1", tmp_path / "b" / "lora" / "seed-0"]
    for run in runs:
        run.mkdir(parents=True)
        (run / "recipe.yaml").touch()
    a0, a1, b0 = (Given(str(run)) for run in runs)
    assert served_names([a0, b0, Given("org/adapter")]) == ["a/lora", "b/lora", "org/adapter"]
    assert served_names([a0, a1]) == ["a/lora/seed-0", "a/lora/seed-1"]
    assert Given.parse(f"x={runs[0]}") == Given(str(runs[0]), "x")
    (tmp_path / "with=sign").mkdir()
    assert Given.parse(str(tmp_path / "with=sign")) == Given(str(tmp_path / "with=sign"))
    with pytest.raises(RecipeError, match="Two adapters have the name 'x'"):
        served_names([Given("p", "x"), Given("q", "x")])


def test_the_key_is_read_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_RECIPES_API_KEY", "from-the-environment")
    assert read_key(None) == "from-the-environment"
    (tmp_path / "key").write_text("from-a-file\n")
    assert read_key(tmp_path / "key") == "from-a-file"
    monkeypatch.delenv("PEFT_RECIPES_API_KEY")
    assert read_key(None) is None
