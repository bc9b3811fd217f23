"""Preference pairs: prompt, chosen and rejected answer, from the formats that datasets have for them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from peft_recipes.data.formats import as_text, checked_messages, plain_prompt, wrong_value
from peft_recipes.data.sources import missing_column
from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    import datasets

    from peft_recipes.recipe.dataset import Dataset

EMPTY, IDENTICAL, NO_PROMPT = "an empty answer", "the same answer twice", "no prompt"
_ANSWERS = ("chosen", "rejected")


def preference_rows(rows: datasets.Dataset, source: Dataset, chat: bool) -> tuple[datasets.Dataset, Counter[str]]:
    """Rows with `id`, `prompt`, `chosen`, `rejected` in trl's format, and the reasons why others were left out.

    Answers are text or messages. Without a prompt column the prompt is what both answers begin with; a prompt that the
    messages repeat is removed from them. chat: the tokenizer has a chat template, so text with a prompt column becomes
    messages; otherwise messages become text.
    Raises RecipeError: a missing column, a value that is neither text nor messages, no usable pair.
    """
    import datasets

    for key in _ANSWERS:
        if getattr(source, key) not in rows.column_names:
            raise RecipeError(missing_column(getattr(source, key), key, rows.column_names, source.path))
    has_prompt = source.prompt in rows.column_names
    if not has_prompt and source.prompt != "prompt":  # the default may be missing, a name from the user may not
        raise RecipeError(missing_column(source.prompt, "prompt", rows.column_names, source.path))
    keys = (*_ANSWERS, "prompt") if has_prompt else _ANSWERS
    left_out: Counter[str] = Counter()
    examples = []
    for row in rows:
        pair = _pair({key: row[getattr(source, key)] for key in keys}, row["id"], source)
        if isinstance(pair, str):
            left_out[pair] += 1
        else:
            examples.append({"id": row["id"], **_as_trl(pair, chat, has_prompt)})
    if not examples:
        why = ", ".join(f"{count} with {reason}" for reason, count in left_out.items())
        raise RecipeError(f"dataset '{source.path}': no row is a usable pair ({why}).")
    return datasets.Dataset.from_list(examples), left_out


def _pair(values: dict[str, Any], row: str, source: Dataset) -> dict[str, Any] | str:
    """The prompt, chosen and rejected answer of a row, or the reason why it can't be used."""
    from trl.data_utils import maybe_extract_prompt

    for key, value in values.items():
        _check(value, getattr(source, key), row, source.path)
    if any(_is_empty(values[key]) for key in _ANSWERS):
        return EMPTY
    chosen, rejected = values["chosen"], values["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        kinds = ["text" if isinstance(answer, str) else "a list of messages" for answer in (chosen, rejected)]
        raise RecipeError(
            f"dataset '{source.path}', row {row}: '{source.chosen}' is {kinds[0]} and '{source.rejected}' is "
            f"{kinds[1]}; both must be text, or both messages."
        )
    if chosen == rejected:
        return IDENTICAL
    values = _same_type({key: _role_and_content(value) for key, value in values.items()})
    chosen, rejected = values["chosen"], values["rejected"]
    if "prompt" in values and _is_empty(values["prompt"]):
        if isinstance(chosen, str):
            return NO_PROMPT
        values = {key: values[key] for key in _ANSWERS}  # the messages hold the prompt
    if "prompt" not in values and chosen[0] != rejected[0]:
        pair = {"prompt": chosen[:0], **values}
    else:
        pair = _without_repeated_prompt(maybe_extract_prompt(values))
    if isinstance(chosen, list) and not pair["prompt"]:
        return NO_PROMPT
    return EMPTY if any(_is_empty(pair[key]) for key in _ANSWERS) else pair


def _same_type(values: dict[str, Any]) -> dict[str, Any]:
    """Prompt and answers of one type: where one is text and the other messages, the text becomes a message."""
    prompt, answers = values.get("prompt"), {key: values[key] for key in _ANSWERS}
    if isinstance(answers["chosen"], str):
        if isinstance(prompt, list) and prompt:
            return {"prompt": prompt, **{key: _message("assistant", text) for key, text in answers.items()}}
        return values
    from_assistant = all(answer[0]["role"] == "assistant" for answer in answers.values())
    if from_assistant and isinstance(prompt, str) and prompt.strip():
        return {"prompt": _message("user", prompt), **answers}
    return values


def _message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def _without_repeated_prompt(pair: dict[str, Any]) -> dict[str, Any]:
    """The pair without the prompt's messages at the beginning of both answers."""
    prompt = pair["prompt"]
    if isinstance(prompt, list) and all(pair[key][: len(prompt)] == prompt for key in _ANSWERS):
        return {"prompt": prompt, **{key: pair[key][len(prompt) :] for key in _ANSWERS}}
    return pair


def _check(value: Any, column: str, row: str, path: str) -> None:
    if isinstance(value, list) and value:
        checked_messages(value, column, row, path)
    elif value is not None and not isinstance(value, (list, str)):
        raise wrong_value(path, row, column, "expected text or a list of messages,", value)


def _is_empty(value: Any) -> bool:
    if isinstance(value, list):
        return not any(message["content"].strip() for message in value)
    return not (value or "").strip()


def _role_and_content(value: Any) -> Any:
    """Messages without further keys, which may be empty or differ between rows."""
    return [{"role": m["role"], "content": m["content"]} for m in value] if isinstance(value, list) else value


def _as_trl(pair: dict[str, Any], chat: bool, has_prompt: bool) -> dict[str, Any]:
    if chat and isinstance(pair["prompt"], str) and has_prompt:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        return {key: _message(role, pair[key]) for key, role in roles.items()}
    pair = {key: pair[key] for key in ("prompt", *_ANSWERS)}
    if not chat and (has_prompt or isinstance(pair["prompt"], list)):
        pair = {key: as_text(value) for key, value in pair.items()}
        pair["prompt"] = plain_prompt(pair["prompt"])
    return pair
