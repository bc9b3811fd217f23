"""What does not fit the base is said before the start, in plans and runs alike."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
from peft import LoraConfig, PromptTuningConfig, TrainableTokensConfig
from small import tiny_config, tokenizer

from peft_recipes import Arm, Dataset, RecipeError, plan, train
from peft_recipes.models.positions import learnt_positions


def refusals(recipe, arm="lora"):
    """The message of `plan` and of `train`, which must be one."""
    messages = []
    for call in (lambda: plan(recipe, [arm]), lambda: train(recipe, arm, output="never")):
        with pytest.raises(RecipeError) as raised:
            call()
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    return messages[0]


@pytest.mark.parametrize("make", ["classify", "instruct", "prefer"])
def test_max_length_beyond_the_positions_is_refused(request, make):
    kind = "distilbert" if make == "classify" else "gpt2"
    recipe = request.getfixturevalue(make)(kind, max_length=65)
    assert "max_length 65 is more than the 64 positions" in refusals(recipe)
    assert plan(request.getfixturevalue(make)(kind, max_length=64), ["lora"])["arms"]["lora"]["memory"]["played"]


def test_the_default_max_length_is_refused_only_where_an_example_is_longer(classify, tmp_path):
    recipe = classify(max_length=256)
    assert recipe.max_length == type(recipe).max_length and plan(recipe, ["lora"])  # its texts have 6 words
    (tmp_path / "long.csv").write_text("text,label\n" + "".join(f"{'film ' * 70}{i},{i % 2}\n" for i in range(40)))
    assert "more than the 64 positions" in refusals(
        classify(max_length=256, dataset=Dataset(str(tmp_path / "long.csv"), train=20, validation=8, test=8))
    )


def test_virtual_tokens_take_positions(instruct):
    arms = {"prompt": Arm(PromptTuningConfig(num_virtual_tokens=20), learning_rate=1e-2)}
    message = refusals(instruct("gpt2", arms=arms), "prompt")
    assert "20 virtual tokens and max_length 48 are more than the 64 positions" in message
    assert "max_length=44" in message


def test_rotary_positions_are_computed_so_a_longer_example_is_only_noted(instruct, tiny, tmp_path):
    shutil.copytree(tiny("llama"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    notes = plan(instruct(model=str(tmp_path)), ["lora"])["notes"]
    assert any("more than the 8 positions" in note for note in notes)


def test_positions_of_each_architecture():
    import torch
    import transformers

    def positions(auto, config):
        with torch.device("meta"):
            return learnt_positions(getattr(transformers, auto).from_config(config))

    small = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32, "ffn_dim": 32, "word_embed_proj_dim": 32}  # fmt: skip
    roberta = transformers.RobertaConfig(**small, max_position_embeddings=514, pad_token_id=1)
    assert positions("AutoModelForSequenceClassification", roberta) == 512
    opt = transformers.OPTConfig(**small, max_position_embeddings=2048)
    assert positions("AutoModelForCausalLM", opt) == 2048
    bart = tiny_config("bart", 60)
    assert positions("AutoModelForSequenceClassification", bart) == 64
    led = transformers.LEDConfig(
        vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_encoder_position_embeddings=128,
        max_decoder_position_embeddings=32, attention_window=8,
    )  # fmt: skip
    assert positions("AutoModelForSeq2SeqLM", led) == 32
    gptj = transformers.GPTJConfig(vocab_size=60, n_positions=64, n_embd=32, n_layer=1, n_head=2, rotary_dim=8)
    assert positions("AutoModelForCausalLM", gptj) == 64
    for kind, auto in (("llama", "AutoModelForCausalLM"), ("t5", "AutoModelForSeq2SeqLM")):
        assert positions(auto, tiny_config(kind, 60)) is None


@pytest.fixture
def with_added_token(tiny, tmp_path):
    """A base whose tokenizer has a token that its embedding lacks."""
    shutil.copytree(tiny("llama"), tmp_path / "base")
    words = tokenizer(chat=True)
    words.add_tokens(["<tool>"])
    words.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_token_without_a_row_in_the_embedding_is_refused(instruct, with_added_token, questions, tmp_path):
    assert plan(instruct(model=str(with_added_token)), ["lora"])  # the data does not use it
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    rows[0]["output"] += " <tool>"
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = Dataset(str(tmp_path / "d.jsonl"), train=32, validation=8, test=8)
    message = refusals(instruct(model=str(with_added_token), dataset=data))
    assert "'<tool>'" in message and "resize_token_embeddings" in message


def test_a_padding_token_without_a_row_is_refused(classify, tiny, tmp_path):
    shutil.copytree(tiny("distilbert"), tmp_path / "base")
    words = tokenizer()
    words.add_special_tokens({"pad_token": "<new pad>"})
    words.save_pretrained(tmp_path / "base")
    assert "'<new pad>'" in refusals(classify(model=str(tmp_path / "base")))


def test_dropping_the_last_batch_must_leave_a_step(classify):
    training = {"num_train_epochs": 1, "per_device_train_batch_size": 128, "dataloader_drop_last": True,
                "use_cpu": True, "bf16": False}  # fmt: skip
    assert "dataloader_drop_last: the 96 training examples" in refusals(classify(training=training))
    training["per_device_train_batch_size"] = 96
    assert plan(classify(training=training), ["lora"])["arms"]["lora"]["steps"] == 1


@pytest.mark.parametrize("options", [
    {"target_modules": ["q_proj", "embed_tokens"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
])  # fmt: skip
def test_an_adapter_on_a_tied_embedding_is_noted_and_merges(instruct, tmp_path, options, caplog):
    caplog.set_level(logging.INFO, "peft_recipes")
    recipe = instruct(arms={"lora": Arm(LoraConfig(r=2, **options), learning_rate=1e-2)})
    [note] = [each for each in plan(recipe)["notes"] if "shares one weight" in each]
    assert "arms.lora.peft.ensure_weight_tying=true" in note
    assert ("not in target_modules" in note) == ("modules_to_save" not in options)
    run = train(recipe, "lora", output=tmp_path)
    assert not run.failed_checks and note in run.data["notes"] and f"Note: {note}" in caplog.messages


def test_a_tie_that_is_kept_needs_no_note(instruct, tmp_path):
    method = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    recipe = instruct(arms={"lora": Arm(method, learning_rate=1e-2)})
    assert not any("shares one weight" in note for note in plan(recipe)["notes"])
    assert not train(recipe, "lora", output=tmp_path).failed_checks


@pytest.mark.parametrize("method", [
    LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),
    LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True),
    TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]),
])  # fmt: skip
def test_an_adapter_on_the_head_is_refused_where_trl_would_not_train_it(instruct, prefer, method):
    for make in (instruct, prefer):
        recipe = make(arms={"lora": Arm(method, learning_rate=1e-2)})
        assert "is on the LM head, and trl's trainers" in refusals(recipe)


def test_seq2seq_trains_an_adapter_that_keeps_the_tie(translate, tmp_path):
    method = LoraConfig(r=2, target_modules=["shared"])
    recipe = translate("bart", arms={"lora": Arm(method, learning_rate=1e-2)})
    [note] = [each for each in plan(recipe)["notes"] if "shares one weight" in each]
    assert note.endswith("arms.lora.peft.ensure_weight_tying=true.")
