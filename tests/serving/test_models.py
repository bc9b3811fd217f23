"""Adapters of many methods and bases of many architectures are answered as by plain PEFT, or refused."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch
import transformers
from saved_adapters import lora, saved
from small import tiny_config, tokenizer

from peft_recipes.errors import RecipeError
from peft_recipes.serving.engine import Engine, Job, Limits
from peft_recipes.serving.lane import CHUNK, Row
from peft_recipes.serving.models import load_models
from peft_recipes.serving.sampling import Sampling

OPTIONS = {"task_type": "CAUSAL_LM"}
TARGETS = {"target_modules": ["q_proj", "v_proj"], **OPTIONS}
METHODS = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "ia3": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], **OPTIONS),
    "lokr": peft.LoKrConfig(**TARGETS),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=4, **OPTIONS),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=4, **OPTIONS),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **OPTIONS),
    "own-head": lora(modules_to_save=["lm_head"]),
}
TARGETS_OF = {"mamba": ["in_proj", "x_proj"]}  # PEFT refuses the others
SHARED = {"lora", "rslora", "prompt", "prefix", "p-tuning"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder, words = tmp_path_factory.mktemp("methods") / "base", tokenizer(chat=True)
    transformers.set_seed(0)
    config = tiny_config("llama", len(words))
    config.initializer_range, config.tie_word_embeddings = 0.4, False
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def random_adapter(base, folder, config, seed):
    """Save an adapter, every weight of it moved, so that its answers are its own."""
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.2)
    adapted.save_pretrained(folder)
    return folder


def answers(models, rows) -> list[list[int]]:
    """Greedy answers of 6 tokens, all rows in their lanes together."""
    generated = [[] for _ in rows]
    for (served, row), tokens in zip(rows, generated, strict=True):
        logits = None
        while logits is None:
            logits = served.lane.read_prompt(row)
        row.token = int(logits.argmax())
        tokens.append(row.token)
        served.lane.join(row)
    for _ in range(5):
        for lane in models.lanes:
            for row, logits in zip(lane.rows, lane.step() if lane.rows else [], strict=True):
                row.token = int(logits.argmax())
                next(tokens for (_, each), tokens in zip(rows, generated, strict=True) if each is row).append(row.token)
    for served, row in rows:
        served.lane.leave([row])
    return generated


def plain_answer(base, folder, prompt) -> list[int]:
    """The same by PEFT's own generate, with the adapter alone on a fresh base."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = (model if folder is None else peft.PeftModel.from_pretrained(model, folder)).eval()
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, -6:].tolist()


def test_every_method_in_its_batch_gives_the_answer_of_plain_peft(base, tmp_path):
    folders = {
        name: random_adapter(base, tmp_path / name, config, i) for i, (name, config) in enumerate(METHODS.items())
    }
    models = load_models([str(folder) for folder in folders.values()])
    shared = models.by_name["base"].lane
    assert {name for name in METHODS if models.by_name[name].lane is shared} == SHARED
    prompts = {name: list(range(3, 8 + i)) for i, name in enumerate(models.by_name)}
    together = answers(models, [(served, served.row(prompts[name])) for name, served in models.by_name.items()])
    for name, found in zip(models.by_name, together, strict=True):
        assert found == plain_answer(base, folders.get(name), prompts[name]), name
    assert len(set(map(tuple, together))) == len(together)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "gemma3_text", "mistral", "opt", "bloom", "mamba"])
def test_a_base_of_any_architecture_in_a_batch_or_one_request_at_a_time(tmp_path, kind):
    from architectures import save_tiny_base

    base = save_tiny_base(kind, tmp_path / "base")
    folder = random_adapter(base, tmp_path / "mine", lora(target_modules=TARGETS_OF.get(kind, "all-linear")), 1)
    models = load_models([str(folder)])
    mine, alone = models.by_name["mine"], models.by_name["base"]
    assert mine.lane.exclusive == (kind == "mamba")
    rows = [(alone, alone.row([*range(3, 20)])), (mine, mine.row([4, 5, 6]))]
    groups = [[row] for row in rows] if mine.lane.exclusive else [rows]
    found = [answer for group in groups for answer in answers(models, group)]
    assert found == [plain_answer(base, None, [*range(3, 20)]), plain_answer(base, folder, [4, 5, 6])]


