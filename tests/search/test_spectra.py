"""Spectrum of a full fine-tune and the adapter extracted from it, checked on known changes."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from peft_recipes import RecipeError, extract, spectrum, train
from peft_recipes.reporting.spectrum_report import extraction_words, spectrum_words
from peft_recipes.search.spectra import powers_of_two, spectrum_of, squared_singular_values


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("spectra")


@pytest.fixture
def runs(classify, kept):
    """The folder of a tiny GPT-2's full run (Conv1D layers, a new head), with a LoRA run of rank 4 next to it."""
    recipe = classify("gpt2")
    for arm in ("full", "lora"):
        train(recipe, arm, output=kept, resume=True)
    return kept / "tiny" / "full" / "seed-0"


def test_squared_singular_values_are_those_of_the_svd():
    for shape in ((5, 9), (9, 5), (1, 4)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        expected = torch.linalg.svdvals(matrix.double()).square()
        torch.testing.assert_close(squared_singular_values(matrix), expected)
    assert powers_of_two(10) == [1, 2, 4, 8, 10] and powers_of_two(8) == [1, 2, 4, 8] and powers_of_two(1) == [1]


def test_a_change_of_rank_two_is_represented_at_rank_two():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    base = GPT2ForSequenceClassification(GPT2Config(vocab_size=20, n_embd=32, n_layer=2, n_head=2, n_positions=16))
    trained, draw = copy.deepcopy(base), torch.Generator().manual_seed(1)
    with torch.no_grad():
        weight = trained.transformer.h[1].mlp.c_fc.weight  # [32, 128]
        weight += torch.randn(32, 2, generator=draw) @ torch.randn(2, 128, generator=draw)
        trained.transformer.h[0].ln_1.bias += 1.0
    found = spectrum_of(base, trained, ["score.weight"])
    rows = {row["module"]: row for row in found["modules"]}
    changed = rows["transformer.h.1.mlp.c_fc"]
    assert changed["held"]["2"] == pytest.approx(1, abs=1e-6) and 0.3 < changed["held"]["1"] < 1
    assert changed["enough_rank"] == (1 if changed["held"]["1"] >= 0.9 else 2)
    assert sum(row["squared_change"] > 0 for row in rows.values()) == 1
    assert changed["share"] + found["outside"]["share"] == pytest.approx(1)
    assert found["outside"]["squared_change"] == pytest.approx(32, rel=1e-5)
    targets = {row["target"]: row for row in found["targets"]}
    assert targets["mlp.c_fc"]["modules"] == 2 and targets["mlp.c_fc"]["enough_rank"] == changed["enough_rank"]
    assert found["ranks"]["held"]["2"] == pytest.approx(1, abs=1e-6)
    nothing = spectrum_of(base, base, [])
    assert nothing["squared_change"] == 0 and "Nothing changed" in spectrum_words(nothing)[0]


def test_the_spectrum_is_written_to_the_runs_folder(runs):
    found = spectrum(runs)
    assert json.loads((runs / "spectrum.json").read_text())["ranks"] == found["ranks"]
    assert (runs / "spectrum.png").read_bytes()[:4] == b"\x89PNG"
    assert found["ranks"]["held"]["32"] == pytest.approx(1, abs=1e-6)
    shares = list(found["ranks"]["held"].values())
    assert shares == sorted(shares) and shares[0] > 0
    heads = [row for row in found["modules"] if row["new"]]
    assert [row["module"] for row in heads] == ["score"] and heads[0]["relative_change"] < 5  # from its initialisation
    assert sum(row["share"] for row in found["modules"]) + found["outside"]["share"] == pytest.approx(1)
    assert "90 % takes" in " ".join(spectrum_words(found))


def test_full_rank_extraction_restores_all_targeted_weights(runs, tmp_path):
    from peft import PeftModel

    from peft_recipes.search.spectra import read_full_run

    found = extract(runs, 32, tmp_path / "whole")
    assert found["change"]["cut_off"] == pytest.approx(0, abs=1e-6)
    assert sum(found["change"][key] for key in ("held", "head", "outside", "cut_off")) == pytest.approx(1)
    assert set(found["change"]["outside_by_kind"]) <= {"embeddings", "norms", "biases"}
    full = read_full_run(runs)
    model = PeftModel.from_pretrained(full.base, tmp_path / "whole").merge_and_unload()
    trained = dict(full.trained.named_parameters())
    for name, weight in model.named_parameters():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight", "score.weight")):
            torch.testing.assert_close(weight, trained[name], rtol=0, atol=1e-5)
    assert "base_model_name_or_path" in (tmp_path / "whole" / "adapter_config.json").read_text()
    assert not list((tmp_path / "whole").glob("model*.safetensors"))


def test_an_extracted_adapter_is_compared_with_full_and_with_the_lora_of_its_rank(runs, tmp_path):
    from peft_recipes.adapters.check import check_adapter

    found = extract(runs, 4, tmp_path / "four")
    assert [row["arm"] for row in found["beside"]] == ["full", "lora"]
    for row in found["beside"]:
        low, high = row["extracted_minus_it"]["ci95"]
        assert low <= row["extracted_minus_it"]["estimate"] <= high
        assert row["extracted_minus_it"]["estimate"] == pytest.approx(
            found["metrics"]["test"]["accuracy"] - row["value"]
        )
    assert 0 < found["change"]["cut_off"] < 1 and 0 < found["change"]["held"] < 1
    told = " ".join(extraction_words(found))
    assert "Compared with full" in told and "Compared with lora" in told and "lost" in told
    assert all(finding.ok is not False for finding in check_adapter(tmp_path / "four"))
    alone = extract(runs, 2, tmp_path / "two")
    assert [row["arm"] for row in alone["beside"]] == ["full"]
    assert alone["change"]["held"] < found["change"]["held"]


def test_convolutions_are_extracted(tmp_path):
    """A known change of rank 3 in each layer of the small CNN is restored by an adapter of rank 3."""
    from peft import LoraConfig

    from peft_recipes import Arm
    from peft_recipes.arms.apply import apply_arm
    from peft_recipes.models.small_cnn import SmallCnnConfig, SmallCnnForImageClassification
    from peft_recipes.search.extraction import _lora_layers, _set_lora_weights

    base = SmallCnnForImageClassification(SmallCnnConfig())
    trained, draw = copy.deepcopy(base), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in ("conv1", "conv2", "fc1", "classifier"):
            weight = getattr(trained, name).weight
            flat = weight.flatten(1)
            more = torch.randn(len(flat), 3, generator=draw) @ torch.randn(3, flat.shape[1], generator=draw)
            weight += 0.01 * more.reshape(weight.shape)
    config = LoraConfig(r=3, lora_alpha=3, target_modules=["conv1", "conv2", "fc1", "classifier"])
    model, _ = apply_arm(copy.deepcopy(base), Arm(config), "image-classification", [])
    with torch.no_grad():
        for name, layer in _lora_layers(model):
            _set_lora_weights(layer, trained.get_submodule(name).weight, base.get_submodule(name).weight)
    pixels = torch.rand(2, 1, 28, 28, generator=draw)
    torch.testing.assert_close(model.eval()(pixels).logits, trained.eval()(pixels).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["spectrum", "."], "no run.json"),
        (["spectrum", "LORA"], "The spectrum is that of full fine-tuning"),
        (["extract", "FULL", "--rank", "0", "--output", "o"], "whole number of 1 or more"),
        (["extract", "FULL", "--rank", "2", "--output", "o", "--targets", "c_atn"], "Nearest: "),
        (["extract", "FULL", "--rank", "2", "--output", "/dev/null/x"], "is a file"),
        (["extract", "LORA", "--rank", "2", "--output", "o"], "name a run of a full arm"),
    ],
)
def test_a_user_error_is_one_message_and_writes_nothing(runs, tmp_path, monkeypatch, words, message):
    from typer.testing import CliRunner

    from peft_recipes.cli.app import app

    monkeypatch.chdir(tmp_path)
    folders = {"FULL": str(runs), "LORA": str(runs.parent.parent / "lora" / "seed-0")}
    result = CliRunner().invoke(app, [folders.get(word, word) for word in words])
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_json_output_is_one_document(runs, tmp_path):
    from typer.testing import CliRunner

    from peft_recipes.cli.app import app

    shown = CliRunner().invoke(app, ["spectrum", str(runs), "--json"])
    assert json.loads(shown.stdout)["recipe"] == "tiny"
    assert "r for 90 %" in " ".join(CliRunner().invoke(app, ["spectrum", str(runs)]).stdout.split())
    made = CliRunner().invoke(app, ["extract", str(runs), "--rank", "2", "--output", str(tmp_path / "o"), "--json"])
    assert json.loads(made.stdout)["rank"] == 2
    again = CliRunner().invoke(app, ["extract", str(runs), "--rank", "2", "--output", str(tmp_path / "o")])
    assert again.exit_code == 2 and "--overwrite" in " ".join(again.stderr.split())


def test_missing_weights_are_an_error(runs, tmp_path):
    import shutil

    shutil.copytree(runs, tmp_path / "run", ignore=shutil.ignore_patterns("model.safetensors"))
    with pytest.raises(RecipeError, match=r"no model\.safetensors"):
        spectrum(tmp_path / "run")
