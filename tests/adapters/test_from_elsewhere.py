"""Adapters and bases as other tools save them: checked, merged and asked as plain PEFT would."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from saved_adapters import lora, saved
from small import tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from peft_recipes import RecipeError
from peft_recipes.adapters.check import check_adapter
from peft_recipes.adapters.merge import merge_adapter
from peft_recipes.adapters.open import open_adapter
from peft_recipes.cli.app import app
from peft_recipes.inference.generate import Sampling, generate
from peft_recipes.inference.predict import Predictor
from peft_recipes.inference.variants import Variants

IDS = {"input_ids": torch.arange(3, 19)[None]}


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def logits(model):
    with torch.no_grad():
        return model.eval()(**IDS).logits


def failures(folder, **options):
    return [(each.name, each.message) for each in check_adapter(folder, **options) if each.ok is False]


def edit(folder, **changes):
    """Change an adapter's configuration, as another tool or a newer PEFT writes it."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def base_model(folder, tie, dtype=torch.float32, width=32, **options):
    """Save a random Llama with a chat tokenizer."""
    from small import tiny_config

    words = tokenizer(chat=True)
    config = tiny_config("llama", len(words), width)
    config.tie_word_embeddings = tie
    for name, value in options.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return base_model(tmp_path_factory.mktemp("untied") / "base", tie=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return base_model(tmp_path_factory.mktemp("tied") / "base", tie=True)


def plain(base, folder):
    """Base and adapter as plain PEFT loads them."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


def merged_logits(folder):
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_the_head_or_the_embedding_is_checked_and_merged_as_by_peft(untied, tmp_path, target):
    folder = saved(untied, tmp_path / "adapter", lora(target_modules=["q_proj", target]))
    assert failures(folder) == []
    merge_adapter(folder, tmp_path / "merged")
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), logits(plain(untied, folder)))


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["q_proj", "embed_tokens", "lm_head"]])
def test_an_adapter_on_a_tied_embedding_is_merged_into_two_weights(tied, tmp_path, targets):
    folder = saved(tied, tmp_path / "adapter", lora(target_modules=targets))
    assert failures(folder) == []
    merge_adapter(folder, tmp_path / "merged")
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), logits(plain(tied, folder)))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def test_an_adapter_that_keeps_the_tie_is_merged_into_one_weight(tied, tmp_path):
    folder = saved(tied, tmp_path / "adapter", lora(target_modules=["embed_tokens"], ensure_weight_tying=True))
    merge_adapter(folder, tmp_path / "merged")
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), logits(plain(tied, folder)), atol=1e-4, rtol=1e-4)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True


def resized(base, folder, rows, **options):
    """An adapter that was trained after its user had resized the vocabulary."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    from peft import get_peft_model

    adapted = get_peft_model(model, lora(**options))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.3)
    adapted.save_pretrained(folder)
    return logits(adapted)


@pytest.mark.parametrize("by", [2, -3])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_an_adapter_with_a_resized_vocabulary_is_checked_merged_and_asked(request, tmp_path, by, options, kind):
    base = request.getfixturevalue(kind)
    rows = len(tokenizer()) + by
    expected = resized(base, tmp_path / "adapter", rows, **options)
    assert failures(tmp_path / "adapter") == []
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), expected)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size == rows
    before = logits(AutoModelForCausalLM.from_pretrained(base))
    opened = open_adapter(tmp_path / "adapter")
    other = saved(base, tmp_path / "other")

    variants = Variants({"resized": opened, "other": open_adapter(other)})
    torch.testing.assert_close(logits(variants.model("resized")), expected)
    torch.testing.assert_close(logits(variants.model("other")), logits(plain(base, other)))
    torch.testing.assert_close(logits(variants.model("base")), before)  # its own embeddings


