"""Prompts and texts near the number of positions: cut off with a word, or refused in one line."""

from __future__ import annotations

import pytest
from peft import PromptTuningConfig
from saved_adapters import lora, saved

from peft_recipes import RecipeError
from peft_recipes.adapters.open import open_adapter
from peft_recipes.inference.generate import Sampling, generate, length_and_speed
from peft_recipes.inference.predict import Predictor


def ask(folder, words, **options):
    return generate({"a": open_adapter(folder)}, ["film " * words], Sampling(max_new_tokens=20, **options))


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    return saved(tiny("gpt2"), tmp_path_factory.mktemp("plain"), lora(target_modules=["c_attn"]))


@pytest.fixture(scope="module")
def prompted(tiny, tmp_path_factory):
    """An adapter with 10 virtual tokens on a base of 64 positions."""
    method = PromptTuningConfig(num_virtual_tokens=10, task_type="CAUSAL_LM")
    return saved(tiny("gpt2"), tmp_path_factory.mktemp("prompted"), method)


def test_an_answer_is_cut_where_the_positions_end(plain):
    answer = ask(plain, 61, repetition_penalty=5.0)[0]["answers"]["a"]
    assert answer["tokens"] <= 3
    assert not answer["cut_off"] or "cut off" in length_and_speed(answer)


def test_a_prompt_that_leaves_no_position_is_refused(plain):
    with pytest.raises(RecipeError, match="Prompt 1 has 64 tokens; the model takes 64, its answer included"):
        ask(plain, 64)


def test_virtual_tokens_take_positions_of_an_answer(prompted):
    assert ask(prompted, 51)[0]["answers"]["a"]["tokens"] <= 3
    with pytest.raises(RecipeError, match="Prompt 1 has 54 tokens; the model takes 54"):
        ask(prompted, 54)


def test_a_text_is_cut_at_the_positions_of_the_base(tiny, tmp_path):
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    import shutil

    shutil.copytree(tiny("distilbert"), base)
    words = AutoTokenizer.from_pretrained(base)
    words.model_max_length = 10_000  # as of many tokenizers that say nothing
    words.save_pretrained(base)
    folder = saved(base, tmp_path / "adapter", lora(target_modules=["q_lin"], task_type="SEQ_CLS"), labels=2)
    assert len(Predictor(folder).texts(["film " * 100])) == 1
