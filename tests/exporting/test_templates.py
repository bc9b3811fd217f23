"""Chat templates in other programs: rendered the same, ended by the same token, written for Ollama."""

from __future__ import annotations

import pytest
from byte_base import CHATML
from exported_models import LIKE_GEMMA, bpe_tokenizer

from peft_recipes.exporting.templates import (
    CONVERSATIONS,
    end_of_turn,
    find_turns,
    modelfile,
    render,
    servable_template,
)
from peft_recipes.models.chat_templates import set_chat_template

# With a default system message, as SmolLM2's.
WITH_DEFAULT = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe nice<|im_end|>"
    "\n{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}"


@pytest.mark.parametrize("template", [CHATML, WITH_DEFAULT, LIKE_GEMMA])
def test_a_template_of_turns_is_read_off(template):
    tokenizer = bpe_tokenizer(template, bos=True)
    turns = find_turns(tokenizer)
    for conversation in CONVERSATIONS:
        text = render(tokenizer, conversation)
        assert text is None or turns.render(conversation) == text
    text, usable = modelfile("m.gguf", "a.gguf", tokenizer, adds_bos=True)
    assert usable and 'PARAMETER stop "<|im_end|>"' in text and "<|endoftext|>" not in text.split("PARAMETER")[0]


def test_a_template_that_does_more_is_left_to_ollama():
    tokenizer = bpe_tokenizer(NUMBERED)
    assert find_turns(tokenizer) is None
    text, usable = modelfile("m.gguf", None, tokenizer, adds_bos=False)
    assert not usable and "TEMPLATE" not in text and "ADAPTER" not in text


def test_a_base_model_without_a_template_gets_the_prompt_alone():
    text, _ = modelfile("m.gguf", None, bpe_tokenizer(None), adds_bos=False)
    assert 'TEMPLATE """{{ .Prompt }}"""' in text


def test_training_marks_are_taken_out_and_nothing_else_changes():
    tokenizer = bpe_tokenizer(None)
    set_chat_template(tokenizer, "chatml")
    before = [render(tokenizer, conversation) for conversation in CONVERSATIONS]
    tokenizer.chat_template = servable_template(tokenizer.chat_template)
    assert "generation" not in tokenizer.chat_template.replace("add_generation_prompt", "")
    assert [render(tokenizer, conversation) for conversation in CONVERSATIONS] == before
    assert end_of_turn(tokenizer) == "<|im_end|>"
