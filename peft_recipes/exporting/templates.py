"""Chat templates as other programs need them: without training's marks, and as an Ollama Modelfile."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from peft_recipes.models.bases import end_tokens

SYSTEM, USER, ASSISTANT = "Be brief and kind.", "What is a tree?", "A tall plant."
_SECOND = "And a bush?"
CONVERSATIONS = (
    [("user", USER)],
    [("system", SYSTEM), ("user", USER)],
    [("user", USER), ("assistant", ASSISTANT), ("user", _SECOND)],
    [("system", SYSTEM), ("user", USER), ("assistant", ASSISTANT), ("user", _SECOND)],
)


def messages(conversation: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in conversation]


def servable_template(template: str | None) -> str | None:
    """The template without `{% generation %}`, which marks a training's labels and which only transformers knows.

    The marks become an `if true`, so that the white space around them stays as it is.
    """
    if template is None:
        return None
    template = re.sub(r"(\{%[-+]?)\s*generation\s*([-+]?%\})", r"\1 if true \2", template)
    return re.sub(r"(\{%[-+]?)\s*endgeneration\s*([-+]?%\})", r"\1 endif \2", template)


def render(tokenizer: Any, conversation: list[tuple[str, str]], prompt: bool = True) -> str | None:
    """The text of a conversation; None if the template refuses it (a system message, for some)."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages(conversation), tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, ValueError, TypeError, KeyError, IndexError):
        return None


def end_of_turn(tokenizer: Any) -> str | None:
    """The token by which the template ends an assistant's turn; None without a template or without such a token."""
    if tokenizer.chat_template is None:
        return None
    text = render(tokenizer, [("user", USER), ("assistant", ASSISTANT)], prompt=False) or ""
    after = text.rpartition(ASSISTANT)[2].strip() if ASSISTANT in text else ""
    ends = {tokenizer.convert_ids_to_tokens(token) for token in end_tokens(tokenizer)}
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return next(
        (token for token in sorted(ends | added, key=lambda t: -len(t)) if token and after.startswith(token)), None
    )


@dataclass(frozen=True)
class Turns:
    """A chat template that lays turns one after another: the text before and after each role's content.

    begin: what stands first if there is no system message. prompt: what the assistant's answer begins after.
    """

    begin: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str

    def render(self, conversation: list[tuple[str, str]]) -> str:
        text = "" if conversation[0][0] == "system" else self.begin
        for role, content in conversation:
            before, after = getattr(self, role)
            text += before + content + after
        return text + self.prompt

    def go_template(self) -> str:
        """The template in Ollama's language, Go's."""

        def turn(role: str, keyword: str) -> str:
            before, after = getattr(self, role)
            return f'{{{{ {keyword} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'

        roles = [role for role in ("system", "user", "assistant") if getattr(self, role) is not None]
        turns = "".join(turn(role, "else if" if i else "if") for i, role in enumerate(roles))
        begin = f"{{{{ if not .System }}}}{self.begin}{{{{ end }}}}" if self.begin else ""
        return f"{begin}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{self.prompt}"


def find_turns(tokenizer: Any, without: str = "") -> Turns | None:
    """Read off a chat template what it puts around each turn; None if it does more than that.

    without: a text that is cut off at the start, the BOS token where the server adds one by itself.
    """

    def text(conversation: list[tuple[str, str]], prompt: bool = True) -> str | None:
        rendered = render(tokenizer, conversation, prompt)
        return rendered and rendered.removeprefix(without)

    one, alone, three = text(CONVERSATIONS[0]), text(CONVERSATIONS[0], False), text(CONVERSATIONS[2], False)
    two = text([("user", USER), ("assistant", ASSISTANT)], False)
    if not (one and alone and two and three) or not one.startswith(alone):
        return None
    if not all(part in three for part in (USER, ASSISTANT, _SECOND)) or USER not in alone:
        return None
    after_user = alone.rpartition(USER)[2]
    before, between = three.split(USER, 1)[0], three.split(USER, 1)[1].split(ASSISTANT, 1)[0]
    after_assistant, next_user = two.rpartition(ASSISTANT)[2], three.split(ASSISTANT, 1)[1].split(_SECOND, 1)[0]
    if not (between.startswith(after_user) and next_user.startswith(after_assistant)):
        return None
    before_user = next_user[len(after_assistant) :]
    if not before.endswith(before_user):
        return None
    with_system = text(CONVERSATIONS[1])
    system = None
    if with_system and SYSTEM in with_system and with_system.split(USER, 1)[0].endswith(before_user):
        head, rest = with_system.split(SYSTEM, 1)
        system = head, rest.split(USER, 1)[0].removesuffix(before_user)
    turns = Turns(
        begin=before[: len(before) - len(before_user)],
        system=system,
        user=(before_user, after_user),
        assistant=(between[len(after_user) :], after_assistant),
        prompt=one[len(alone) :],
    )
    checked = [each for each in CONVERSATIONS if system is not None or each[0][0] != "system"]
    return turns if all(turns.render(each) == text(each) for each in checked) else None


def modelfile(model: str, adapter: str | None, tokenizer: Any, adds_bos: bool) -> tuple[str, bool]:
    """An Ollama Modelfile for files beside it, and whether it has a template.

    Without one Ollama looks for the GGUF's chat template among those that it knows, and uses none if it finds none.
    """
    turns = find_turns(tokenizer, tokenizer.bos_token or "" if adds_bos else "") if tokenizer.chat_template else None
    lines = [f"FROM ./{model}", *([f"ADAPTER ./{adapter}"] if adapter else [])]
    usable = turns is not None and not any(mark in str(turns) for mark in ("{{", "}}", '"""'))
    if usable:
        lines += [f'TEMPLATE """{turns.go_template()}"""']
    elif tokenizer.chat_template:
        lines += [
            "# Its chat template can't be written as a Go template of turns; Ollama uses its own, if it knows it."
        ]
    else:
        lines += ["# The model has no chat template: it was trained on plain text.", 'TEMPLATE """{{ .Prompt }}"""']
    stops = dict.fromkeys(filter(None, (end_of_turn(tokenizer), tokenizer.eos_token)))
    return "\n".join([*lines, *(f'PARAMETER stop "{stop}"' for stop in stops)]) + "\n", usable
