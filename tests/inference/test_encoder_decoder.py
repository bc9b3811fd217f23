"""Adapters of an encoder-decoder after training: generate, chat, check, merge, the card's code."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
import torch
from card_code import code_in
from peft import LoraConfig, PeftModel
from saved_adapters import saved
from small import tokenizer
from transformers import AutoModelForSeq2SeqLM
from typer.testing import CliRunner
from warm_python import warm

from peft_recipes import train
from peft_recipes.adapters.open import open_adapter
from peft_recipes.cli.app import app

PROMPT = "the film was very warm"
TARGETS = {"t5": ["q", "v"], "bart": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module", params=["t5", "bart"])
def adapter(request, tiny, tmp_path_factory):
    """A base that never ends its answer, and a LoRA of it that plain PEFT saved."""
    root, kind = tmp_path_factory.mktemp(request.param), request.param
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny(kind))
    if kind == "bart":  # its answers would all be alike
        for weight in model.parameters():
            weight.data.mul_(8)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.generation_config.num_beams = 3  # as summarisers are stored: greedy all the same
    model.save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    config = LoraConfig(r=2, target_modules=TARGETS[kind], task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    return saved(root / "base", root / "mine", config, auto_class=AutoModelForSeq2SeqLM)


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def plain(folder, adapted):
    """The answer of plain transformers and PEFT."""
    words, model = tokenizer(), AutoModelForSeq2SeqLM.from_pretrained(folder.parent / "base").eval()
    model = PeftModel.from_pretrained(model, folder).eval() if adapted else model
    made = model.generate(**words(PROMPT, return_tensors="pt"), max_new_tokens=6, num_beams=1, do_sample=False)
    return words.decode(made[0], skip_special_tokens=True).strip()


def test_base_adapter_and_merged_model_answer_as_in_plain_peft(adapter):
    done = call("generate", adapter, "--prompt", PROMPT, "--merged", "--json", "--max-new-tokens", "6")
    assert done.exit_code == 0, done.stderr
    answers = json.loads(done.stdout)[0]["answers"]
    assert {name: made["text"] for name, made in answers.items()} == {
        "base": plain(adapter, False), "mine": plain(adapter, True), "mine-merged": plain(adapter, True),
    }  # fmt: skip
    assert all(made["tokens"] == 6 and made["cut_off"] for made in answers.values())
    assert plain(adapter, True) != plain(adapter, False)


def test_its_task_is_inferred_and_it_is_checked_and_merged(adapter, tmp_path):
    assert open_adapter(adapter).recipe.task == "seq2seq"
    checked = call("check", adapter, "--json")
    assert checked.exit_code == 0, checked.output
    findings = {row["name"]: row["ok"] for row in json.loads(checked.stdout)}
    assert findings["fits"] is True and findings["merge"] is True
    merged = call("merge", adapter, "--output", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    own = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(adapter.parent / "base"), adapter).eval()
    ids = tokenizer()(PROMPT, return_tensors="pt")
    ids["decoder_input_ids"] = torch.tensor([[0, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(model(**ids).logits, own(**ids).logits, rtol=1e-3, atol=1e-3)


def test_chat_and_predict_refuse_it_by_name(adapter):
    for command, why in ((["generate", adapter, "--chat"], "is for seq2seq, which has no turns: ask with --prompt"),
                         (["predict", adapter, "--text", PROMPT], "generate")):  # fmt: skip
        done = call(*command)
        assert done.exit_code == 2 and why in " ".join(done.output.replace("│", " ").split()), done.output


def test_a_prompt_beyond_the_encoders_positions_is_an_error(adapter):
    done = call("generate", adapter, "--prompt", "film " * 70, "--max-new-tokens", "2")
    if "bart" in str(adapter):
        assert done.exit_code == 2 and "Prompt 1 has 70 tokens; the model takes 64" in " ".join(done.output.split())
    else:
        assert done.exit_code == 0  # relative positions have no limit


def test_a_runs_card_loads_it_and_its_outputs_are_those_of_the_training(translate, tmp_path):
    run = train(translate(), "lora", output=tmp_path)
    checked = json.loads(call("check", run.folder, "--json").stdout)
    assert {row["name"]: row["ok"] for row in checked}["reload"] is True
    code = code_in((run.folder / "README.md").read_text())
    assert "AutoModelForSeq2SeqLM" in code
    code = re.sub(r"base_id = .*", f"base_id = {translate().model!r}", code)
    done = subprocess.run(warm("-c", code), cwd=run.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == run.data["answers"][0]["answer"]