def test_a_classifier_with_a_resized_vocabulary_predicts_as_by_peft(tiny, tmp_path):
    from peft import get_peft_model

    words = tokenizer()
    words.add_tokens(["brilliant"])
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny("distilbert"), num_labels=2)
    model.resize_token_embeddings(len(words), mean_resizing=False)
    method = lora(target_modules=["q_lin"], task_type="SEQ_CLS", modules_to_save=["pre_classifier"])
    adapted = get_peft_model(model, method)
    adapted.save_pretrained(tmp_path / "adapter")
    words.save_pretrained(tmp_path / "adapter")
    assert failures(tmp_path / "adapter") == []
    found = Predictor(tmp_path / "adapter").texts(["a brilliant film"])[0]
    with torch.no_grad():
        expected = adapted.eval()(**words("a brilliant film", return_tensors="pt")).logits.softmax(-1)[0]
    assert list(found["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")


def test_adapters_that_bring_embeddings_are_not_combined(untied, tmp_path):
    resized(untied, tmp_path / "resized", len(tokenizer()) + 2)
    other = saved(untied, tmp_path / "other")
    done = call("combine", other, tmp_path / "resized", "--output", tmp_path / "out")
    assert done.exit_code == 2 and "embeddings of its own" in done.stderr


def test_adapters_on_the_head_are_combined(untied, tmp_path):
    folders = [saved(untied, tmp_path / name, lora(target_modules=["q_proj", "lm_head"]), seed)
               for seed, name in enumerate(("a", "b"))]  # fmt: skip
    done = call("combine", *folders, "--method", "cat", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    model = plain(untied, folders[0])
    model.load_adapter(folders[1], "second")
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    torch.testing.assert_close(logits(plain(untied, tmp_path / "out")), logits(model), atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def own_tokenizer(tmp_path_factory):
    """An adapter with a chat template and an end token of its own, on a base whose tokenizer has neither."""
    root = tmp_path_factory.mktemp("own")
    base_model(root / "base", tie=False)
    (root / "base" / "chat_template.jinja").unlink()
    folder, words = saved(root / "base", root / "adapter"), tokenizer(chat=True)
    words.eos_token = "<|end|>"
    words.save_pretrained(folder)
    return folder


def test_the_adapters_own_tokenizer_is_merged_with_it(own_tokenizer, tmp_path):
    assert AutoTokenizer.from_pretrained(own_tokenizer.parent / "base").chat_template is None
    assert failures(own_tokenizer) == []
    merge_adapter(own_tokenizer, tmp_path / "merged")
    words = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert words.chat_template and words.eos_token == "<|end|>"
    ends = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config.eos_token_id
    assert words.eos_token_id in ends


def test_the_adapters_own_template_and_end_are_used_for_answers(own_tokenizer):
    answered = generate({"a": open_adapter(own_tokenizer)}, ["good film"], Sampling(max_new_tokens=6))
    words = AutoTokenizer.from_pretrained(own_tokenizer)
    inputs = words.apply_chat_template([{"role": "user", "content": "good film"}], add_generation_prompt=True,
                                       return_dict=True, return_tensors="pt")  # fmt: skip
    model = plain(own_tokenizer.parent / "base", own_tokenizer).eval()
    ends = [model.generation_config.eos_token_id, words.eos_token_id]
    made = model.generate(**inputs, max_new_tokens=6, eos_token_id=ends)[0, inputs["input_ids"].shape[1] :]
    assert answered[0]["answers"]["a"]["text"] == words.decode(made, skip_special_tokens=True).strip()


def without_task(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"task_type": None, "auto_mapping": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_without_a_task_type_the_bases_class_says_what_the_adapter_is_for(untied, tiny, tmp_path):
    causal = without_task(saved(untied, tmp_path / "causal"))
    assert failures(causal) == [] and open_adapter(causal).recipe.task == "sft"
    assert call("generate", causal, "--base", untied, "--prompt", "good film", "--max-new-tokens", "2").exit_code == 0
    encoder = without_task(saved(tiny("distilbert"), tmp_path / "encoder", lora(target_modules=["q_lin"],
                           task_type="SEQ_CLS"), labels=2))  # fmt: skip
    with pytest.raises(RecipeError, match="Set task_type there to one of CAUSAL_LM, SEQ_CLS"):
        open_adapter(encoder)


@pytest.mark.parametrize("problem_type", ["regression", None])
def test_an_adapter_with_one_output_gives_a_number(tiny, tmp_path, problem_type):
    base = tmp_path / "base"
    shutil.copytree(tiny("distilbert"), base)
    words = tokenizer()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, problem_type=problem_type)
    from peft import get_peft_model

    method = lora(target_modules=["q_lin"], task_type="SEQ_CLS", modules_to_save=["pre_classifier"])
    adapted = get_peft_model(model, method)
    adapted.save_pretrained(tmp_path / "adapter")
    found = Predictor(tmp_path / "adapter").texts(["a good film"])
    with torch.no_grad():
        expected = adapted.eval()(**words("a good film", return_tensors="pt")).logits.item()
    assert found == [{"value": pytest.approx(expected, rel=1e-4)}]
    done = call("predict", tmp_path / "adapter", "--text", "a good film")
    assert done.exit_code == 0 and "%" not in done.stdout and f"{expected:.4g}" in done.stdout


def test_a_relative_base_is_looked_up_as_by_peft_or_named(tmp_path, monkeypatch):
    base_model(tmp_path / "base", tie=False)
    monkeypatch.chdir(tmp_path)
    saved("base", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "./base"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert failures("adapter") == []
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = call("check", "../adapter")
    assert done.exit_code == 2 and "'./base'" in done.stderr and "--base" in done.stderr
    config["base_model_name_or_path"] = "../base"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "elsewhere" / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere" / "deeper")
    done = call("check", "../../adapter")
    assert done.exit_code == 2 and "--base ../../adapter/../base" in done.stderr


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_a_merged_model_is_stored_as_its_base_is_or_as_asked(tmp_path, dtype):
    base = base_model(tmp_path / "base", tie=True, dtype=torch.bfloat16)
    folder = saved(base, tmp_path / "adapter")
    done = call("merge", folder, "--output", tmp_path / "merged", *(["--dtype", dtype] if dtype else []))
    assert done.exit_code == 0, done.stderr
    stored = dtype or "bfloat16"
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == stored
    size, base_size = ((path / "model.safetensors").stat().st_size for path in (tmp_path / "merged", base))
    assert size / base_size == pytest.approx(2 if stored == "float32" else 1, rel=0.1)
    assert stored in done.stdout and " kB" in done.stdout
    exact = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    gap = (merged_logits(tmp_path / "merged") - logits(exact)).abs().max()
    assert gap < (1e-5 if stored == "float32" else 2e-2)


def test_an_unknown_dtype_is_refused(untied, tmp_path):
    done = call("merge", saved(untied, tmp_path / "a"), "--output", tmp_path / "m", "--dtype", "bf16")
    assert done.exit_code == 2 and "bfloat16" in done.stderr


def test_a_weight_that_float16_cannot_hold_is_refused(tmp_path):
    base = base_model(tmp_path / "base", tie=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    model.save_pretrained(base)
    done = call("merge", saved(base, tmp_path / "a"), "--output", tmp_path / "m", "--dtype", "float16")
    assert done.exit_code == 1 and "--dtype bfloat16" in done.stderr and not (tmp_path / "m").exists()


def test_sampling_defaults_of_a_base_are_merged_as_they_came(tmp_path):
    base = base_model(tmp_path / "base", tie=True)
    defaults = {"eos_token_id": 1, "temperature": 0.9, "top_p": 0.6}
    (base / "generation_config.json").write_text(json.dumps(defaults))
    merge_adapter(saved(base, tmp_path / "adapter"), tmp_path / "merged")
    stored = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert stored["temperature"] == 0.9 and stored["top_p"] == 0.6 and not stored.get("do_sample")


def test_a_full_disk_ends_a_merge_in_one_line(untied, tmp_path, monkeypatch):
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def full(*args, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    folder = saved(untied, tmp_path / "adapter")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    done = call("merge", folder, "--output", tmp_path / "out" / "merged")
    assert done.exit_code == 1 and "disk is full" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["tuned-norm", "tuned-lm_head", "lora", "q_proj"])
def test_an_adapter_may_be_named_like_a_module_that_it_stores(untied, tmp_path, name):
    module = "lm_head" if name.endswith("lm_head") else "norm"
    folder = saved(untied, tmp_path / name, lora(modules_to_save=[module]))
    model = Variants({name: open_adapter(folder)}).model(name)
    torch.testing.assert_close(logits(model), logits(plain(untied, folder)))


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_an_adapter_initialised_from_the_base_is_asked_as_by_peft(untied, tmp_path, init):
    folder = saved(untied, tmp_path / "adapter", lora(init_lora_weights=init))
    other = saved(untied, tmp_path / "other", seed=1)
    variants = Variants({"adapter": open_adapter(folder), "other": open_adapter(other)}, merged=True)
    for name, path in {"adapter": folder, "other": other}.items():
        torch.testing.assert_close(logits(variants.model(name)), logits(plain(untied, path)))
    torch.testing.assert_close(logits(variants.model("adapter-merged")), logits(plain(untied, folder)))
    base = AutoModelForCausalLM.from_pretrained(untied)
    torch.testing.assert_close(logits(variants.model("base")), logits(base))


def test_an_adapter_that_changes_the_base_shares_it_with_no_other(untied, tmp_path):
    folder = saved(untied, tmp_path / "adapter", lora(init_lora_weights="pissa"))
    other = saved(untied, tmp_path / "other", seed=1)
    for folders in ([folder, other], [other, folder]):
        result = call("combine", *folders, "--output", tmp_path / "both")
        assert result.exit_code == 2 and "begins at a part of the base's weights (pissa)" in result.output


@pytest.mark.parametrize("init", ["loftq", "corda"])
def test_an_initialisation_that_needs_more_than_the_base_is_refused_by_name(untied, tmp_path, init):
    folder = saved(untied, tmp_path / "adapter")
    edit(folder, init_lora_weights=init, loftq_config={"loftq_bits": 4})
    assert [name for name, message in failures(folder) if f"init_lora_weights is '{init}'" in message] == ["fits"]
    result = call("merge", folder, "--output", tmp_path / "merged")
    assert result.exit_code == 2 and "set it to true in adapter_config.json" in " ".join(result.output.split())


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_an_encoder_decoder_classifier_from_elsewhere_is_checked_and_merged(tiny, tmp_path, kind):
    targets = {"bart": ["q_proj"], "t5": ["q"]}[kind]
    base = tiny(kind)
    folder = saved(base, tmp_path / "adapter", lora(target_modules=targets, task_type="SEQ_CLS"), labels=3)
    assert failures(folder) == []
    merge_adapter(folder, tmp_path / "merged")


def test_options_of_a_newer_peft_are_named(untied, tmp_path):
    folder = saved(untied, tmp_path / "adapter")
    edit(folder, use_something_new=True, another=None)
    for command in (["check", folder], ["merge", folder, "--output", tmp_path / "merged"]):
        result = call(*command)
        assert result.exit_code == 0
        assert "does not know use_something_new" in " ".join(result.output.split())
        assert "another" not in result.output


def test_trained_biases_and_tokens_are_asked_next_to_the_base_and_others(tiny, untied, tmp_path):
    gpt2, on_gpt2 = tiny("gpt2"), {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    biases = saved(gpt2, tmp_path / "biases", lora(bias="all", **on_gpt2))
    path = biases / "adapter_model.safetensors"
    save_file({name: t + 0.1 if name.endswith("bias") else t for name, t in load_file(path).items()}, path)
    plain_lora = saved(gpt2, tmp_path / "plain", lora(**on_gpt2), seed=1)
    check_variants(gpt2, biases, plain_lora)
    tokens = saved(untied, tmp_path / "tokens", lora(trainable_token_indices=[4, 5]))
    norm = saved(untied, tmp_path / "norm", lora(modules_to_save=["norm"]), seed=1)
    check_variants(untied, tokens, saved(untied, tmp_path / "other", seed=2), norm)
    for pair in ([biases, plain_lora], [tokens, tmp_path / "other"], [tmp_path / "other", tokens]):
        result = call("combine", *pair, "--output", tmp_path / "both")
        assert result.exit_code == 2 and "Use it by itself" in " ".join(result.output.split())


def check_variants(base, *folders):
    """Each adapter, and the base beside them, answers as it does by plain PEFT."""
    variants = Variants({folder.name: open_adapter(folder) for folder in folders})
    for folder in folders:
        torch.testing.assert_close(logits(variants.model(folder.name)), logits(plain(base, folder)))
    torch.testing.assert_close(logits(variants.model("base")), logits(AutoModelForCausalLM.from_pretrained(base)))
