"""Preference pairs: prompt, chosen and rejected answer, from the formats that datasets have for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_recipes.data.conversations import ASSISTANT, USER, is_messages, messages_of, settled
from peft_recipes.data.formats import as_text, needs_template, plain_conversation, plain_prompt, wrong_value
from peft_recipes.data.shapes import Shape, check_named, find_prompt, unused_note, with_extras
from peft_recipes.data.skipped import EMPTY, NO_PROMPT, SkippedRows
from peft_recipes.data.sources import missing_column
from peft_recipes.data.supervised import conversation, converted, refusing
from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    import datasets

    from peft_recipes.recipe.dataset import Dataset

IDENTICAL = "the same answer twice"
_ANSWERS = ("chosen", "rejected")


def preference_shape(rows: datasets.Dataset, source: Dataset) -> Shape:
    """The columns of preferences besides the answers. Raises RecipeError for one that the data lacks."""
    columns = [name for name in rows.column_names if name != "id"]
    for key in _ANSWERS:
        if getattr(source, key) not in columns:
            raise RecipeError(missing_column(getattr(source, key), key, columns, source.path))
    check_named(columns, source, ("prompt", "messages"))
    others = [name for name in columns if name not in (source.chosen, source.rejected)]
    if shape := find_prompt(others, source):
        return with_extras(shape, others, source)
    return Shape("prompt-completion", tools=source.tools if source.tools in others else None)


def preference_notes(rows: datasets.Dataset, source: Dataset) -> list[str]:
    """A note on the columns of preferences that nothing reads, or none."""
    used = preference_shape(rows, source).used() | {source.chosen, source.rejected}
    return unused_note(rows.column_names, used)


def preference_rows(rows: datasets.Dataset, source: Dataset, chat: bool, skipped: SkippedRows) -> datasets.Dataset:
    """Rows with `id`, `prompt`, `chosen`, `rejected` in trl's format. Rows that can't be used go to `skipped`.

    Answers are text or messages. Without a prompt column the prompt is what both answers begin with; a prompt that the
    messages repeat is removed from them. chat: the tokenizer has a chat template, so text with a prompt column becomes
    messages; otherwise messages become text.
    Raises RecipeError: a missing column, a value that is neither text nor messages, too many unusable rows.
    """
    shape = preference_shape(rows, source)

    def example_of(row: dict[str, Any]) -> dict[str, Any] | str:
        pair = _pair(row, shape, source)
        return pair if isinstance(pair, str) else _as_trl(pair, chat, shape.has_prompt, row["id"], source)

    return converted(rows, example_of, shape, source, chat, skipped)


def _pair(row: dict[str, Any], shape: Shape, source: Dataset) -> dict[str, Any] | str:
    """The prompt, chosen and rejected answer of a row, or the reason why it can't be used."""
    from trl.data_utils import maybe_extract_prompt

    values = {key: _read(row, getattr(source, key), source) for key in _ANSWERS}
    if any(_is_empty(values[key]) for key in _ANSWERS):
        return EMPTY
    chosen, rejected = values["chosen"], values["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        kinds = ["text" if isinstance(answer, str) else "a list of messages" for answer in (chosen, rejected)]
        raise RecipeError(
            f"dataset '{source.path}', row {row['id']}: '{source.chosen}' is {kinds[0]} and '{source.rejected}' is "
            f"{kinds[1]}; both must be text, or both messages."
        )
    if chosen == rejected:
        return IDENTICAL
    if shape.has_prompt:
        values["prompt"] = _prompt(row, shape, source)
    values = _same_type(values)
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


def _prompt(row: dict[str, Any], shape: Shape, source: Dataset) -> str | list[dict[str, Any]]:
    """The prompt of a row: text where it is nothing but a text, else messages."""
    value = row[shape.messages or shape.prompt]
    if value in (None, [], "") or (isinstance(value, str) and not value.strip()):
        return ""
    messages = settled([{k: v for k, v in m.items() if k != "train"} for m in conversation(row, source, shape)[0]])
    if isinstance(value, str) and not is_messages(value) and len(messages) == 1:
        return messages[0]["content"]
    return messages


def _same_type(values: dict[str, Any]) -> dict[str, Any]:
    """Prompt and answers of one type: where one is text and the other messages, the text becomes a message."""
    prompt, answers = values.get("prompt"), {key: values[key] for key in _ANSWERS}
    if isinstance(answers["chosen"], str):
        if isinstance(prompt, list) and prompt:
            return {"prompt": prompt, **{key: _message(ASSISTANT, text) for key, text in answers.items()}}
        return values
    from_assistant = all(answer[0]["role"] == ASSISTANT for answer in answers.values())
    if from_assistant and isinstance(prompt, str) and prompt.strip():
        return {"prompt": _message(USER, prompt), **answers}
    return values


def _message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def _without_repeated_prompt(pair: dict[str, Any]) -> dict[str, Any]:
    """The pair without the prompt's messages at the beginning of both answers."""
    prompt = pair["prompt"]
    if isinstance(prompt, list) and all(pair[key][: len(prompt)] == prompt for key in _ANSWERS):
        return {"prompt": prompt, **{key: pair[key][len(prompt) :] for key in _ANSWERS}}
    return pair


def _read(row: dict[str, Any], column: str, source: Dataset) -> Any:
    """An answer as text, or as messages without their weights. Raises RecipeError for another type."""
    value = row[column]
    if value in (None, []) or (isinstance(value, str) and not is_messages(value)):
        return value or ""
    if not isinstance(value, (list, dict, str)):
        raise wrong_value(source.path, row["id"], column, "expected text or a list of messages,", value)
    messages = messages_of(value, refusing(row, column, source))
    return settled([{k: v for k, v in message.items() if k != "train"} for message in messages])


def _is_empty(value: Any) -> bool:
    if isinstance(value, list):
        return not any(message["content"].strip() or message.get("tool_calls") for message in value)
    return not (value or "").strip()


def _as_trl(pair: dict[str, Any], chat: bool, has_prompt: bool, row: str, source: Dataset) -> dict[str, Any]:
    pair = {key: pair[key] for key in ("prompt", *_ANSWERS)}
    if chat:
        if isinstance(pair["prompt"], str) and has_prompt:
            roles = {"prompt": USER, "chosen": ASSISTANT, "rejected": ASSISTANT}
            return {key: _message(role, pair[key]) for key, role in roles.items()}
        return pair
    if isinstance(pair["prompt"], list):
        for key in _ANSWERS:
            if len(pair[key]) > 1 or "tool_calls" in pair[key][0]:
                raise needs_template("answers of several messages, or tool calls,", row, source)
        answers = {key: as_text(pair[key]) for key in _ANSWERS}
        return {"prompt": plain_conversation(pair["prompt"], row, source), **answers}
    return {**pair, "prompt": plain_prompt(pair["prompt"])} if has_prompt else pair
