"""Messages when the Hub fails: the real client over HTTP, in its own process, with a small local Hub."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hub_server import Fault, Hub

TOKEN = "hf_this_token_is_marked_and_must_not_show"


@pytest.fixture
def hub(tiny, tmp_path):
    import shutil

    shutil.copytree(tiny("distilbert"), tmp_path / "hub" / "some" / "tiny")
    with Hub(tmp_path / "hub") as running:
        yield running


@pytest.fixture
def command(classify, tmp_path, hub):
    """Run peft-recipes WORDS on a recipe whose base is some/tiny (or another) on that Hub, with a marked token."""

    def run(*words: str, model: str = "some/tiny", url: str | None = None, seconds: float = 5):
        classify(training={"max_steps": 2, "use_cpu": True, "eval_strategy": "no"}).with_changes(
            {"model": model}
        ).to_yaml(tmp_path / "mine.yaml")
        environment = {
            **os.environ,
            "HF_ENDPOINT": url or hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": str(seconds),
            "HF_HUB_ETAG_TIMEOUT": str(seconds),
        }
        line = [sys.executable, "-m", "peft_recipes", words[0], str(tmp_path / "mine.yaml"), *words[1:]]
        done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=tmp_path)
        done.message = " ".join(done.stderr.split())
        assert TOKEN not in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr
        return done

    return run


def test_a_run_from_the_hub_leaves_no_token_anywhere(command, hub, tmp_path):
    done = command("train", "--arm", "lora")
    assert done.returncode == 0, done.stderr
    assert any(authorization == f"Bearer {TOKEN}" for *_, authorization in hub.requests)  # the token was used
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


def test_the_token_is_in_no_process_list(classify, tmp_path, monkeypatch):
    """A comparison's workers get the token from the environment, never from their command lines."""
    import psutil

    from peft_recipes import compare

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    seen = []

    def look(_):
        seen.extend(" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True))
        if seen:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(classify(), ["head"], output=tmp_path, on_progress=look)
    assert any("peft_recipes.comparison.fork_server" in line for line in seen) and not any(
        TOKEN in line for line in seen
    )


@pytest.mark.parametrize(
    "fault",
    [Fault("config.json", 503, times=2), Fault("config.json", 429, times=1), Fault("config.json", "slow", times=1)],
)
def test_a_temporary_error_is_retried(command, hub, fault):
    hub.faults = [fault]
    done = command("plan", "--arms", "lora")
    assert done.returncode == 0, done.stderr


def test_an_interrupted_download_is_retried(command, hub):
    hub.faults = [Fault("tokenizer.json", "cut", times=1)]
    assert command("plan", "--arms", "lora").returncode == 0


@pytest.mark.parametrize(
    ("fault", "model", "message"),
    [
        (None, "some/tniy", "does not exist on the Hub, or is private"),
        (Fault("some/tiny", 401, code="RepoNotFound"), "some/tiny", "hf auth login"),
        (Fault("some/tiny", 403, code="GatedRepo"), "some/tiny", "is gated"),
        (Fault("config.json", 503), "some/tiny", "answered 503 (Service Unavailable), also after retries"),
    ],
)
def test_a_permanent_error_is_one_message(command, hub, tmp_path, fault, model, message):
    hub.faults = [fault] if fault else []
    done = command("compare", model=model, seconds=1)
    assert done.returncode == 2, done.stderr
    assert message in done.message and model in done.message, done.message
    assert not (tmp_path / "adapters").exists()


def message_for(error, cause, monkeypatch):
    from peft_recipes import RecipeError
    from peft_recipes.models import hub
    from peft_recipes.models.bases import hub_errors

    monkeypatch.setattr(hub, "offline_if_unreachable", lambda: None)
    with pytest.raises(RecipeError) as raised, hub_errors("model", "some/tiny"):
        raise error from cause
    return str(raised.value)


def test_a_hub_that_never_answers_names_the_timeouts(monkeypatch):
    """As transformers raises it after the client's own retries (minutes, which the test does not wait for)."""
    import httpx

    message = message_for(OSError("We couldn't connect to load the files"), httpx.ReadTimeout("timed out"), monkeypatch)
    assert message.startswith("model 'some/tiny': the Hub did not answer in time")
    assert "HF_HUB_ETAG_TIMEOUT=60" in message


def test_a_status_that_http_does_not_define_is_one_message_too(monkeypatch):
    """A proxy in front of the Hub answers with 520 to 527."""
    import httpx

    answer = httpx.Response(520, request=httpx.Request("GET", "https://huggingface.co"))
    cause = httpx.HTTPStatusError("520", request=answer.request, response=answer)
    assert "the Hub answered 520 (no standard status)" in message_for(OSError("no answer"), cause, monkeypatch)


def test_an_unreachable_hub_names_the_flag(command, tmp_path):
    """Immediately, not after the client's minute of retries; cached files still load."""
    done = command("plan", url="http://127.0.0.1:9")
    assert done.returncode == 2 and "can't be reached" in done.message and "--embedded" in done.message
    assert command("plan", "--arms", "lora").returncode == 0
    done = command("plan", "--arms", "lora", url="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
