"""Many adapters on one base: switching, mixing in a batch, checking their fit, unloading."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import IA3Config, PeftModel
from saved_adapters import lora, saved
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_recipes import AdapterSet, RecipeError
from peft_recipes.adapters.open import short_names

ROWS = {"input_ids": torch.arange(3, 27).reshape(4, 6) % 30, "attention_mask": torch.ones(4, 6, dtype=torch.long)}


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """Three LoRAs of one base with different ranks and targets; the name of the first, "lora", is a prefix in PEFT."""
    root = tmp_path_factory.mktemp("adapters")
    configs = {"lora": lora(), "second": lora(r=4), "third": lora(target_modules=["o_proj", "down_proj"])}
    return {name: saved(tiny("llama"), root / name, config, i) for i, (name, config) in enumerate(configs.items())}


@pytest.fixture
def adapters(tiny, made):
    kept = AdapterSet(tiny("llama"))
    for folder in made.values():
        kept.load(folder)
    return kept


def alone(tiny, folder) -> torch.Tensor:
    """The logits of plain PEFT with this adapter alone on a fresh base."""
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    model = (PeftModel.from_pretrained(model, folder) if folder else model).eval()
    with torch.no_grad():
        return model(**ROWS).logits


def active_logits(adapters) -> torch.Tensor:
    with torch.no_grad():
        return adapters.use(adapters.active)(**ROWS).logits


def test_each_adapter_gives_the_logits_of_plain_peft_after_any_switches(adapters, tiny, made):
    assert adapters.names == ["lora", "second", "third"] and adapters.active == "third"
    for name in ["second", "lora", None, "third", None, "lora"]:
        adapters.use(name)
        torch.testing.assert_close(active_logits(adapters), alone(tiny, made.get(name)), msg=str(name))
    outputs = [alone(tiny, made.get(name)) for name in (None, *made)]
    assert all((a - b).abs().max() > 0.01 for i, a in enumerate(outputs) for b in outputs[:i])


def test_a_mixed_batch_in_one_forward_pass_equals_one_adapter_at_a_time(adapters, tiny, made):
    asked = ["third", None, "lora", "second"]
    passes = []
    handle = adapters.model.get_base_model().lm_head.register_forward_hook(lambda *_: passes.append(1))
    mixed = adapters.ask(ROWS, asked).logits
    handle.remove()
    assert len(passes) == 1 and adapters.active == "third"
    for row, name in enumerate(asked):
        torch.testing.assert_close(mixed[row], alone(tiny, made.get(name))[row], msg=str(name))
    torch.testing.assert_close(active_logits(adapters), alone(tiny, made["third"]))  # the active adapter is unchanged


def test_generation_for_a_mixed_batch_equals_one_at_a_time(adapters):
    options = {"max_new_tokens": 5, "do_sample": False}
    asked = ["second", "lora", None, "third"]
    together = adapters.generate(ROWS, asked, **options)
    for row, name in enumerate(asked):
        one = {key: value[row : row + 1] for key, value in ROWS.items()}
        assert adapters.use(name).generate(**one, **options).tolist() == together[row : row + 1].tolist()


def test_classifiers_with_their_own_heads_can_be_mixed(tiny, tmp_path):
    """PEFT by itself uses the base's head for such a batch if the active adapter has none."""
    config = lora(target_modules=["q_lin"], task_type="SEQ_CLS")
    folders = [saved(tiny("distilbert"), tmp_path / name, config, seed, 3) for seed, name in enumerate(["a", "b"])]
    kept = AdapterSet(tiny("distilbert"))
    for folder in folders:
        kept.load(folder)
    mixed = kept.ask(ROWS, ["b", "a", "a", "b"]).logits
    for row, folder in enumerate([folders[1], folders[0], folders[0], folders[1]]):
        base = AutoModelForSequenceClassification.from_pretrained(tiny("distilbert"), num_labels=3)
        with torch.no_grad():
            plain = PeftModel.from_pretrained(base, folder).eval()(**ROWS).logits[row]
        torch.testing.assert_close(mixed[row], plain)
    with pytest.raises(RecipeError, match="another shape"):
        kept.load(saved(tiny("distilbert"), tmp_path / "five", config, labels=5))


