"""Judges at an endpoint and local ones, their cache, and what a recipe may say about them."""

from __future__ import annotations

import json

import pytest
from judge_server import JudgeServer
from small import tiny_config, tokenizer

from peft_recipes import Recipe
from peft_recipes.errors import JudgeError, RecipeError
from peft_recipes.recipe.judge import Judge
from peft_recipes.recipe.serialization import dataclass_from_dict
from peft_recipes.scoring import judges
from peft_recipes.scoring.judge_cache import FILE, Replies
from peft_recipes.scoring.judges import ask, check_judge
from peft_recipes.scoring.preferences import TEMPLATE, question

QUESTIONS = [question(TEMPLATE, f"prompt {i}", "short", "longer" * i) for i in range(3)]


@pytest.fixture
def server():
    with JudgeServer() as running:
        yield running


def test_an_endpoint_is_asked_greedily_with_few_tokens(server):
    replies = dict(ask(Judge("a-judge", server.url), QUESTIONS))
    assert [replies[each] for each in QUESTIONS] == ["A", "B", "B"]
    assert all(request["temperature"] == 0 and request["max_tokens"] == 8 for request in server.requests)
    options = {"max_tokens": None, "max_completion_tokens": 50, "temperature": None}
    list(ask(Judge("a-judge", server.url, options=options), QUESTIONS[:1]))
    assert set(server.requests[-1]) == {"model", "messages", "max_completion_tokens"}


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_endpoint_is_asked_again(server, status):
    server.failures = [status, status]
    assert dict(ask(Judge("a-judge", server.url), QUESTIONS[:1])) == {QUESTIONS[0]: "A"}
    assert len(server.requests) == 3


def test_an_endpoint_that_fails_for_good_is_named(server, monkeypatch):
    monkeypatch.setattr(judges, "RETRIES", 1)
    server.failures = [500] * 20
    with pytest.raises(JudgeError, match=r"The judge 'a-judge' at http://127.*failed: .*500.*busy"):
        list(ask(Judge("a-judge", server.url), QUESTIONS))
    server.failures = []
    with pytest.raises(JudgeError, match=r"'other' at .* was not found; check judge.model.*'other' does not exist"):
        list(ask(Judge("other", server.url), QUESTIONS))
    monkeypatch.setattr(judges, "RETRIES", 0)
    with pytest.raises(JudgeError, match=r"at http://127.0.0.1:9/v1 can't be reached \(.*[Cc]onnect"):
        list(ask(Judge("a-judge", "http://127.0.0.1:9/v1"), QUESTIONS))


def test_something_else_than_a_chat_completion_is_an_error(server, monkeypatch):
    monkeypatch.setattr(JudgeServer, "reply", lambda *_: {"no": "text"})
    list(ask(Judge("a-judge", server.url), QUESTIONS[:1]))
    monkeypatch.setattr("judge_server._Handler.do_POST", lambda handler: handler._send(200, ["no", "completion"]))
    with pytest.raises(JudgeError, match="sent something else than a chat completion"):
        list(ask(Judge("a-judge", server.url), QUESTIONS[:1]))


