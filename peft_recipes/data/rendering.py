"""Token ids and labels of prompts and answers, by the tokenizer's chat template, and what the template leaves out."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from peft_recipes.data.columns import column_values, map_in_memory
from peft_recipes.data.conversations import ASSISTANT, call_names, with_arguments
from peft_recipes.data.packing import IGNORED
from peft_recipes.data.skipped import SkippedRows
from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable

    import datasets

_REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of an answer beside its content
_CHANGED = "earlier answers that the chat template renders differently than the last one"


class TemplateProblem(RecipeError):
    """What the chat template does to a row, such that it can't be used; completes "row 3 has"."""


def tokenised_rows(
    rows: datasets.Dataset,
    columns: list[str],
    tokenise: Callable[[dict[str, Any]], dict[str, Any]],
    skipped: SkippedRows,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The rows that the chat template takes, as they are and tokenised, without `columns`; `skipped` gets the others.

    Raises RecipeError if those are too many.
    """
    keys = ["id"]

    def tokenise_batch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        made = []
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            try:
                made.append({"id": row["id"], **tokenise(row)})
            except TemplateProblem as problem:
                skipped.add(row["id"], problem.problems[0])
        if not made:
            skipped.check()
        keys[:] = made[0] if made else keys
        return {key: [row[key] for row in made] for key in keys}

    examples = map_in_memory(rows, tokenise_batch, batched=True, remove_columns=columns)
    if len(examples) < len(rows):
        skipped.check()
        kept = set(column_values(examples, "id"))
        rows = rows.select([i for i, one in enumerate(column_values(rows, "id")) if one in kept])
    return rows, examples


def labelled(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """input_ids and labels (-100 where there is no loss) of a row with `prompt` and `completion`, as messages.

    The row may have `tools` and `template_options` (JSON) and `trained`, the indices of the messages with a loss.
    Where the chat template leaves out a part of an answer (Qwen3's and DeepSeek's cut the reasoning) or has no place
    for an earlier one, trl's training variant of that template is used, if there is one. Raises TemplateProblem.
    """
    messages = without_second_end(row["prompt"] + row["completion"], template_options(row), tokenizer)
    trained = row.get("trained") or [len(messages) - 1]
    try:
        return _labelled(messages, trained, template_options(row), tokenizer, None)
    except TemplateProblem:
        other = training_template(tokenizer)
        if other is None:
            raise
    return _labelled(messages, trained, template_options(row), tokenizer, other)


def prompt_ids(row: dict[str, Any], tokenizer: Any) -> list[int]:
    """The tokens of a row's prompt, up to where the answer is generated."""
    return _ids(row["prompt"], template_options(row), tokenizer, add_generation_prompt=True)


def tokenised_answers(row: dict[str, Any], keys: list[str], tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """The tokens of a row's prompt, and those of the prompt with each of its answers, the columns `keys`.

    Raises TemplateProblem if the chat template refuses the messages or leaves out a part of an answer.
    """
    prompt = row["prompt"]
    if isinstance(prompt, list):
        return prompt_ids(row, tokenizer), [answered_ids(row, key, tokenizer) for key in keys]
    return without_second_bos(list(tokenizer(prompt)["input_ids"]), tokenizer), [
        text_ids(prompt + row[key], tokenizer) for key in keys
    ]


def answered_ids(row: dict[str, Any], key: str, tokenizer: Any) -> list[int]:
    """The tokens of a row's prompt with an answer, the messages of the column `key`. Raises TemplateProblem."""
    options = template_options(row)
    messages = without_second_end(row["prompt"] + row[key], options, tokenizer)
    check_template(messages, [len(messages) - 1], options, tokenizer)
    return _ids(messages, options, tokenizer)


def template_options(row: dict[str, Any]) -> dict[str, Any]:
    """What a row gives to the chat template besides its messages: tools, and options of its own."""
    options = json.loads(row["template_options"]) if row.get("template_options") else {}
    return {**options, **({"tools": json.loads(row["tools"])} if row.get("tools") else {})}


def common_prefix(first: Any, second: Any) -> int:
    """The number of tokens (or characters) that both sequences begin with."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def _labelled(
    messages: list[dict[str, Any]], trained: list[int], options: dict[str, Any], tokenizer: Any, template: str | None
) -> dict[str, Any]:
    options = {**options, **({"chat_template": template} if template else {})}
    check_template(messages, trained, options, tokenizer)
    last = len(messages) - 1
    if trained == [last]:
        ids = _ids(messages, options, tokenizer)
        # The answer starts where the two differ: a token may span both, or the template close a turn differently.
        start = common_prefix(_ids(messages[:-1], options, tokenizer, add_generation_prompt=True), ids)
        return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}
    if trained == [i for i, message in enumerate(messages) if message["role"] == ASSISTANT] and _is_marked(
        template or tokenizer.chat_template
    ):
        return _by_marks(messages, options, tokenizer)
    return _by_prefixes(messages, trained, options, tokenizer)


def _by_marks(messages: list[dict[str, Any]], options: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Labels where the template marks what the assistant says with {% generation %}."""
    encoded = tokenizer.apply_chat_template(
        with_arguments(messages), return_dict=True, return_assistant_tokens_mask=True, **options
    )
    ids, mask = list(encoded["input_ids"]), encoded["assistant_masks"]
    return {"input_ids": ids, "labels": [token if kept else IGNORED for token, kept in zip(ids, mask, strict=True)]}


def _by_prefixes(
    messages: list[dict[str, Any]], trained: list[int], options: dict[str, Any], tokenizer: Any
) -> dict[str, Any]:
    """Labels of the messages `trained`: what each adds to the conversation before it."""
    ids = _ids(messages, options, tokenizer)
    labels = [IGNORED] * len(ids)
    for i in trained:
        end = len(ids)
        if i < len(messages) - 1:
            until = _ids(messages[: i + 1], options, tokenizer)
            end = len(until)
            if common_prefix(until, ids) < end:
                raise TemplateProblem(_CHANGED)
        start = common_prefix(_ids(messages[:i], options, tokenizer, add_generation_prompt=True), ids)
        labels[start:end] = ids[start:end]
    return {"input_ids": ids, "labels": labels}


def check_template(messages: list[dict[str, Any]], trained: list[int], options: dict[str, Any], tokenizer: Any) -> None:
    """Raise TemplateProblem if the template refuses the messages or leaves out tools or a part of a trained answer."""
    whole = _text(messages, options, tokenizer)
    for tool in options.get("tools") or []:
        if (name := str(tool.get("function", tool).get("name", ""))) not in whole:
            raise TemplateProblem(f"tools, and the chat template leaves out {name!r}")
    for i in trained:
        before = _text(messages[:i], options, tokenizer) if i else ""
        answer = _squeezed(whole[common_prefix(before, whole) :])
        if _squeezed(messages[i]["content"]) not in answer:
            raise TemplateProblem("an answer of which the chat template leaves out a part")
        if unread := [key for key in _REASONING if _squeezed(str(messages[i].get(key) or "")) not in answer]:
            raise TemplateProblem(f"reasoning ({unread[0]}) that the chat template leaves out")
        if missing := [name for name in call_names(messages[i]) if name not in answer]:
            raise TemplateProblem(f"a call of {missing[0]!r} that the chat template leaves out")


def unseen_note(rows: datasets.Dataset, tokenizer: Any, answer: str = "completion", count: int = 100) -> list[str]:
    """Notes on what the template leaves out, keys of messages and prompts' roles, and on special tokens in texts.

    Of the first `count` rows. answer: the column of answers. No note for rows whose prompt is text.
    """
    unseen: dict[str, int] = {}
    unread: set[str] = set()
    special: dict[str, int] = {}
    first = rows.select(range(min(count, len(rows))))
    for row in first:
        if not isinstance(row["prompt"], list):
            return []
        messages = row["prompt"] + row[answer]
        try:
            whole = _squeezed(_text(messages, template_options(row), tokenizer))
        except TemplateProblem:  # counted with the rows that are left out
            continue
        for token in _special_tokens(messages, tokenizer):
            special[token] = special.get(token, 0) + 1
        unread |= {key for message in messages for key in message if key not in str(tokenizer.chat_template)}
        for role in {m["role"] for m in row["prompt"] if _squeezed(m["content"]) not in whole}:
            unseen[role] = unseen.get(role, 0) + 1
    notes = [f"The chat template does not read the messages' {', '.join(sorted(unread))}."] if unread else []
    if special:
        token, number = max(special.items(), key=lambda one: one[1])
        notes.append(
            f"The texts of {number} of the first {len(first)} training rows hold the special token {token}, and the "
            "chat template adds its own: a prompt that has been through a template goes through it twice. Give the "
            "bare texts, or for sft whole rendered ones in a column 'text'."
        )
    return notes + [
        f"The chat template leaves out text of earlier messages of the role '{role}' ({number} of the first "
        f"{len(first)} training rows)."
        for role, number in unseen.items()
    ]


def _special_tokens(messages: list[dict[str, Any]], tokenizer: Any) -> set[str]:
    """The special tokens in what messages say, but an end token at the end of an answer, which is not doubled."""
    end = tokenizer.eos_token or ""
    said = [m["content"].rstrip().removesuffix(end) if m["role"] == ASSISTANT else m["content"] for m in messages]
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {token for token in {*tokenizer.all_special_tokens, *added} if any(token in text for text in said)}


@lru_cache(maxsize=8)
def _training_template(template: str, tokenizer: Any) -> str | None:
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer)
    except ValueError:  # a template that trl does not know
        return None


def training_template(tokenizer: Any) -> str | None:
    """trl's variant of the tokenizer's chat template that keeps every answer whole and marks it, if it has one."""
    template = tokenizer.chat_template
    return _training_template(template, tokenizer) if isinstance(template, str) else None


def _is_marked(template: Any) -> bool:
    from trl.chat_template_utils import has_generation_markers

    return has_generation_markers(template)


def _ids(messages: list[dict[str, Any]], options: dict[str, Any], tokenizer: Any, **more: Any) -> list[int]:
    ids = list(_applied(messages, {**options, "return_dict": False, **more}, tokenizer))
    return without_second_bos(ids, tokenizer)


def _text(messages: list[dict[str, Any]], options: dict[str, Any], tokenizer: Any) -> str:
    return _applied(messages, {**options, "tokenize": False}, tokenizer)


def _applied(messages: list[dict[str, Any]], options: dict[str, Any], tokenizer: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(with_arguments(messages), **options)
    except (TemplateError, TypeError, KeyError) as error:  # raise_exception, or what a template did not foresee
        why = " ".join(str(error).split())[:160]
        raise TemplateProblem(f"messages that the chat template refuses ({why})") from error


def without_second_bos(ids: list[int], tokenizer: Any) -> list[int]:
    """The tokens with one BOS at their beginning: a text may hold the one that the tokenizer adds."""
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def without_second_end(messages: list[dict[str, Any]], options: dict[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
    """The messages without end tokens at the end of answers, where the template adds one."""
    end = tokenizer.eos_token
    ended = [m["role"] == ASSISTANT and bool(end) and m["content"].rstrip().endswith(end) for m in messages]
    if not any(ended) or end + end not in _squeezed(_text(messages, options, tokenizer)):
        return messages
    return [
        {**message, "content": message["content"].rstrip().removesuffix(end)} if is_ended else message
        for message, is_ended in zip(messages, ended, strict=True)
    ]


def text_ids(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text with one BOS, if the tokenizer adds one, and one end token, which the text may have."""
    ids, end = list(tokenizer(text)["input_ids"]), tokenizer.eos_token
    has_end = bool(end) and text.rstrip().endswith(end)  # maybe before a line break, as templates write it
    return without_second_bos(ids if has_end else with_end(ids, tokenizer), tokenizer)


def with_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Append the end-of-text token, if there is one: a model learns to stop only where that token has a label."""
    end = tokenizer.eos_token_id
    return list(ids) if end is None or (ids and ids[-1] == end) else [*ids, end]


def _squeezed(text: str) -> str:
    return "".join(text.split())