def test_a_failed_forward_pass_leaves_no_hooks_behind(adapters, tiny, made):
    wrong = {**ROWS, "input_ids": ROWS["input_ids"] + 10_000}
    with pytest.raises(IndexError):
        adapters.ask(wrong, ["lora", "second", "third", None])
    torch.testing.assert_close(active_logits(adapters), alone(tiny, made["third"]))


def test_fits_reports_another_base_and_another_method(adapters, tiny, made, tmp_path):
    assert adapters.fits(made["lora"]).ok
    other = saved(tiny("gpt2"), tmp_path / "other", lora(target_modules=["c_attn"], fan_in_fan_out=True))
    found = adapters.fits(other)
    assert found.ok is False and str(tiny("gpt2")) in found.message and str(tiny("llama")) in found.message
    with pytest.raises(RecipeError, match="does not fit"):
        adapters.load(other)
    copy = shutil.copytree(tiny("llama"), tmp_path / "copy")
    found = adapters.fits(saved(copy, tmp_path / "elsewhere"))
    assert found.ok is None and str(copy) in found.message  # all tensors fit, but the base has another name
    ia3 = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    assert "one method" in adapters.fits(saved(tiny("llama"), tmp_path / "ia3", ia3)).message
    assert adapters.names == list(made)


def test_unloading_frees_the_weights_and_restores_the_base(adapters, tiny, made):
    def count():
        return sum("lora_" in name for name, _ in adapters.model.named_parameters())

    before = count()
    adapters.unload("third")
    assert adapters.active is None and count() < before
    torch.testing.assert_close(active_logits(adapters), alone(tiny, None))
    adapters.use("second")
    adapters.unload("lora")
    torch.testing.assert_close(active_logits(adapters), alone(tiny, made["second"]))
    adapters.unload("second")
    assert adapters.names == [] and adapters.model is None
    torch.testing.assert_close(active_logits(adapters), alone(tiny, None))
    adapters.load(made["lora"])
    torch.testing.assert_close(active_logits(adapters), alone(tiny, made["lora"]))


def test_wrong_names_and_counts_raise_with_a_hint(adapters, made):
    with pytest.raises(RecipeError, match="Did you mean 'second'"):
        adapters.use("secnd")
    with pytest.raises(RecipeError, match="already"):
        adapters.load(made["lora"])
    with pytest.raises(RecipeError, match="name one a row"):
        adapters.ask(ROWS, ["lora"])
    dora = AdapterSet(adapters.base)
    dora.load(saved(adapters.base, made["lora"].parent / "dora", lora(use_dora=True)))
    with pytest.raises(RecipeError, match=r"is DoRA.*use\(name\)"):
        dora.ask(ROWS, ["dora"] * 4)


def test_a_loaded_model_can_be_the_base(tiny, made):
    kept = AdapterSet(AutoModelForCausalLM.from_pretrained(tiny("llama")))
    kept.load(made["second"], "mine")
    torch.testing.assert_close(active_logits(kept), alone(tiny, made["second"]))


def test_short_names_are_as_short_as_they_can_be(tmp_path):
    runs = [tmp_path / "out" / place for place in ("a/lora/seed-0", "a/lora/seed-1", "b/lora/seed-0", "b/head/seed-0")]
    for run in runs:
        run.mkdir(parents=True)
        (run / "recipe.yaml").touch()
    assert short_names([runs[0], runs[3]]) == ["lora", "head"]
    assert short_names(runs[:2]) == ["lora-seed-0", "lora-seed-1"]
    assert short_names([runs[0], runs[2]]) == ["a-lora-seed-0", "b-lora-seed-0"]
    assert short_names([tmp_path / "x" / "mine", tmp_path / "y" / "mine"]) == ["x-mine", "y-mine"]
    with pytest.raises(RecipeError, match="given twice"):
        short_names([runs[0], runs[0]])
