"""A request's prompt as tokens, and how many tokens its answer may have."""

from __future__ import annotations

from peft_recipes.errors import RecipeError
from peft_recipes.inference.generate import prompt_tokens
from peft_recipes.serving.errors import ApiError
from peft_recipes.serving.models import Models, Served
from peft_recipes.serving.sampling import Sampling
from peft_recipes.serving.schema import ChatRequest, CompletionRequest, Request


def find_model(models: Models, name: str) -> Served:
    """Raises ApiError 404, which names the nearest model."""
    try:
        return models.find(name)
    except RecipeError as error:
        raise ApiError(404, str(error), param="model", code="model_not_found") from None


def render(served: Served, request: Request, most_tokens: int) -> tuple[list[int], Sampling]:
    """Return the prompt's tokens and the sampling options.

    most_tokens: the server's limit of an answer. Raises ApiError 400: no chat template, a prompt without tokens, or one
    that does not fit the context with the answer that is asked for.
    """
    prompt = _chat(served, request) if isinstance(request, ChatRequest) else _completion(served, request)
    if not prompt:
        raise ApiError(400, "The prompt has no token.", param="prompt")
    if wrong := [token for token in prompt if not 0 <= token < served.vocabulary]:
        raise ApiError(400, f"The prompt has token {wrong[0]}; the model's are 0 to {served.vocabulary - 1}.",
                       param="prompt")  # fmt: skip
    asked = request.asked_tokens()
    if asked is not None and asked > most_tokens:
        raise ApiError(400, f"max_tokens is {asked}; this server gives answers of {most_tokens} tokens at most.",
                       param="max_tokens")  # fmt: skip
    max_tokens = asked or most_tokens
    if served.context is not None:
        room = served.context - len(prompt)
        given = isinstance(request, ChatRequest) or request.max_tokens is not None
        if room < (asked if asked and given else 1):
            answer = f" and its answer {asked}" if asked and given else ""
            raise ApiError(
                400, f"The prompt has {len(prompt)} tokens{answer}; the model takes {served.context} in all.",
                param="messages" if isinstance(request, ChatRequest) else "prompt", code="context_length_exceeded",
            )  # fmt: skip
        max_tokens = min(max_tokens, room)
    return prompt, request.sampling(max_tokens, served.repetition_penalty, served.vocabulary)


def _chat(served: Served, request: ChatRequest) -> list[int]:
    from jinja2 import TemplateError

    messages = [message.plain() for message in request.messages]
    tokenizer = served.tokenizer
    if tokenizer.chat_template is None:
        if not served.plain_chat:
            raise ApiError(400, f"'{served.name}' has no chat template; use /v1/completions.", param="model")
        return prompt_tokens(served.opened, messages)[0].tolist()
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        reason = f"The chat template of '{served.name}' refuses these messages: {' '.join(str(error).split())[:300]}"
        raise ApiError(400, reason, param="messages") from None


def _completion(served: Served, request: CompletionRequest) -> list[int]:
    prompt = request.prompt
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
        prompt = prompt[0]
    return list(served.tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else list(prompt)
