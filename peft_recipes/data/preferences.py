"""Preference data: a prompt, the answer that was chosen and the one that was rejected, however a dataset says it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from peft_recipes.data.columns import plain_prompt, said
from peft_recipes.data.sources import missing_column
from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    import datasets

    from peft_recipes.recipe.dataset import Dataset

EMPTY, IDENTICAL, NO_PROMPT = "an empty answer", "the same answer twice", "no prompt"


def preference_rows(rows: datasets.Dataset, source: Dataset, chat: bool) -> tuple[datasets.Dataset, Counter[str]]:
    """Rows with `id`, `prompt`, `chosen`, `rejected`, as trl takes them, and why how many were left out.

    Answers are text or messages. Without a prompt column (or with one that the messages repeat) the prompt is what
    both begin with. chat: the tokenizer has a chat template: then a question becomes a message, otherwise messages
    become text; a text whose prompt is only its beginning stays as it is.
    Raises RecipeError: a column that is missing, a value that is neither text nor messages, no pair that can be used.
    """
    import datasets

    for key in ("chosen", "rejected"):
        if getattr(source, key) not in rows.column_names:
            raise RecipeError(missing_column(getattr(source, key), key, rows.column_names, source.path))
    explicit = source.prompt in rows.column_names
    if not explicit and source.prompt != "prompt":  # the user's own word, so not one that may be missing
        raise RecipeError(missing_column(source.prompt, "prompt", rows.column_names, source.path))
    left_out: Counter[str] = Counter()
    made = []
    for row in rows:
        pair = {"chosen": row[source.chosen], "rejected": row[source.rejected]}
        if explicit:
            pair["prompt"] = row[source.prompt]
        found = _pair(pair, row["id"], source)
        if isinstance(found, str):
            left_out[found] += 1
        else:
            made.append({"id": row["id"], **_as_trl(found, chat, "prompt" in pair)})
    if not made:
        why = ", ".join(f"{count} with {reason}" for reason, count in left_out.items())
        raise RecipeError(f"dataset '{source.path}': no row is a pair to learn from ({why}).")
    return datasets.Dataset.from_list(made), left_out


def _pair(given: dict[str, Any], row: str, source: Dataset) -> dict[str, Any] | str:
    """A row's prompt, chosen and rejected answer, as it says them; or why it can't be used."""
    from trl.data_utils import maybe_extract_prompt

    for key, value in given.items():
        _check(value, getattr(source, key), row, source.path)
    if any(_is_empty(given[key]) for key in ("chosen", "rejected")):
        return EMPTY
    chosen, rejected = given["chosen"], given["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RecipeError(
            f"dataset '{source.path}', row {row}: '{source.chosen}' is {_kind(chosen)} and '{source.rejected}' is "
            f"{_kind(rejected)}; both must be text, or both messages."
        )
    if chosen == rejected:
        return IDENTICAL
    given = _alike({key: _plain(value) for key, value in given.items()})
    chosen, rejected = given["chosen"], given["rejected"]
    if "prompt" in given and _is_empty(given["prompt"]):
        if isinstance(chosen, str):
            return NO_PROMPT
        given = {key: given[key] for key in ("chosen", "rejected")}  # then the messages hold it
    if "prompt" not in given and chosen[0] != rejected[0]:
        pair = {"prompt": chosen[:0], "chosen": given["chosen"], "rejected": given["rejected"]}
    else:
        pair = _without_repeated_prompt(maybe_extract_prompt(given))
    if isinstance(chosen, list) and not pair["prompt"]:
        return NO_PROMPT
    return EMPTY if any(_is_empty(pair[key]) for key in ("chosen", "rejected")) else pair


def _alike(given: dict[str, Any]) -> dict[str, Any]:
    """Prompt and answers of one kind: text beside messages becomes a message where it can only be one."""
    prompt, answers = given.get("prompt"), {key: given[key] for key in ("chosen", "rejected")}
    if isinstance(prompt, list) and prompt and isinstance(given["chosen"], str):
        return {"prompt": prompt, **{k: [{"role": "assistant", "content": text}] for k, text in answers.items()}}
    alone = isinstance(given["chosen"], list) and all(answer[0]["role"] == "assistant" for answer in answers.values())
    if alone and isinstance(prompt, str) and prompt.strip():
        return {"prompt": [{"role": "user", "content": prompt}], **answers}
    return given


def _without_repeated_prompt(pair: dict[str, Any]) -> dict[str, Any]:
    """Messages that begin with the prompt's once more, without them."""
    prompt = pair["prompt"]
    repeated = isinstance(prompt, list) and prompt and all(
        pair[key][: len(prompt)] == prompt for key in ("chosen", "rejected")
    )  # fmt: skip
    return {"prompt": prompt, **{k: pair[k][len(prompt) :] for k in ("chosen", "rejected")}} if repeated else pair


def _check(value: Any, column: str, row: str, path: str) -> None:
    if isinstance(value, list) and value:
        said(value, column, row, path)
    elif not isinstance(value, list) and not isinstance(value, str) and value is not None:
        raise RecipeError(
            f"dataset '{path}', row {row}, column '{column}': expected text or a list of messages, got {value!r} "
            f"({type(value).__name__})."
        )


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "a list of messages"


def _is_empty(value: Any) -> bool:
    if isinstance(value, list):
        return not any(message["content"].strip() for message in value)
    return not (value or "").strip()


def _plain(value: Any) -> Any:
    """Messages as role and content alone: a dataset may give them empty further keys, or differing ones."""
    return [{"role": m["role"], "content": m["content"]} for m in value] if isinstance(value, list) else value


def _as_trl(pair: dict[str, Any], chat: bool, explicit: bool) -> dict[str, Any]:
    if chat and isinstance(pair["prompt"], str) and explicit:
        said_by = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        return {key: [{"role": role, "content": pair[key]}] for key, role in said_by.items()}
    if not chat and (explicit or isinstance(pair["prompt"], list)):
        text = {key: _joined(pair[key]) for key in ("prompt", "chosen", "rejected")}
        return {**text, "prompt": plain_prompt(text["prompt"])}
    return {key: pair[key] for key in ("prompt", "chosen", "rejected")}


def _joined(value: str | list[dict[str, str]]) -> str:
    return value if isinstance(value, str) else "\n\n".join(message["content"] for message in value)
