"""The endpoint, asked by OpenAI's own client: a base and three adapters on one server in a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from saved_adapters import lora, saved
from small import tiny_config, tokenizer

from peft_recipes.adapters.open import open_adapter
from peft_recipes.inference.generate import Sampling, generate_answer, prompt_tokens
from peft_recipes.serving.engine import Limits
from peft_recipes.serving.models import load_models
from peft_recipes.serving.server import Server, open_socket

KEY = "a-secret-key"
QUESTION = [{"role": "user", "content": "say good in a film"}]


@contextlib.contextmanager
def running(models, host="127.0.0.1", **options):
    """A server on a free port of loopback, in a thread."""
    listening = open_socket(host, 0)
    server, ready = Server(models, listening, host=host, **options), threading.Event()
    thread = threading.Thread(target=server.run, args=(ready.set,))
    thread.start()
    assert ready.wait(30)
    try:
        yield server
    finally:
        server.end()
        thread.join(30)
        listening.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama with large weights, whose greedy answers do not repeat one token."""
    import transformers

    folder, words = tmp_path_factory.mktemp("bases") / "tiny-llama", tokenizer(chat=True)
    transformers.set_seed(0)
    config = tiny_config("llama", len(words))
    config.initializer_range, config.tie_word_embeddings = 0.6, False
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Two LoRAs, which share a batch, and a DoRA, which does not."""
    root = tmp_path_factory.mktemp("served")
    configs = {"film": lora(), "day": lora(r=4, target_modules=["o_proj", "down_proj"]), "dora": lora(use_dora=True)}
    return {name: saved(base, root / name, config, i) for i, (name, config) in enumerate(configs.items())}


@pytest.fixture(scope="module")
def models(folders):
    return load_models([str(folders["film"]), f"org/day={folders['day']}", str(folders["dora"])])


@pytest.fixture(scope="module")
def server(models):
    with running(models, limits=Limits(batch_size=8, queue=32, max_tokens=40), key=KEY, max_bytes=20_000) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def alone(folders, models):
    """alone(model, tokens) -> the greedy answer of plain PEFT by `generate`."""

    def ask(name: str, tokens: int = 12) -> dict:
        adapter = open_adapter(folders.get(name.removeprefix("org/"), folders["film"]))
        model = adapter.load_base() if name == models.base_name else adapter.attach(adapter.load_base())
        return generate_answer(model, adapter, prompt_tokens(adapter, QUESTION), Sampling(max_new_tokens=tokens))

    return ask


def ask(client, model, **options):
    options = {"messages": QUESTION, "max_tokens": 12, **options}
    return client.chat.completions.create(model=model, **options)


def test_models_lists_the_base_and_its_adapters(client, models):
    listed = client.models.list().data
    assert [model.id for model in listed] == [models.base_name, "film", "org/day", "dora"]
    assert listed[0].parent is None and listed[1].parent == models.base_name
    assert client.models.retrieve("org/day").id == "org/day"


def test_each_model_gives_the_answer_of_plain_peft(client, models, alone):
    answers = {name: ask(client, name) for name in models.by_name}
    for name, answer in answers.items():
        expected = alone(name)
        assert answer.choices[0].message.content.strip() == expected["text"], name
        assert answer.usage.completion_tokens == expected["tokens"]
        assert answer.choices[0].finish_reason == ("length" if expected["cut_off"] else "stop")
        assert answer.model == name and answer.usage.total_tokens == answer.usage.prompt_tokens + expected["tokens"]
    assert len({answer.choices[0].message.content for answer in answers.values()}) == 4
    assert ask(client, "base").model == models.base_name


def test_requests_at_once_get_the_answers_that_they_get_alone(server, client, models):
    """Prompts of many lengths, all models, greedy and sampled, whole and streamed, in batches of eight."""
    words = ["say", "good", "in", "a", "film", "it", "was", "this", "very", "warm", "day"]
    requests = [
        {
            "model": list(models.by_name)[i % 4],
            "messages": [{"role": "user", "content": " ".join(words[: 1 + i % 9])}],
            "max_tokens": 4 + 5 * (i % 6),
            **({"temperature": 1.5, "seed": i, "top_p": 0.9} if i % 3 == 0 else {}),
        }
        for i in range(32)
    ]
    one_by_one = [client.chat.completions.create(**request).choices[0].message.content for request in requests]

    async def all_at_once() -> list[str]:
        async with AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0) as many:

            async def one(i: int, request: dict) -> str:
                if i % 2:
                    return (await many.chat.completions.create(**request)).choices[0].message.content
                stream = await many.chat.completions.create(**request, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(i, request) for i, request in enumerate(requests)))

    assert asyncio.run(all_at_once()) == one_by_one
    assert len(set(one_by_one)) >= 15
    rows = float(metric(server, 'peft_recipes_batch_rows_bucket{le="2.0"}'))
    assert float(metric(server, "peft_recipes_batch_rows_count")) > rows  # some steps had more than two rows


def metric(server, name: str) -> str:
    text = httpx.get(f"{server.url[:-3]}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    return next(line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(name + " "))


def test_a_stream_has_the_same_text_its_finish_reason_and_its_usage(client):
    whole = ask(client, "film")
    chunks = list(ask(client, "film", stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and len(chunks) > 4
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    plain = list(client.completions.create(model="film", prompt="say good", max_tokens=5, stream=True))
    expected = client.completions.create(model="film", prompt="say good", max_tokens=5)
    assert "".join(chunk.choices[0].text for chunk in plain) == expected.choices[0].text
    assert expected.usage.prompt_tokens == 2 and plain[-1].choices[0].finish_reason


def test_a_stop_string_ends_the_answer_before_it(client):
    text = ask(client, "film").choices[0].message.content
    word = text.split()[4]
    stopped = ask(client, "film", stop=["no such text", word])
    assert stopped.choices[0].message.content == text[: text.index(word)]
    assert stopped.choices[0].finish_reason == "stop"
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, "film", stop=word, stream=True)]
    assert "".join(pieces) == text[: text.index(word)]


def test_sampling_follows_the_seed(client):
    def sampled(**options):
        return ask(client, "base", temperature=2, **options).choices[0].message.content

    assert sampled(seed=1) == sampled(seed=1) != sampled(seed=2)
    assert ask(client, "base", temperature=0).choices == ask(client, "base").choices
    one_token = ask(client, "base", logit_bias={"7": 100}).choices[0].message.content.split()
    assert len(one_token) == 12 and len(set(one_token)) == 1
    varied = ask(client, "base", logit_bias={"7": 100}, frequency_penalty=2, presence_penalty=2, max_tokens=40)
    assert varied.usage.completion_tokens == 40


def test_system_messages_and_parts_reach_the_template(client):
    parts = [{"type": "text", "text": "say good"}, {"type": "text", "text": "in a film"}]
    assert ask(client, "film", messages=[{"role": "user", "content": parts}]).choices == ask(client, "film").choices
    system = [{"role": "system", "content": "it was very warm"}, *QUESTION]
    developer = [{"role": "developer", "content": "it was very warm"}, *QUESTION]
    answer = ask(client, "film", messages=system)
    assert answer.usage.prompt_tokens > ask(client, "film").usage.prompt_tokens
    assert ask(client, "film", messages=developer).choices == answer.choices
    back = [*QUESTION, answer.choices[0].message.model_dump(), *QUESTION]  # with the client's own empty fields
    assert ask(client, "film", messages=back).usage.prompt_tokens > answer.usage.prompt_tokens


WRONG = [
    ({"n": 2}, openai.BadRequestError, "'n' is not supported"),
    ({"logprobs": True}, openai.BadRequestError, "'logprobs' is not supported"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "'tools' is not"),
    ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "'response_format' is not"),
    ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "Did you mean 'temperature'"),
    ({"model": "flim"}, openai.NotFoundError, "Did you mean 'film'"),
    ({"temperature": 3}, openai.UnprocessableEntityError, "temperature: input should be less than or equal to 2"),
    ({"temperature": "hot"}, openai.UnprocessableEntityError, "temperature"),
    ({"max_tokens": 0}, openai.UnprocessableEntityError, "max_tokens"),
    ({"max_tokens": 41}, openai.BadRequestError, "answers of 40 tokens at most"),
    ({"messages": []}, openai.UnprocessableEntityError, "messages"),
    ({"messages": [{"role": "user"}]}, openai.UnprocessableEntityError, r"messages\[0\].content"),
    ({"messages": [{"role": "usr", "content": "say"}]}, openai.UnprocessableEntityError, r"messages\[0\].role"),
    ({"messages": [{"role": "tool", "content": "1", "tool_call_id": "1"}]}, openai.BadRequestError, "tools are not"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     openai.BadRequestError, "'image_url' is not supported"),
    ({"messages": [{"role": "user", "content": "good " * 60}]}, openai.BadRequestError,
     "The prompt has 63 tokens and its answer 12; the model takes 64 in all"),
    ({"messages": [{"role": "user", "content": "good " * 5000}]}, openai.APIStatusError, "more than 20000 bytes"),
    ({"logit_bias": {"9999": 1}}, openai.BadRequestError, "logit_bias: its keys are token ids from 0 to"),
    ({"stop": ["a"] * 5}, openai.UnprocessableEntityError, "stop: list should have at most 4 items"),
    ({"extra_body": {"repetition_penalty": 1e-9}}, openai.UnprocessableEntityError, "repetition_penalty: .* 0.01"),
    ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "needs 'stream': true"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_refused_by_name(client, options, kind, message):
    with pytest.raises(kind, match=message) as caught:
        ask(client, **{"model": "film", **options})
    body = caught.value.response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"} and body["message"] in str(caught.value)


def test_values_that_ask_for_nothing_are_fine(client):
    ask(client, "film", n=1, logprobs=False, tools=[], response_format={"type": "text"}, user="me", store=False)


def test_a_wrong_key_is_refused_and_never_repeated(server, capfd):
    for key in ("wrong", "", "a-secret-ke"):
        with (
            pytest.raises(openai.AuthenticationError) as caught,
            OpenAI(base_url=server.url, api_key=key or "-") as one,
        ):
            one.models.list()
        assert KEY not in str(caught.value)
    root = server.url[:-3]
    assert httpx.get(f"{root}/health").json() == {"status": "ok"}
    assert httpx.get(f"{root}/metrics").status_code == 401
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{server.url}/nothing", headers=headers).json()["error"]["type"] == "not_found_error"
    post = f"{server.url}/chat/completions"
    assert httpx.post(post, headers=headers, json=[]).json()["error"]["message"] == "The body is not a JSON object."
    as_json = {**headers, "Content-Type": "application/json"}
    broken = httpx.post(post, headers=as_json, content="{")
    assert broken.status_code == 400 and broken.json()["error"]["code"] == "invalid_json"
    half = httpx.post(post, headers=as_json, content='{"messages": [{"role": "user", "content": "\\ud800"}]}')
    assert half.status_code == 400 and "surrogate" in half.json()["error"]["message"]
    assert httpx.post(post, headers=headers, content="{}").status_code == 415  # as a form of another site sends it
    assert httpx.get(f"{root}/v1/models", headers={**headers, "Host": "evil.example"}).status_code == 403
    out = capfd.readouterr()
    assert KEY not in out.out + out.err


def test_another_address_of_loopback_is_answered_under_its_own_name(models):
    with running(models, host="127.0.0.2") as server:
        assert httpx.get(f"{server.url}/models").status_code == 200
        for host, status in {"LocalHost": 200, "127.0.0.3": 403}.items():
            assert httpx.get(f"{server.url}/models", headers={"Host": host}).status_code == status


def test_a_temperature_next_to_zero_is_greedy(client):
    greedy, cold = (
        client.completions.create(model="film", prompt="say good", temperature=temperature, seed=1).choices[0].text
        for temperature in (0, 1e-42)
    )
    assert cold == greedy != ""


def test_metrics_count_requests_and_tokens(server, client):
    name = 'peft_recipes_requests_total{model="film",status="200"}'
    tokens = 'peft_recipes_generated_tokens_total{model="film"}'
    before, count = float(metric(server, name)), float(metric(server, tokens))
    answer = ask(client, "film")
    assert float(metric(server, name)) == before + 1
    assert float(metric(server, tokens)) == count + answer.usage.completion_tokens
    with pytest.raises(openai.NotFoundError):
        ask(client, "flim")
    assert float(metric(server, 'peft_recipes_requests_total{model="unknown",status="404"}')) >= 1
    assert metric(server, "peft_recipes_waiting_requests") == metric(server, "peft_recipes_running_requests") == "0.0"


def slowly(models, monkeypatch):
    """Let each step of the model wait until the test says go. Returns the gate."""
    gate = threading.Event()
    for lane in models.lanes:
        step = lane.step
        monkeypatch.setattr(lane, "step", lambda step=step: gate.wait(20) and step())
    return gate


def until(condition) -> None:
    """Wait for a state of the server."""
    waiter = threading.Event()
    for _ in range(2000):
        if condition():
            return
        waiter.wait(0.005)
    raise AssertionError("not reached")


def post(server, **options) -> http.client.HTTPConnection:
    """Send a request and do not wait for its answer."""
    connection = http.client.HTTPConnection(server.url.split("/")[2], timeout=30)
    body = {"model": "film", "messages": QUESTION, "max_tokens": 30, **options}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def test_a_full_queue_is_a_429_and_a_client_that_leaves_frees_its_place(models, monkeypatch):
    gate = slowly(models, monkeypatch)
    with running(models, limits=Limits(batch_size=1, queue=1)) as server:
        engine = server.app.state.api.engine
        first = post(server, stream=True)
        first_answer = first.getresponse()
        until(lambda: engine.running == 1)
        second = post(server)
        until(lambda: engine.waiting == 1)
        third = post(server).getresponse()
        assert third.status == 429 and int(third.headers["Retry-After"]) >= 1
        assert json.loads(third.read())["error"]["type"] == "rate_limit_error"
        second.close()
        until(lambda: engine.waiting == 0)
        fourth = post(server, max_tokens=2)
        until(lambda: engine.waiting == 1)
        first_answer.close()
        first.close()
        until(lambda: next(iter(engine._running.values())).cancelled)
        gate.set()
        assert fourth.getresponse().status == 200
        until(lambda: engine.idle)
        assert metric(server, 'peft_recipes_requests_total{model="film",status="499"}') == "2.0"


def test_running_requests_are_answered_at_the_end_and_new_ones_get_503(models, monkeypatch):
    gate = slowly(models, monkeypatch)
    with running(models) as server:
        engine = server.app.state.api.engine
        answered, late = post(server), http.client.HTTPConnection(server.url.split("/")[2], timeout=30)
        late.connect()
        until(lambda: engine.running == 1)
        server.end()
        until(lambda: not engine.alive)
        late.request("POST", "/v1/chat/completions", json.dumps({"model": "film", "messages": QUESTION}),
                     {"Content-Type": "application/json"})  # fmt: skip
        refused = late.getresponse()
        assert refused.status == 503 and "shutting down" in json.loads(refused.read())["error"]["message"]
        gate.set()
        assert answered.getresponse().status == 200


def test_what_is_not_answered_in_time_ends_with_a_504_and_what_fails_with_a_500(models, monkeypatch, capfd):
    gate = slowly(models, monkeypatch)
    with running(models, limits=Limits(timeout=0.05)) as server:
        late = post(server)
        until(lambda: server.app.state.api.engine.running == 1)
        threading.Event().wait(0.1)
        gate.set()
        answer = late.getresponse()
        assert answer.status == 504 and json.loads(answer.read())["error"]["code"] == "timeout"
    monkeypatch.setattr(models.lanes[0], "step", lambda: 1 / 0)
    with running(models) as server:
        stream = post(server, stream=True).getresponse().read().decode()
        assert "The model failed" in stream and "[DONE]" not in stream
        assert post(server).getresponse().status == 500
        assert post(server, model="dora").getresponse().status == 200  # in a lane of its own
    assert "ZeroDivisionError" in capfd.readouterr().err
