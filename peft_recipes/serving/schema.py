"""The requests of OpenAI's API: what is taken, and what is refused by name rather than ignored."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from peft_recipes.errors import nearest
from peft_recipes.serving.errors import ApiError
from peft_recipes.serving.sampling import Sampling

Number = StrictFloat | StrictInt
Stop = Annotated[StrictStr, Field(min_length=1)]

# What changes no answer here, so that any value is fine.
_WITHOUT_EFFECT = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
# What is not done here, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False,), "top_logprobs": (0,), "echo": (False,), "suffix": ("",),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},), "modalities": (["text"],),
    "audio": (), "prediction": (), "reasoning_effort": ("none",), "web_search_options": (), "store": (False,),
    "service_tier": ("auto", "default"), "verbosity": (), "moderation": (),
}  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: StrictStr


class Message(_Strict):
    """One turn. developer is OpenAI's newer word for system."""

    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[TextPart]

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    """include_usage: a last chunk with the token counts."""

    include_usage: StrictBool = False
    include_obfuscation: Literal[False] = False


class Request(_Strict):
    """What both endpoints take. Without a temperature an answer is greedy, or with top_p or top_k sampled at 1."""

    model: StrictStr
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=10)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None

    def asked_tokens(self) -> int | None:
        """The limit of the answer that the client asks for."""
        return self.max_tokens

    def sampling(self, max_tokens: int, repetition_penalty: float, vocabulary: int) -> Sampling:
        """Raises ApiError for a logit_bias of a token that is not there."""
        sampled = self.top_p is not None or self.top_k is not None
        temperature = float(sampled) if self.temperature is None else float(self.temperature)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_tokens, temperature, 1.0 if self.top_p is None else float(self.top_p), self.top_k, self.seed, stop,
            self.frequency_penalty or 0.0, self.presence_penalty or 0.0,
            float(self.repetition_penalty or repetition_penalty), _biases(self.logit_bias or {}, vocabulary),
        )  # fmt: skip


class ChatRequest(Request):
    """A request of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None

    def asked_tokens(self) -> int | None:
        """The limit of the answer that the client asks for, under its new name or its old one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Request):
    """A request of /v1/completions: one text, or the tokens of one."""

    prompt: StrictStr | Annotated[list[StrictStr], Field(min_length=1, max_length=1)] | list[StrictInt]

    def asked_tokens(self) -> int | None:
        """The limit of the answer; OpenAI's own default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens


def parse(kind: type[Request], body: Any) -> Any:
    """Parse a request. Raises ApiError: 400 for what is not supported or not known, 422 for a wrong type or value."""
    if not isinstance(body, dict):
        raise ApiError(400, "The body is not a JSON object.")
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "The request has half a surrogate pair, which is no character.") from None
    given = {name: value for name, value in body.items() if name not in _WITHOUT_EFFECT}
    for name in [*given]:
        if name in _UNSUPPORTED:
            value = given.pop(name)
            # True == 1 in Python: types are compared as well.
            if value is not None and not any(value == v and type(value) is type(v) for v in _UNSUPPORTED[name]):
                message = f"'{name}' is not supported here with this value; leave it out."
                raise ApiError(400, message, param=name, code="unsupported_parameter")
        elif name not in kind.model_fields:
            message = f"Unknown parameter '{name}'.{nearest(name, kind.model_fields)}"
            raise ApiError(400, message, param=name, code="unknown_parameter")
    if isinstance(given.get("messages"), list):
        given["messages"] = [_checked(message, i) for i, message in enumerate(given["messages"])]
    if given.get("stream_options") is not None and not given.get("stream"):
        raise ApiError(400, "'stream_options' needs 'stream': true.", param="stream_options")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _explained(error) from None


def _checked(message: Any, number: int) -> Any:
    """A message without the empty fields of an answer that is sent back. Raises ApiError for what is not supported."""
    if not isinstance(message, dict):
        return message
    at = f"messages[{number}]"
    kept = {key: value for key, value in message.items() if value not in (None, [], {}) or key in ("role", "content")}
    if kept.get("role") in ("tool", "function"):
        raise ApiError(400, f"{at}: tools are not supported here.", param=at, code="unsupported_parameter")
    for key in kept:
        if key not in ("role", "content"):
            raise ApiError(400, f"{at}.{key} is not supported here.", param=f"{at}.{key}", code="unsupported_parameter")
    for part in kept["content"] if isinstance(kept.get("content"), list) else ():
        if isinstance(part, dict) and part.get("type", "text") != "text":
            message = f"{at}.content: '{part['type']}' is not supported here, text only."
            raise ApiError(400, message, param=f"{at}.content", code="unsupported_parameter")
    return kept


def _explained(error: ValidationError) -> ApiError:
    """The first problem, by the parameter's name. The value stays out: it may be a whole prompt.

    Of a parameter that takes several types, each has a problem; that of the type that was given says what is wrong.
    """
    problems = error.errors(include_input=False, include_url=False)
    first = min((one for one in problems if one["loc"][:1] == problems[0]["loc"][:1]), key=_is_of_another_type)
    path = [part for part in first["loc"] if isinstance(part, int) or (part.isidentifier() and part.islower())]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or "body"
    for kind in (".str", ".list", ".int", ".float"):  # pydantic's names of a union's branches
        name = name.removesuffix(kind)
    return ApiError(422, f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}.", param=name, code="invalid_value")


def _is_of_another_type(problem: Any) -> bool:
    return problem["type"].endswith("_type")


def _biases(given: dict[str, float], vocabulary: int) -> dict[int, float]:
    try:
        biases = {int(token): float(value) for token, value in given.items()}
    except ValueError:
        biases = {-1: 0.0}
    if wrong := [token for token in biases if not 0 <= token < vocabulary]:
        message = f"logit_bias: its keys are token ids from 0 to {vocabulary - 1}, not {wrong[0]}."
        raise ApiError(400, message, param="logit_bias")
    return biases
