"""Batched generation: the answers of each prompt alone, whatever the model, its padding and the common prefix."""

from __future__ import annotations

import os

import pytest
import torch
import transformers
from architectures import DECODERS, tiny_architecture
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from small import tokenizer

from peft_recipes.scoring import generation
from peft_recipes.scoring.generation import end_token_ids, generate

PREFIX = [7, 8, 9, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
PROMPTS = [[20 + i % 9, *range(21, 22 + 3 * i % 11)] for i in range(9)]
SHARED = [[*PREFIX, *prompt] for prompt in PROMPTS]
EVERY = os.environ.get("PEFT_RECIPES_EVERY")
SOME = ("llama", "gpt2", "qwen3", "gemma3_text", "mistral", "opt", "bloom", "mamba", "gpt_neox", "mixtral", "phi")


def model_of(kind: str):
    config = tiny_architecture(kind)
    config.vocab_size = 40
    config.initializer_range = 0.3  # logits so far apart that rounding changes no choice
    transformers.set_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def alone(model, prompts, tokens):
    return [generate(model, [prompt], 0, tokens)[0] for prompt in prompts]


@pytest.mark.parametrize("kind", DECODERS if EVERY else SOME)
@pytest.mark.parametrize("prompts", [PROMPTS, SHARED], ids=["different", "common prefix"])
def test_answers_in_batches_are_those_of_each_prompt_alone(kind, prompts):
    model = model_of(kind)
    assert generate(model, prompts, 0, 8, batch_size=4) == alone(model, prompts, 8)


@pytest.mark.parametrize(
    "peft",
    [
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=["lora", "prompt tuning", "prefix tuning"],
)
def test_answers_of_an_adapter_in_batches_are_those_of_each_prompt_alone(peft):
    model = get_peft_model(model_of("llama"), peft).eval()
    assert generate(model, SHARED, 0, 8, batch_size=4) == alone(model, SHARED, 8)


def test_the_common_prefix_is_computed_once(monkeypatch):
    model, computed = model_of("llama"), []
    forward = type(model.model).forward

    def counted(self, *args, **kwargs):
        computed.append(kwargs["input_ids"].numel())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", counted)
    generate(model, SHARED, 0, 2, batch_size=9)
    shared = sum(computed)
    computed.clear()
    monkeypatch.setattr(generation, "_shares_cache", lambda model: False)
    generate(model, SHARED, 0, 2, batch_size=9)
    assert sum(computed) - shared > (len(SHARED) - 3) * len(PREFIX)


def test_a_model_that_does_not_mask_its_padding_is_answered_in_batches_of_equal_lengths(monkeypatch):
    model = model_of("llama")
    forward = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, *args, attention_mask=None, position_ids=None, **kwargs: forward(self, *args, **kwargs),
    )
    sizes, original = [], type(model).generate

    def recorded(self, **kwargs):
        sizes.append(tuple(kwargs["input_ids"].shape))
        return original(self, **kwargs)

    monkeypatch.setattr(type(model), "generate", recorded)
    prompts = [[3, 4, 5], [6, 7, 8], [9, 10, 11], [5, 6, 7, 8, 9, 10]]
    expected = alone(model, prompts, 5)
    sizes.clear()
    assert generate(model, prompts, 0, 5, batch_size=4) == expected
    assert sizes[-2:] == [(1, 6), (3, 3)]


def test_an_answer_stops_at_its_end_token_and_keeps_it():
    model = model_of("llama")
    free = generate(model, PROMPTS, 0, 8, batch_size=4)
    model.generation_config.eos_token_id = [1, free[2][3]]
    stopped = generate(model, PROMPTS, 0, 8, batch_size=4)
    for tokens, whole in zip(stopped, free, strict=True):
        assert tokens == whole[: len(tokens)]
        assert len(tokens) == 8 or tokens[-1] in (1, free[2][3])
    assert len(stopped[2]) <= 4


def test_no_more_tokens_than_the_model_has_positions():
    model = model_of("llama")
    model.config.max_position_embeddings = len(PROMPTS[0]) + 3
    assert len(generate(model, PROMPTS[:1], 0, 50)[0]) <= 3


def test_a_batch_that_does_not_fit_in_memory_is_halved(monkeypatch):
    model = model_of("llama")
    expected, original = alone(model, PROMPTS, 4), type(model).generate

    def limited(self, **kwargs):
        if len(kwargs["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, **kwargs)

    monkeypatch.setattr(type(model), "generate", limited)
    assert generate(model, PROMPTS, 0, 4, batch_size=8) == expected


def test_sampling_leaves_the_random_state_as_it_was_and_gives_the_same_answers_again():
    model = model_of("llama")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    options = {"do_sample": True, "temperature": 2.0}
    first = generate(model, PROMPTS, 0, 6, options, batch_size=4)
    assert torch.rand(1) == expected
    assert generate(model, PROMPTS, 0, 6, options, batch_size=4) == first != generate(model, PROMPTS, 0, 6)


def test_a_short_prompt_beside_a_long_one_has_its_own_room():
    model = model_of("gpt2")
    prompts = [[5, 6, 7], [20 + i % 15 for i in range(92)]]  # of 96 positions
    assert generate(model, prompts, 0, 20, batch_size=4) == alone(model, prompts, 20)
    assert [len(tokens) for tokens in alone(model, prompts, 20)][1] <= 4


def test_the_end_of_a_turn_ends_an_answer_where_the_generation_config_lacks_it():
    model, words = model_of("llama"), tokenizer(chat=True)
    turn = words.convert_tokens_to_ids("<|end|>")
    assert end_token_ids(model) == {1} and end_token_ids(model, words) == {1, turn}
    free = generate(model, PROMPTS, 0, 8, batch_size=4)
    stopped = generate(model, PROMPTS, 0, 8, batch_size=4, ends={1, free[2][3]})
    assert len(stopped[2]) <= 4 and stopped[2][-1] == free[2][len(stopped[2]) - 1]
