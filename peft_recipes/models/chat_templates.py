"""A chat template for a tokenizer without one, or instead of its own: ChatML, or the recipe's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peft_recipes.errors import RecipeError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED = ("chatml",)
TURN_END = "<|im_end|>"
# ChatML, as Qwen's models use it, with Hermes' tags for tools. {end}: the token that ends a turn.
_CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] + '\\n\\n' }}
    {%- endif %}
    {{- 'You may call these functions:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>{end}\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- message['content'] or '' }}
        {%- for call in message['tool_calls'] or [] %}
            {{- '\\n' if message['content'] or not loop.first }}
            {{- '<tool_call>\\n' + (call['function'] | tojson) + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '{end}\\n' }}
        {%- endgeneration %}
    {%- elif not (tools and loop.first and message['role'] == 'system') %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '{end}\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def template_text(choice: str) -> str:
    """The template that `dataset.chat_template` names: a name of NAMED as it is, a file's text, or the text itself.

    Raises RecipeError for a file that is not there.
    """
    if choice in NAMED or "{" in choice:
        return choice
    path = Path(choice).expanduser()
    if not path.is_file():
        raise RecipeError(
            f"dataset.chat_template: there is no file '{choice}'.{nearest(choice, NAMED)} Name {', '.join(NAMED)}, a "
            "file with a Jinja template, or give the template itself."
        )
    return path.read_text(encoding="utf-8")


def set_chat_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> None:
    """Set a tokenizer's chat template to a recipe's; None keeps its own. Raises RecipeError: no such file, no Jinja."""
    if choice is None:
        return
    text = template_text(choice)
    if text == "chatml":
        end = TURN_END if TURN_END in tokenizer.get_vocab() else tokenizer.eos_token
        text = _CHATML.replace("{end}", end)
    _check(text)
    tokenizer.chat_template = text


def _check(text: str) -> None:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(text)
    except TemplateSyntaxError as error:
        raise RecipeError(f"dataset.chat_template, line {error.lineno}: {error.message}") from error
