"""Which columns of a dataset hold prompt and answer, determined from their names, and what is refused by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peft_recipes.data.sources import missing_column
from peft_recipes.errors import RecipeError
from peft_recipes.recipe.dataset import Dataset

if TYPE_CHECKING:
    import datasets

# Names of prompt and answer, tried in this order after the recipe's own.
PAIRS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("prompt", "output"),
    ("prompt", "generation"),
    ("input", "output"),
    ("input", "response"),
    ("input", "target"),
    ("problem", "solution"),
    ("article", "summary"),
    ("document", "summary"),
    ("dialogue", "summary"),
    ("message_1", "message_2"),
    ("INSTRUCTION", "RESPONSE"),
)
CONVERSATIONS = ("messages", "conversations", "conversation")
_CONTEXTS = ("input", "context", "article")  # shown with the prompt
_SYSTEMS = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_TREE = {"message_id", "parent_id", "text", "role"}
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_DEFAULTS = Dataset("")


@dataclass(frozen=True)
class Shape:
    """The columns that are read, each None where there is none. kind: a value of `dataset.format`."""

    kind: str
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    context: str | None = None
    system: str | None = None
    history: str | None = None
    tools: str | None = None
    options: str | None = None

    @property
    def has_prompt(self) -> bool:
        """Whether a column holds prompts, by themselves or in a conversation."""
        return bool(self.prompt or self.messages)

    def used(self) -> set[str]:
        """The names of the columns that are read."""
        return {value for key, value in vars(self).items() if key != "kind" and value is not None}

    def __str__(self) -> str:
        named = [f"{key} from '{name}'" for key, name in vars(self).items() if key != "kind" and name is not None]
        return f"{self.kind} ({', '.join(named)})"


def detect(rows: datasets.Dataset, source: Dataset) -> Shape:
    """The shape of examples with a prompt and an answer, or of plain text: `source.format`, or what the columns say.

    Raises RecipeError: a column that the recipe names and the data lacks, columns of no format, or those of another
    task (preferences, KTO's labels, message trees, pictures), with what to do.
    """
    columns = [name for name in rows.column_names if name != "id"]
    if source.format != "text":  # a further set of plain text lacks the columns of the recipe's own data
        check_named(columns, source, ("prompt", "completion", "messages"))
    if source.format:
        shape = _of_format(columns, source)
    else:
        refuse_other_tasks(rows, source)
        shape = _of_columns(columns, source)
    return shape if shape.kind == "text" else with_extras(shape, columns, source)


def check_named(columns: list[str], source: Dataset, keys: tuple[str, ...]) -> None:
    """Raise RecipeError for a column that the recipe names and the data lacks; a default may be missing."""
    for key in (*keys, "context", "system", "history", "tools"):
        name = getattr(source, key)
        if name not in (getattr(_DEFAULTS, key), *columns):
            raise RecipeError(missing_column(name, key, columns, source.path))


def with_extras(shape: Shape, columns: list[str], source: Dataset) -> Shape:
    """The shape with the columns that are shown besides the prompt: context, system message, earlier turns, tools."""
    free = [name for name in columns if name not in shape.used()]
    context = source.context
    if context is None and shape.messages is None:
        context = next((name for name in _CONTEXTS if name in free), None)
    systems = _SYSTEMS if source.system == _DEFAULTS.system else (source.system,)
    tools = _TOOLS if source.tools == _DEFAULTS.tools else (source.tools,)
    return replace(
        shape,
        context=context,
        system=next((name for name in systems if name in free), None),
        history=source.history if source.history in free else None,
        tools=next((name for name in tools if name in free), None),
        options="chat_template_kwargs" if "chat_template_kwargs" in free else None,
    )


def find_prompt(columns: list[str], source: Dataset) -> Shape | None:
    """The prompt of preferences or labelled answers: the recipe's column, or one of the usual names."""
    if source.prompt in columns:
        return Shape("prompt-completion", prompt=source.prompt)
    conversation = _conversation(columns, source)
    if conversation:
        return Shape("messages", messages=conversation)
    prompt = next((name for name in ("instruction", "question", "query", "input") if name in columns), None)
    return Shape("prompt-completion", prompt=prompt) if prompt else None


def unused_note(columns: list[str], used: set[str]) -> list[str]:
    """A note on the columns that nothing reads, or none."""
    unused = [name for name in columns if name not in used and name != "id"]
    return [f"Columns not used: {', '.join(unused)}."] if unused else []


def refuse_other_tasks(rows: datasets.Dataset, source: Dataset) -> None:
    """Raise RecipeError for the columns of another task, of which sft would train on a part without a word."""
    columns = set(rows.column_names)
    why = None
    if {source.chosen, source.rejected} <= columns and source.completion not in columns:
        why = "are preferences (chosen, rejected). Set task: dpo, or reward"
    elif (label := next((name for name in ("kto_tag", source.label) if name in columns), None)) and (
        _is_boolean(rows[label][:100]) and (label == "kto_tag" or _answered(rows.column_names, source))
    ):
        why = f"are answers that are desirable or not ('{label}' is true or false). Set task: kto"
    elif columns >= _TREE:
        why = (
            "are a tree of messages, one to a row. Flatten it: a row for each leaf, with the messages on the way to it "
            "as a list in a column 'messages'"
        )
    elif "completions" in columns and "labels" in columns:
        why = "are steps with a label each (stepwise supervision), for which there is no task"
    elif "segments" in columns:
        why = (
            "are segments of text with a label each. Write the text before the answer as prompt, the rest as completion"
        )
    elif "input_ids" in columns:
        why = "are token ids already. Name a dataset of text: it is tokenised here, in the base's own chat template"
    elif media := [name for name in _MEDIA if name in columns and any(value for value in rows[name][:100])]:
        why = f"hold pictures or sound ({', '.join(media)}), and this task trains on text alone"
    if why:
        raise RecipeError(f"dataset '{source.path}': its rows {why}. To train on some columns all the same, set "
                          "dataset.format.")  # fmt: skip


def _answered(columns: list[str], source: Dataset) -> bool:
    """Whether the columns hold answers, besides a label."""
    return source.completion in columns or bool(_conversation(columns, source) or _pair(columns, source))


def _is_boolean(values: list[Any]) -> bool:
    words = {value.strip().lower() if isinstance(value, str) else value for value in values if value is not None}
    return bool(words) and all(isinstance(word, bool) or word in ("true", "false") for word in words)


def _conversation(columns: list[str], source: Dataset) -> str | None:
    names = CONVERSATIONS if source.messages == _DEFAULTS.messages else (source.messages,)
    return next((name for name in names if name in columns), None)


def _of_columns(columns: list[str], source: Dataset) -> Shape:
    own = (source.prompt, source.completion)
    if set(own) <= set(columns):
        return Shape("prompt-completion", *own)
    if conversation := _conversation(columns, source):
        return Shape("messages", messages=conversation)
    if pair := _pair(columns, source):
        return Shape("alpaca" if pair == ("instruction", "output") else "prompt-completion", *pair)
    if isinstance(source.text, str) and source.text in columns:
        return Shape("text", completion=source.text)
    known = "messages or conversations; " + "; ".join(", ".join(pair) for pair in PAIRS[:7]) + "; text"
    raise RecipeError(
        f"dataset '{source.path}' has the columns {', '.join(columns)}, which is none of the formats of supervised "
        f"fine-tuning: {known}, ... Name yours: --set dataset.columns.prompt=COLUMN "
        "--set dataset.columns.completion=COLUMN."
    )


def _pair(columns: list[str], source: Dataset) -> tuple[str, str] | None:
    """The first pair of names that exists, with the one that the recipe names where it names one of the two."""
    for prompt, completion in PAIRS:
        pair = (
            source.prompt if source.prompt != _DEFAULTS.prompt else prompt,
            source.completion if source.completion != _DEFAULTS.completion else completion,
        )
        if set(pair) <= set(columns):
            return pair
    return None


def _of_format(columns: list[str], source: Dataset) -> Shape:
    """The shape that `source.format` names. Raises RecipeError if the data lacks a column of it."""
    kind = "messages" if source.format == "sharegpt" else source.format
    if kind == "messages":
        shape = Shape(kind, messages=_conversation(columns, source) or source.messages)
    elif kind == "text":
        shape = Shape(kind, completion=source.text if isinstance(source.text, str) else source.text[0])
    elif kind == "alpaca":
        shape = Shape(kind, "instruction", "output")
    else:
        shape = Shape(kind, *(_pair(columns, source) or (source.prompt, source.completion)))
    if missing := [name for name in (shape.prompt, shape.completion, shape.messages) if name and name not in columns]:
        needed = ", ".join(sorted(shape.used()))
        raise RecipeError(
            f"dataset '{source.path}' has no column '{missing[0]}', which the format '{source.format}' needs "
            f"({needed}). Its columns: {', '.join(columns)}."
        )
    return shape
