"""Judges: models that reply to questions, run here through transformers or behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import JudgeError, RecipeError
from peft_recipes.models import bases
from peft_recipes.recipe.judge import Judge

if TYPE_CHECKING:
    from openai import OpenAI
    from transformers import PreTrainedTokenizerBase

RETRIES = 5  # after a connection error, a timeout, or the status 408, 409, 429 or 5xx, with exponential backoff
_BATCHES = 8  # batches of a local judge until its replies are stored
_SHOWN = 400  # characters of an error message, which may quote an endpoint


def check_judge(judge: Judge, trust_remote_code: bool = False) -> None:
    """Check what can be known of a judge before anything runs. Raises RecipeError.

    An endpoint's key and client must be there; the endpoint itself may be started later. A local model must exist.
    """
    if judge.base_url is None:
        _load_tokenizer(judge, trust_remote_code)
        return
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise RecipeError("A judge at an endpoint needs openai: pip install 'peft_recipes[judge]'.") from error
    if judge.api_key_env is not None and not os.environ.get(judge.api_key_env):
        raise RecipeError(f"judge.api_key_env: the environment variable {judge.api_key_env} is not set.")


def ask(judge: Judge, questions: Sequence[str], trust_remote_code: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (question, reply) as the judge replies, in any order. Raises JudgeError; RecipeError for a local one."""
    if judge.base_url is None:
        return _ask_local(judge, questions, trust_remote_code)
    return _ask_endpoint(judge, questions)


def _ask_endpoint(judge: Judge, questions: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Ask `concurrency` questions at a time; at the first that fails, those that are not under way are given up."""
    import openai

    key = os.environ.get(judge.api_key_env, "").strip() if judge.api_key_env else ""
    # Without a key of the recipe's the client would send OPENAI_API_KEY to any endpoint.
    client = openai.OpenAI(base_url=judge.base_url, api_key=key or "none", timeout=judge.timeout, max_retries=RETRIES)
    pool = ThreadPoolExecutor(judge.concurrency, thread_name_prefix="judge")
    asked = {pool.submit(_request, client, judge, question): question for question in questions}
    given = set()
    try:
        for future in as_completed(asked):
            reply = future.result()
            given.add(future)
            yield asked[future], reply
    except (openai.OpenAIError, ValueError) as error:
        pool.shutdown(wait=True, cancel_futures=True)
        under_way = (future for future in asked if not (future in given or future.cancelled() or future.exception()))
        yield from ((asked[future], future.result()) for future in under_way)
        message = _explain(judge, error)
        message = message.replace(key, "***") if key else message
        raise JudgeError(message[:_SHOWN]) from None  # the cause has the headers
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for a slow endpoint
        client.close()


def _request(client: OpenAI, judge: Judge, question: str) -> str:
    """Return the endpoint's reply to one question; "" where its message has no text."""
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": judge.max_new_tokens, **judge.options}
    body = {key: value for key, value in fields.items() if value is not None}
    messages = [{"role": "user", "content": question}]
    completion = client.chat.completions.create(model=judge.model, messages=messages, extra_body=body)
    try:
        return completion.choices[0].message.content or ""
    except (AttributeError, IndexError, TypeError):
        raise ValueError("it sent something else than a chat completion") from None


def _explain(judge: Judge, error: Exception) -> str:
    """Describe a failed request in one line."""
    import openai

    subject = f"The judge '{judge.model}' at {judge.base_url}"
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, openai.APITimeoutError):
        return f"{subject} gave no reply within {judge.timeout:g} s, also after {RETRIES} retries."
    if isinstance(error, openai.APIConnectionError):
        cause = f" ({' '.join(str(error.__cause__).split())})" if error.__cause__ else ""
        return f"{subject} can't be reached{cause}."
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        variable = f"the key in {judge.api_key_env}" if judge.api_key_env else "no key: set judge.api_key_env"
        return f"{subject} refused {variable}: {text}."
    if isinstance(error, openai.NotFoundError):
        return f"{subject} was not found; check judge.model and judge.base_url: {text}."
    return f"{subject} failed: {text}."


def _load_tokenizer(judge: Judge, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local judge, and check its configuration. Raises RecipeError for a missing model."""
    from transformers import AutoConfig, AutoTokenizer

    path = bases.location(judge.model)
    with bases.hub_errors("judge", judge.model):
        AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _ask_local(judge: Judge, questions: Sequence[str], trust_remote_code: bool) -> Iterator[tuple[str, str]]:
    """Generate greedy replies, batches of questions of like length at a time; a question that is too long gets none."""
    import torch
    from transformers import AutoModelForCausalLM

    from peft_recipes.scoring.generation import generate, room

    tokenizer = _load_tokenizer(judge, trust_remote_code)
    on_gpu = torch.cuda.is_available()
    with bases.hub_errors("judge", judge.model):
        model = AutoModelForCausalLM.from_pretrained(
            bases.location(judge.model),
            dtype="auto" if on_gpu else torch.float32,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,  # never unpickle weights
        )
    model.to("cuda" if on_gpu else "cpu")
    prompts = {question: _tokens(tokenizer, question) for question in questions}
    rooms = {question: room(model, len(ids)) for question, ids in prompts.items()}
    fitting = [each for each in questions if rooms[each] is None or rooms[each] >= judge.max_new_tokens]
    for question in questions:
        if question not in fitting:
            tokens = len(prompts[question])
            yield question, f"(not asked: its {tokens:,} tokens and the reply exceed the judge's positions)"
    fitting.sort(key=lambda question: len(prompts[question]), reverse=True)  # memory runs out early or not at all
    size = judge.batch_size * _BATCHES
    for start in range(0, len(fitting), size):
        some = fitting[start : start + size]
        ids = [prompts[question] for question in some]
        new = generate(model, ids, tokenizer.pad_token_id, judge.max_new_tokens, batch_size=judge.batch_size)
        yield from zip(some, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True)


def _tokens(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Return the tokens of a question, as a user's message if the model has a chat template."""
    if tokenizer.chat_template is None:
        return tokenizer(question)["input_ids"]
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=True)