def test_a_prompt_read_in_pieces_has_the_logits_of_one_pass_and_rows_come_and_go(tmp_path):
    words = tokenizer()
    config = tiny_config("llama", len(words))
    config.max_position_embeddings, config.initializer_range = 1024, 0.4
    transformers.set_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    models = load_models([str(saved(tmp_path / "base", tmp_path / "mine", lora()))])
    lane, mine = models.by_name["base"].lane, models.by_name["mine"]
    tokens = torch.randint(len(words), (2 * CHUNK + 9,), generator=torch.Generator().manual_seed(0)).tolist()
    long, short = mine.row(tokens), Row([5, 6, 7])
    assert lane.read_prompt(long) is None and lane.read_prompt(long) is None
    expected = models._alone(mine, tokens)[-1]
    torch.testing.assert_close(lane.read_prompt(long), expected, atol=1e-3, rtol=1e-3)
    lane.read_prompt(short)
    for row in (long, short):
        row.token = 3
        lane.join(row)
    assert lane.step().shape == (2, len(words)) and lane._mask.shape == (2, len(tokens) + 1)
    lane.leave([long])
    assert lane._mask.tolist() == [[1] * 4]  # without the padding that the long row needed
    short.token = 4
    torch.testing.assert_close(lane.step()[0], models._alone(models.by_name["base"], [5, 6, 7, 3, 4])[-1])
    lane.leave([short])
    assert lane.rows == [] and lane._cache is None


def test_what_two_prompts_of_an_adapter_begin_with_is_read_once(base, tmp_path):
    models = load_models([str(random_adapter(base, tmp_path / "mine", lora(), 0))])
    mine, plain = models.by_name["mine"], models.by_name["base"]
    lane, read = mine.lane, []
    forward = lane.forward
    lane.forward = lambda inputs, names: read.append(inputs["input_ids"].shape[1]) or forward(inputs, names)
    first, second, short = [*range(3, 30), 4], [*range(3, 30), 5, 6], [*range(3, 12)]
    for served, prompt, tokens in [(mine, first, 28), (mine, second, 2), (plain, second, 29), (mine, second, 1),
                                   (mine, short, 9), (mine, second, 29)]:  # fmt: skip
        row = served.row(prompt)
        torch.testing.assert_close(lane.read_prompt(row), models._alone(served, prompt)[-1], atol=1e-4, rtol=1e-4)
        assert read.pop() == tokens and row.length == len(prompt)


def test_what_changes_within_a_prompt_is_refused(base, tmp_path):
    folder = random_adapter(base, tmp_path / "activated", lora(alora_invocation_tokens=[5]), 0)
    with pytest.raises(RecipeError, match="activated LoRA"):
        load_models([str(folder)])


def test_short_answers_pass_a_long_one_and_a_full_lane_does_not_hold_up_another(base, tmp_path):
    """The engine's rounds by hand: two places, a long answer first, three short ones, one of a lane of its own."""
    folders = [random_adapter(base, tmp_path / name, METHODS[name], i) for i, name in enumerate(("lora", "ia3"))]
    models = load_models([str(folder) for folder in folders])
    engine, order = Engine(models, Limits(batch_size=2)), []

    def job(name: str, model: str, tokens: int) -> Job:
        def note(kind, value) -> None:
            order.extend([name] if kind == "done" else [])

        served = dataclasses.replace(models.by_name[model], ends=frozenset())
        return Job(served, [3, 4, 5], Sampling(tokens), note)

    short = [job("first", "base", 2), job("second", "lora", 3), job("third", "ia3", 2)]
    engine._waiting.extend([job("long", "lora", 20), *short])
    rounds = []
    while not engine.idle:
        engine._admit()
        engine._read_prompts()
        rounds.append(engine.running)
        for lane in models.lanes:
            if lane.rows:
                engine._step(lane)
    assert order == ["first", "second", "third", "long"] and max(rounds) == 2
