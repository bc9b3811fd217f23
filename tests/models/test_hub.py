"""Messages when the Hub fails: the real client over HTTP, in its own process, with a small local Hub."""

from __future__ import annotations

import contextlib
import shutil

import pytest
from hub_client import Client
from hub_server import Fault, Hub
from worker_processes import workers

TOKEN = "hf_this_token_is_marked_and_must_not_show"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture(scope="module")
def clients(hub, tmp_path_factory):
    """A client of that Hub, and one of an address that nothing listens on, with one cache."""
    home = tmp_path_factory.mktemp("home")
    nothing = "http://127.0.0.1:9"
    with Client(hub.url, home, TOKEN, seconds=1) as reached, Client(nothing, home, TOKEN) as unreachable:
        yield {"reached": reached, "unreachable": unreachable}


@pytest.fixture
def model(hub, tiny, tmp_path):
    """The id of a base on that Hub which no other test has downloaded."""
    name = f"some/{tmp_path.name}"
    shutil.copytree(tiny("distilbert"), hub.root / name)
    hub.faults = []
    return name


@pytest.fixture
def command(classify, tmp_path, clients, model):
    """Run peft-recipes WORDS on a recipe with that base, or another, with a marked token."""

    def run(*words: str, model: str = model, client: str = "reached"):
        training = {"max_steps": 2, "use_cpu": True, "eval_strategy": "no"}
        classify(training=training).with_changes({"model": model}).to_yaml(tmp_path / "mine.yaml")
        return clients[client](words[0], tmp_path / "mine.yaml", *words[1:], cwd=tmp_path)

    return run


def test_a_run_from_the_hub_leaves_no_token_anywhere(command, hub, tmp_path):
    done = command("train", "--arm", "lora")
    assert done.code == 0, done.err
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
        if workers():
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # of another test's server, ending
                    seen.append(" ".join(child.cmdline()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(classify(), ["head"], output=tmp_path, on_progress=look)
    assert seen and not any(TOKEN in line for line in seen)


@pytest.mark.parametrize(
    "fault",
    [Fault("config.json", 503, times=2), Fault("config.json", 429, times=1), Fault("config.json", "slow", times=1)],
)
def test_a_temporary_error_is_retried(command, hub, fault):
    hub.faults = [fault]
    done = command("plan", "--arms", "lora")
    assert done.code == 0, done.err


def test_an_interrupted_download_is_retried(command, hub):
    hub.faults = [Fault("tokenizer.json", "cut", times=1)]
    assert command("plan", "--arms", "lora").code == 0


@pytest.mark.parametrize(
    ("fault", "other", "message"),
    [
        (None, "some/tniy", "does not exist on the Hub, or is private"),
        (Fault("some/", 401, code="RepoNotFound"), None, "hf auth login"),
        (Fault("some/", 403, code="GatedRepo"), None, "is gated"),
        (Fault("config.json", 503), None, "answered 503 (Service Unavailable), also after retries"),
    ],
)
def test_a_permanent_error_is_one_message(command, hub, tmp_path, model, fault, other, message):
    hub.faults = [fault] if fault else []
    done = command("compare", model=other or model)
    assert done.code == 2, done.err
    assert message in done.said and (other or model) in done.said, done.said
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
    assert command("plan", "--arms", "lora").code == 0
    done = command("plan", "--arms", "lora", client="unreachable")
    assert done.code == 0, done.err
    done = command("plan", client="unreachable", model="some/other")
    assert done.code == 2 and "can't be reached" in done.said and "--embedded" in done.said
