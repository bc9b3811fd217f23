"""Messages of a conversation in the shape that chat templates take, from the shapes that datasets have.

Read are OpenAI's messages (tool calls, content: null, parts of text), ShareGPT's (from and value; function_call,
observation), a list, a single message, or either as JSON in a text; see docs/guides/data-formats.md.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from peft_recipes.errors import nearest

USER, ASSISTANT, SYSTEM, TOOL = "user", "assistant", "system", "tool"
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "question"), USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model", "answer"), ASSISTANT),
    **dict.fromkeys(("function_call", "tool_call"), ASSISTANT),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "ipython"), TOOL),
    **dict.fromkeys(("system", "developer"), SYSTEM),
}
_CALLS = ("function_call", "tool_call")
_CALL_KEYS = ("tool_calls", "function_call")
_FLAGS = ("weight", "train", "training")
_MEDIA = ("image", "image_url", "video", "audio", "input_audio", "file")

Refuse = Callable[[str], NoReturn]


def messages_of(value: Any, refuse: Refuse, role: str | None = None) -> list[dict[str, Any]]:
    """A conversation as messages with `role` and `content` as text, and with the further keys that templates read.

    role: of a value that is plain text; None refuses it. refuse: raises an error with the reason it gets. A message's
    weight, train or training becomes `train` (bool).
    """
    if isinstance(value, str):
        listed = _listed(value)
        if not _is_conversation(listed):
            if role is None:
                refuse(f"expected a list of messages, got {value[:120]!r}")
            return [{"role": role, "content": value}]
        value = listed
    if isinstance(value, dict):
        value = _transposed(value)
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        refuse(f"expected a list of messages, each with 'role' and 'content' as text, got {str(value)[:120]}")
    return [_message(message, refuse) for message in value]


def is_messages(value: Any) -> bool:
    """Whether a value is meant as a message or a list of them, maybe as JSON; other JSON in a text is a text."""
    if isinstance(value, str):
        return _is_conversation(_listed(value))
    return isinstance(value, list) or _is_conversation(value)


def tools_of(value: Any, refuse: Refuse) -> list[dict[str, Any]]:
    """The tools of a row as a list of JSON schemas, from a list, a single one, or either as JSON in a text."""
    if value in (None, "", [], {}):
        return []
    found = _listed(value) if isinstance(value, str) else value
    found = [found] if isinstance(found, dict) else found
    if isinstance(found, list):
        found = [_listed(tool) if isinstance(tool, str) else tool for tool in found]
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        refuse(f"expected a list of tools, each a JSON schema, got {str(value)[:120]}")
    found = [without_nulls(tool) for tool in found]
    # LLaMA-Factory's tools are the functions alone.
    return [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in found
    ]


def without_nulls(value: Any) -> Any:
    """The value without keys that are null: Arrow gives every row the keys of all rows."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def settled(messages: list[dict[str, Any]], keep_nulls: bool = False) -> list[dict[str, Any]]:
    """Messages as Arrow keeps them: without nulls, and the arguments of calls as JSON.

    As objects, rows with other arguments would give them their keys, their order of keys and their floats.
    """
    messages = messages if keep_nulls else without_nulls(messages)
    return [_with_arguments(message, lambda given: json.dumps(given, ensure_ascii=False), dict) for message in messages]


