"""What a user reads when the Hub fails; the real client over HTTP, in processes of its own, against a small Hub."""

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
    """peft-recipes WORDS on a recipe whose base is some/tiny (or another) on that Hub, with a token of its own."""

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
        done.said = " ".join(done.stderr.split())
        assert TOKEN not in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr
        return done

    return run


def test_a_run_from_the_hub_leaves_no_token_anywhere(command, hub, tmp_path):
    done = command("train", "--arm", "lora")
    assert done.returncode == 0, done.stderr
    assert any(authorization == f"Bearer {TOKEN}" for *_, authorization in hub.requests)  # it was used
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


def test_the_token_is_in_no_process_list(classify, tmp_path, monkeypatch):
    """A comparison's workers get what they need by the environment, never by their command lines."""
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
    assert any("peft_recipes.comparison.worker" in line for line in seen) and not any(TOKEN in line for line in seen)


@pytest.mark.parametrize(
    "fault",
    [Fault("config.json", 503, times=2), Fault("config.json", 429, times=1), Fault("config.json", "slow", times=1)],
)
def test_what_passes_is_waited_for(command, hub, fault):
    hub.faults = [fault]
    done = command("plan", "--arms", "lora")
    assert done.returncode == 0, done.stderr


def test_a_download_that_is_cut_once_goes_on(command, hub):
    hub.faults = [Fault("tokenizer.json", "cut", times=1)]
    assert command("plan", "--arms", "lora").returncode == 0


@pytest.mark.parametrize(
    ("fault", "model", "said"),
    [
        (None, "some/tniy", "does not exist on the Hub, or is private"),
        (Fault("some/tiny", 401, code="RepoNotFound"), "some/tiny", "hf auth login"),
        (Fault("some/tiny", 403, code="GatedRepo"), "some/tiny", "is gated"),
        (Fault("config.json", 503), "some/tiny", "answered 503 (Service Unavailable), also when asked again"),
    ],
)
def test_what_does_not_pass_is_one_message(command, hub, tmp_path, fault, model, said):
    hub.faults = [fault] if fault else []
    done = command("compare", model=model, seconds=1)
    assert done.returncode == 2, done.stderr
    assert said in done.said and model in done.said, done.said
    assert not (tmp_path / "adapters").exists()


def test_a_hub_that_never_answers_is_said_so(monkeypatch):
    """As transformers raises it, once the client's own retries are over (minutes, which are not waited for here)."""
    import httpx

    from peft_recipes import RecipeError
    from peft_recipes.models import hub
    from peft_recipes.models.bases import hub_errors

    monkeypatch.setattr(hub, "offline_if_unreachable", lambda: None)
    never = pytest.raises(RecipeError, match=r"'some/tiny': the Hub did not answer in time.*HF_HUB_ETAG_TIMEOUT=60")
    with never, hub_errors("model", "some/tiny"):
        try:
            raise httpx.ReadTimeout("timed out")
        except httpx.ReadTimeout as error:
            raise OSError("We couldn't connect to load the files") from error


def test_a_hub_that_is_not_there_names_the_flag(command, tmp_path):
    """At once, not after the client's minute of retries; what is in its cache still loads."""
    done = command("plan", url="http://127.0.0.1:9")
    assert done.returncode == 2 and "can't be reached" in done.said and "--embedded" in done.said
    assert command("plan", "--arms", "lora").returncode == 0
    done = command("plan", "--arms", "lora", url="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
