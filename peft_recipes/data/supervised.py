"""Examples of supervised fine-tuning, prompt and completion in trl's format, from the shapes that datasets have."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from peft_recipes.data.columns import column_values
from peft_recipes.data.conversations import (
    ASSISTANT,
    SYSTEM,
    USER,
    is_messages,
    messages_of,
    settled,
    tools_of,
    without_nulls,
)
from peft_recipes.data.formats import check_text, needs_template, plain_conversation, wrong_value
from peft_recipes.data.shapes import Shape
from peft_recipes.data.skipped import EMPTY, ENDS_WITHOUT, NO_PROMPT, SkippedRows
from peft_recipes.errors import RecipeError
from peft_recipes.recipe.dataset import ALL, LAST, WEIGHTED

if TYPE_CHECKING:
    import datasets

    from peft_recipes.recipe.dataset import Dataset

TOOLS, OPTIONS, TRAINED = "tools", "template_options", "trained"
SYSTEMS_DIFFER, UNTRAINED = "a system message that differs from its system column", "no message to train on"


def sft_rows(rows: datasets.Dataset, source: Dataset, shape: Shape, chat: bool, skipped: SkippedRows) -> Any:
    """Rows with `id` and `prompt`/`completion` (or `text`) in trl's format. Rows that can't be used go to `skipped`.

    The completion is the last answer. Where more messages than that have a loss, `trained` has the indices of those
    that do among prompt and completion; `tools` and `template_options` are JSON, for the chat template. chat: the
    tokenizer has one, so prompts are messages; otherwise they are plain text.
    """
    if shape.kind == "text":
        return _texts(rows, shape.completion, source, skipped)
    train_on = source.train_on or (WEIGHTED if _has_weights(rows, shape.messages or shape.completion) else LAST)
    nulls = "Json" in str(rows.features)  # a null that stands in the data itself, not one of another row's keys

    def example_of(row: dict[str, Any]) -> dict[str, Any] | str:
        example = _example(row, source, shape, train_on, keep_nulls=nulls)
        return example if chat or isinstance(example, str) else _plain(example, row["id"], source)

    return converted(rows, example_of, shape, source, chat, skipped)


def converted(
    rows: datasets.Dataset,
    example_of: Callable[[dict[str, Any]], dict[str, Any] | str],
    shape: Shape,
    source: Dataset,
    chat: bool,
    skipped: SkippedRows,
) -> datasets.Dataset:
    """Rows in trl's format, with `id` and what they give to the chat template.

    example_of: gives a row's example, or the reason why it can't be used; such rows go to `skipped`. Raises RecipeError
    if those are too many.
    """
    import datasets

    examples = []
    for row in rows:
        example = example_of(row)
        if isinstance(example, str):
            skipped.add(row["id"], example)
        else:
            examples.append({"id": row["id"], **_add_extras(example, row, shape, source, chat)})
    skipped.check()
    same_keys(examples)
    return datasets.Dataset.from_list(examples, on_mixed_types="use_json")


def conversation(row: dict[str, Any], source: Dataset, shape: Shape) -> tuple[list[dict[str, Any]], int]:
    """The messages of a row, and how many of them are the prompt (0 where the row is one conversation).

    Raises RecipeError with the row for a value of another type.
    """
    if shape.messages:
        messages, given = messages_of(row[shape.messages], refusing(row, shape.messages, source)), 0
    else:
        prompt = read_side(row, shape.prompt, USER, source)
        if shape.context and _filled(row[shape.context]):
            context = read_side(row, shape.context, USER, source)[0]["content"]
            asked = [text for text in (prompt[-1]["content"], context) if text.strip()]
            prompt[-1] = {**prompt[-1], "content": "\n\n".join(asked)}
        messages, given = (
            [*prompt, *(read_side(row, shape.completion, ASSISTANT, source) if shape.completion else [])],
            len(prompt),
        )
    earlier = _history(row, shape.history, source) if shape.history else []
    system = row[shape.system] if shape.system else None
    if _filled(system) and not (messages[0]["role"] == SYSTEM and messages[0]["content"] == system):
        if not isinstance(system, str):
            raise wrong_value(source.path, row["id"], shape.system, "expected text,", system)
        earlier = [{"role": SYSTEM, "content": system}, *earlier]
    elif earlier and messages[0]["role"] == SYSTEM:
        earlier, messages = [messages[0], *earlier], messages[1:]
        given = max(given - 1, 0)
    return [*earlier, *messages], given + len(earlier) if given else 0


def _example(
    row: dict[str, Any], source: Dataset, shape: Shape, train_on: str, keep_nulls: bool
) -> dict[str, Any] | str:
    """The example of a row in trl's format, or the reason why it can't be used."""
    if row[shape.messages or shape.completion] in (None, [], ""):
        return EMPTY
    messages, given = conversation(row, source, shape)
    messages = settled(messages, keep_nulls)
    if sum(message["role"] == SYSTEM for message in messages[:2]) == 2:
        return SYSTEMS_DIFFER
    last = len(messages) - 1
    if messages[last]["role"] != ASSISTANT:
        return ENDS_WITHOUT
    if not any(message["content"].strip() for message in messages[:last] if message["role"] != SYSTEM):
        return NO_PROMPT
    trained = _trained(messages, given, train_on, row, source)
    if not trained:
        return UNTRAINED
    if any(not messages[i]["content"].strip() and not messages[i].get("tool_calls") for i in trained):
        return EMPTY
    messages = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    example: dict[str, Any] = {"prompt": messages[:last], "completion": messages[last:]}
    if trained != [last]:
        example[TRAINED] = trained
    return example


def _add_extras(
    example: dict[str, Any], row: dict[str, Any], shape: Shape, source: Dataset, chat: bool = True
) -> dict[str, Any]:
    """The example with what its row gives to the chat template: tools, and options of its own, as JSON.

    chat: whether there is a chat template. Raises RecipeError where there is none and the row needs one.
    """
    if shape.tools and (tools := tools_of(row[shape.tools], refusing(row, shape.tools, source))):
        example[TOOLS] = json.dumps(tools, ensure_ascii=False)
    if shape.options and row[shape.options]:
        example[OPTIONS] = json.dumps(without_nulls(row[shape.options]))
    for key, what in ((TOOLS, "tools"), (OPTIONS, "options of a chat template")):
        if key in example and not chat:
            raise needs_template(what, row["id"], source)
    return example


def _trained(
    messages: list[dict[str, Any]], given: int, train_on: str, row: dict[str, Any], source: Dataset
) -> list[int]:
    """The indices of the messages that have a loss: all answers of a completion, or by `train_on`."""
    answers = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    if any(message.get("train") for message in messages if message["role"] != ASSISTANT):
        raise RecipeError(
            f"dataset '{source.path}', row {row['id']}: a message that is not the assistant's has a weight. Only the "
            "assistant's messages can be trained on."
        )
    if train_on == WEIGHTED:
        return [i for i in answers if i >= given and messages[i].get("train", True)]
    if train_on == ALL:
        return answers
    asked = max((i for i, message in enumerate(messages) if message["role"] == USER), default=0)
    return [i for i in answers if i >= (given or asked)]


def _plain(example: dict[str, Any], row: str, source: Dataset) -> dict[str, Any]:
    """The example as text, for a base without a chat template. Raises RecipeError where a template is needed."""
    answer = example["completion"][0]
    if "tool_calls" in answer:
        raise needs_template("tool calls", row, source)
    return {"prompt": plain_conversation(example["prompt"], row, source), "completion": answer["content"]}


def read_side(row: dict[str, Any], column: str, role: str, source: Dataset) -> list[dict[str, Any]]:
    """A prompt or a completion as messages. A number is text: an answer may be one."""
    value = row[column]
    if is_messages(value) and value != []:
        return messages_of(value, refusing(row, column, source), role if isinstance(value, str) else None)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, (str, type(None))):
        raise wrong_value(source.path, row["id"], column, "expected text or a list of messages,", value)
    return [{"role": role, "content": value or ""}]


def _history(row: dict[str, Any], column: str, source: Dataset) -> list[dict[str, Any]]:
    """Earlier turns, from pairs of what user and assistant said or from messages, maybe as JSON."""
    value = row[column]
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            refusing(row, column, source)(f"expected pairs of user and assistant, got {value[:120]!r}")
    turns: list[dict[str, Any]] = []
    for turn in value or []:
        if isinstance(turn, dict):
            turns += messages_of(turn, refusing(row, column, source))
        elif isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
            turns += [{"role": USER, "content": turn[0]}, {"role": ASSISTANT, "content": turn[1]}]
        else:
            refusing(row, column, source)(f"expected pairs of user and assistant, got {str(turn)[:120]}")
    return turns


def _texts(rows: datasets.Dataset, column: str, source: Dataset, skipped: SkippedRows) -> datasets.Dataset:
    """Rows with `id` and `text`. Any number without a text is left out, as many corpora have blank lines."""
    total = len(rows)
    filled = [i for i, text in enumerate(column_values(rows, column)) if text is not None]
    rows = rows.select(filled) if len(filled) < len(rows) else rows
    check_text(rows, column, source.path)
    rows = rows.select([i for i, text in enumerate(column_values(rows, column)) if text.strip()]).select_columns(
        ["id", column]
    )
    if not len(rows):
        raise RecipeError(f"dataset '{source.path}': no row has a text to train on.")
    skipped.blank += total - len(rows)
    return rows.rename_column(column, "text") if column != "text" else rows


def _has_weights(rows: datasets.Dataset, column: str) -> bool:
    """Whether any message of any row says whether it is trained on."""

    def refuse(_: str) -> NoReturn:
        raise ValueError

    for value in column_values(rows, column):
        try:
            if any("train" in message for message in messages_of(value, refuse)):
                return True
        except ValueError:  # named with its row when it is read
            continue
    return False


def same_keys(examples: list[dict[str, Any]]) -> None:
    """Give every example the optional columns that any of them has."""
    for key, missing in ((TOOLS, ""), (OPTIONS, ""), (TRAINED, [])):
        if any(key in example for example in examples):
            for example in examples:
                example.setdefault(key, missing)


def _filled(value: Any) -> bool:
    return value is not None and bool(str(value).strip())


def refusing(row: dict[str, Any], column: str, source: Dataset) -> Any:
    """A function that raises RecipeError with the row and column of a value, and the reason it gets."""

    def refuse(why: str) -> NoReturn:
        raise RecipeError(f"dataset '{source.path}', row {row['id']}, column '{column}': {why}.")

    return refuse