def test_the_key_comes_from_the_named_variable_alone(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-this-endpoint")
    monkeypatch.setenv("MY_KEY", " secret-key\n")
    with JudgeServer(key="secret-key") as server:
        assert dict(ask(Judge("a-judge", server.url, api_key_env="MY_KEY"), QUESTIONS[:1]))
        with pytest.raises(JudgeError, match=r"no key: set judge.api_key_env"):
            list(ask(Judge("a-judge", server.url), QUESTIONS[:1]))
        assert "not-for-this-endpoint" not in json.dumps(server.headers)
        monkeypatch.setenv("MY_KEY", "wrong-key")
        with pytest.raises(JudgeError, match=r"refused the key in MY_KEY: .*wrong key: Bearer \*\*\*") as refused:
            list(ask(Judge("a-judge", server.url, api_key_env="MY_KEY"), QUESTIONS[:1]))
    assert "wrong-key" not in str(refused.value) and refused.value.__cause__ is None


def test_a_missing_key_or_model_is_found_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(RecipeError, match="the environment variable MY_KEY is not set"):
        check_judge(Judge("m", "http://localhost/v1", api_key_env="MY_KEY"))
    with pytest.raises(RecipeError, match=r"no config.json there"):
        check_judge(Judge(str(tmp_path)))
    check_judge(Judge("m", "http://localhost/v1"))  # the endpoint itself may be started later


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A GPT-2 with 64 positions, which replies to any question, but not sensibly."""
    from transformers import AutoModelForCausalLM, set_seed

    folder, words = tmp_path_factory.mktemp("judge"), tokenizer()
    set_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("gpt2", len(words))).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def test_a_local_judge_replies_in_batches_as_it_does_one_by_one(local):
    asked = [f"say {'film ' * i}" for i in range(1, 8)]
    batched = dict(ask(Judge(local, batch_size=4), asked))
    alone = dict(ask(Judge(local, batch_size=1), asked))
    assert batched == alone and set(batched) == set(asked) and len(set(batched.values())) > 1


def test_a_question_beyond_the_positions_of_a_local_judge_is_not_asked(local):
    replies = dict(ask(Judge(local), ["film " * 60, "film"]))
    assert replies["film " * 60].startswith("(not asked: its 60 tokens") and not replies["film"].startswith("(not")


def test_replies_are_kept_by_judge_and_question(tmp_path):
    judge = Judge("m")
    Replies(tmp_path, judge).add("which?", "A")
    with (tmp_path / FILE).open("a") as file:
        file.write('{"key": "cut sh')  # the process was killed
    replies = Replies(tmp_path, judge)
    replies.add("and?", "B")
    again = Replies(tmp_path, judge)
    assert again["which?"] == "A" and again["and?"] == "B" and "or?" not in again
    for other in (Judge("n"), Judge("m", max_new_tokens=9), Judge("m", "http://localhost/v1")):
        assert "which?" not in Replies(tmp_path, other)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"modle": "m", "model": "m"}, "Unknown key 'modle' in judge. Did you mean 'model'?"),
        ({"base_url": "http://x/v1"}, "Missing key 'model' in judge."),
        ({"model": "m", "api_key": "sk-1"}, "Unknown key 'api_key' in judge. Did you mean 'api_key_env'?"),
        ({"model": "m", "api_key_env": "K"}, "judge.api_key_env: no effect unless judge.base_url names an endpoint."),
        ({"model": "m", "base_url": "localhost:8000"}, "judge.base_url: expected http://HOST/v1"),
        ({"model": "m", "base_url": "http://x/v1/chat/completions"}, "leave out '/chat/completions'"),
        ({"model": "m", "base_url": "http://me:sk-1@x/v1"}, "judge.base_url: holds credentials"),
        ({"model": "m", "base_url": "http://x/v1", "api_key_env": "sk-1"}, "name of an environment variable"),
        ({"model": "m", "base_url": "http://x/v1", "options": {"stream": True}}, "judge.options: stream can't be set"),
        ({"model": "m", "template": "no-such-file.txt"}, "judge.template: no file 'no-such-file.txt'"),
        ({"model": "m", "template": "{prompt}: {first}?"}, "judge.template: {second} is missing."),
        ({"model": "m", "timeout": 0}, "judge.timeout: expected seconds above 0"),
        ({"model": "m", "concurrency": 0}, "judge.concurrency: expected 1 or more"),
        ({"model": "m", "concurrency": "two"}, "judge.concurrency: expected a whole number"),
    ],
)
def test_what_is_wrong_with_a_judge_is_said_in_one_line_without_a_key(given, message):
    judge, problems = dataclass_from_dict(given, Judge, "judge")
    problems += judge.problems() if judge else []
    assert len(problems) == 1 and message in problems[0] and "sk-1" not in problems[0]


def test_a_template_from_a_file_becomes_part_of_the_recipe(tmp_path):
    path = tmp_path / "question.txt"
    path.write_text("{prompt}: {first} or {second}?")
    judge = Judge("m", template=str(path))
    assert judge.template == "{prompt}: {first} or {second}?" and not judge.problems()


def test_a_recipe_has_a_judge_with_the_metric_preference_alone(instruct, classify):
    with pytest.raises(RecipeError, match=r"metric: 'preference' needs a judge\. Set judge: \{model"):
        instruct(metric="preference")
    with pytest.raises(RecipeError, match=r"judge: no effect with the metric 'loss'\. Set metric: preference"):
        instruct(judge=Judge("m"))
    with pytest.raises(RecipeError, match="Unknown metric 'preference' in task text-classification"):
        classify(metric="preference", judge=Judge("m"))
    with pytest.raises(RecipeError, match=r"Unknown key 'modell' in judge\. Did you mean 'model'"):
        instruct().with_changes({"metric": "preference", "judge": {"model": "m", "modell": "n"}})


def test_a_recipe_with_a_judge_comes_back_from_yaml(instruct, tmp_path):
    judge = Judge("m", "https://host/v1", template="{prompt}\n{first}\n{second}\n", options={"temperature": None})
    recipe = instruct(metric="preference", judge=judge)
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