def with_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose calls have their arguments as objects, which templates render as JSON."""

    def parsed(given: str) -> Any:
        found = _json(given)
        return found if isinstance(found, dict) else given

    return [_with_arguments(message, parsed, str) for message in messages]


def _with_arguments(message: dict[str, Any], change: Callable[[Any], Any], kind: type) -> dict[str, Any]:
    calls = [
        {**call, "function": {**call["function"], "arguments": change(call["function"]["arguments"])}}
        if isinstance(call.get("function"), dict) and isinstance(call["function"].get("arguments"), kind)
        else call
        for call in message.get("tool_calls") or []
    ]
    return {**message, "tool_calls": calls} if calls else message


def call_names(message: dict[str, Any]) -> list[str]:
    """The names of the functions that a message calls."""
    return [str(call.get("function", call).get("name", "")) for call in message.get("tool_calls") or []]


def _message(message: dict[str, Any], refuse: Refuse) -> dict[str, Any]:
    message = {key: value for key, value in message.items() if value is not None}
    said = message.pop("from", None) if "role" not in message else message.pop("role")
    if not isinstance(said, str) or said.lower() not in _ROLES:
        hint = nearest(said.lower(), _ROLES) if isinstance(said, str) else ""
        refuse(
            "a message has a 'role' (system, user, assistant or tool; ShareGPT's 'from') and a 'content', got the role "
            f"{said!r}.{hint}".rstrip(".")
        )
    key = "content" if "content" in message else "value"
    calls = [call for name in _CALL_KEYS for call in _calls(message.pop(name, []), refuse)]
    content = message.pop(key, "")  # null where a message is a call alone
    if _ROLES[said.lower()] == TOOL and not isinstance(content, (str, type(None))):
        content = json.dumps(content, ensure_ascii=False)  # what a tool answers may be an object
    content = _text(content, refuse)
    if said.lower() in _CALLS:
        parsed = _json(content)
        calls, content = _calls(parsed if isinstance(parsed, (dict, list)) else [], refuse), ""
        if not calls:
            refuse(f"a message from {said!r} holds a call as JSON with 'name' and 'arguments'")
    made = {"role": _ROLES[said.lower()], "content": content}
    if calls:
        made["tool_calls"] = calls
    flags = {key: message.pop(key) for key in _FLAGS if key in message}
    for name, flag in flags.items():
        if flag not in (0, 1):  # True and False are equal to them
            refuse(f"a message's {name} is 0 or 1, or true or false, got {flag!r}")
        made["train"] = bool(flag)
    return {**made, **message}


def _text(content: Any, refuse: Refuse) -> str:
    """A message's content as text; parts of text are joined."""
    if isinstance(content, list):
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if kind in _MEDIA:
                refuse(f"a message holds a part of type {kind!r}; only text can be trained on")
        parts = [
            part if isinstance(part, str) else part.get("text") for part in content if isinstance(part, (str, dict))
        ]
        if len(parts) == len(content) and all(isinstance(part, str) for part in parts):
            return "".join(parts)
    if not isinstance(content, str):
        refuse(
            f"expected a list of messages, each with 'role' and 'content' as text, got the content {str(content)[:80]}"
        )
    return content


def _calls(value: Any, refuse: Refuse) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's shape. Their arguments stay as they are: a mapping, or one as JSON."""
    calls = []
    value = _listed(value) or value if isinstance(value, str) else value
    for call in value if isinstance(value, list) else [value] if value else []:
        call = _listed(call) if isinstance(call, str) else call
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            refuse(f"a tool call has a function with a name and arguments, got {str(call or value)[:120]}")
        arguments = function.get("arguments", {})
        known = {key: call[key] for key in ("id", "type") if call.get(key) is not None} if "function" in call else {}
        function = {"name": function["name"], "arguments": arguments}
        calls.append({"type": "function", **known, "function": function})
    return calls


def _transposed(value: dict[str, Any]) -> list[dict[str, Any]]:
    """A single message as a list, or messages from lists by key, as older versions of datasets give them."""
    if value and all(isinstance(column, list) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) == 1:
            return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return [value]


def _is_conversation(value: Any) -> bool:
    """Whether a value has the keys of messages: JSON with a 'from' (a flight) or a 'role' (an actor) may be a text."""
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, dict):
        return False
    keys = first.keys()
    return {"from", "value"} <= keys or ("role" in keys and bool({"content", "value", *_CALL_KEYS} & keys))


def _listed(text: str) -> Any:
    """The list or object that a text holds as JSON, or as Python writes it: a csv of pandas has that. None: neither."""
    start = text.lstrip()
    if not start.startswith(("[", "{")):
        return None
    found = _json(text)
    if found is None and re.match(r"\[?\s*\{\s*'", start):
        for written in (text, re.sub(r"\}\s*\n\s*\{", "}, {", text)):  # numpy writes no commas
            try:
                return ast.literal_eval(written.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    return found


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
