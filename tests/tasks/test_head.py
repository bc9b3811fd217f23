"""A linear probe on cached features equals one trained through its backbone without dropout."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small import tiny_config

from peft_recipes import Arm, train
from peft_recipes.tasks import features, head_trainer
from peft_recipes.tasks.features import Backbone

QUIET = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
         "attn_pdrop": 0.0}  # fmt: skip


@pytest.fixture
def no_dropout(tiny, tmp_path):
    """A recipe with only a head arm, on a base without dropout."""
    import json
    import shutil

    def make(classify, kind, **training):
        folder = tmp_path / f"no-dropout-{kind}"
        if not folder.exists():
            shutil.copytree(tiny(kind), folder)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | QUIET))
        recipe = classify(kind, model=str(folder), arms={"head": Arm("head", learning_rate=1e-2)})
        recipe.training.update(training)
        return recipe

    return make


def without_features(monkeypatch):
    monkeypatch.setattr(head_trainer.HeadTrainer, "_pooling", lambda *_: None)


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.parametrize("kind", ["distilbert", "gpt2", "llama"])
def test_features_give_the_same_losses_weights_and_predictions(
    classify, no_dropout, tmp_path, monkeypatch, kind, strategy
):
    recipe = no_dropout(classify, kind, train_sampling_strategy=strategy)
    cached = train(recipe, "head", output=tmp_path / "cached")
    without_features(monkeypatch)
    plain = train(recipe, "head", output=tmp_path / "plain")
    assert cached.data["training"]["batches"] == "features" and plain.data["training"]["batches"] == "padded"
    for (_, one), (_, two) in zip(cached.data["training"]["losses"], plain.data["training"]["losses"], strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    for one, two in zip(cached.data["training"]["validation"], plain.data["training"]["validation"], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4) and one["accuracy"] == two["accuracy"]
    weights = [load_file(next(run.folder.glob("head*.safetensors"))) for run in (cached, plain)]
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=1e-5)
    assert cached.metrics["test"]["accuracy"] == plain.metrics["test"]["accuracy"]
    assert cached.data["training"]["tokens"] == plain.data["training"]["tokens"]


def test_features_beyond_the_limit_are_mapped_from_a_file_with_the_same_result(
    classify, no_dropout, tmp_path, monkeypatch
):
    recipe = no_dropout(classify, "distilbert")
    inside = train(recipe, "head", output=tmp_path / "inside").data
    monkeypatch.setattr(features, "IN_MEMORY_BYTES", 0)
    mapped = train(recipe, "head", output=tmp_path / "mapped").data
    assert inside["training"]["losses"] == mapped["training"]["losses"]


@pytest.mark.parametrize(
    "training",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 7},
        {"dataloader_drop_last": True, "per_device_eval_batch_size": 7},
        {"gradient_checkpointing": True},
    ],
)
def test_features_follow_the_training_options(classify, no_dropout, tmp_path, monkeypatch, training):
    recipe = no_dropout(classify, "distilbert", **training)
    cached = train(recipe, "head", output=tmp_path / "cached").data
    without_features(monkeypatch)
    plain = train(recipe, "head", output=tmp_path / "plain").data
    assert cached["training"]["batches"] == "features"
    assert cached["training"]["steps"] == plain["training"]["steps"]
    for (_, one), (_, two) in zip(cached["training"]["losses"], plain["training"]["losses"], strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert cached["metrics"]["test"]["loss"] == pytest.approx(plain["metrics"]["test"]["loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["distilbert", "llama"])
def test_accumulated_batches_give_the_losses_of_one_large_batch(classify, no_dropout, tmp_path, kind):
    losses = {}
    for batch, accumulation in ((16, 1), (4, 4)):
        recipe = no_dropout(classify, kind, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
                       train_sampling_strategy="sequential")  # fmt: skip
        recipe.arms["full"] = Arm(learning_rate=5e-3)
        data = train(recipe, "full", output=tmp_path / f"{batch}").data
        losses[batch] = data["training"]["losses"]
        assert data["training"]["steps"] == 12
    for (_, one), (_, two) in zip(losses[16], losses[4], strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_the_pass_over_the_backbone_counts_as_training(classify, no_dropout, tmp_path):
    figures = train(no_dropout(classify, "distilbert"), "head", output=tmp_path).data["training"]
    assert figures["seconds"] > figures["first_pass_seconds"] > 0


@pytest.mark.parametrize("kind", ["bert", "roberta", "vit", "qwen2", "opt"])
def test_the_pooling_is_found_for_other_architectures(kind):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    if kind == "opt":
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 48,
                 "word_embed_proj_dim": 32}  # fmt: skip
    if kind == "qwen2":
        small["num_key_value_heads"] = 2
    config = transformers.AutoConfig.for_model(kind, **small, pad_token_id=1)
    if kind == "vit":
        config.image_size, config.patch_size = 8, 4
        model = transformers.AutoModelForImageClassification.from_config(config).eval()
        batch = {"pixel_values": torch.rand(3, 3, 8, 8)}
    else:
        config.vocab_size = 40
        model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 3 + [0] * 3])
        batch = {"input_ids": torch.randint(3, 40, (3, 6)) * mask + (1 - mask), "attention_mask": mask}
    backbone = Backbone(model)
    pooling = backbone.pooling(batch)
    assert pooling is not None
    with torch.no_grad():
        assert torch.allclose(
            backbone.logits_of(pooling(backbone.output(batch), batch)), model(**batch).logits, atol=1e-5
        )


def test_an_unknown_pooling_is_not_found():
    transformers.set_seed(0)
    config = tiny_config("distilbert", 40)
    config.num_labels = 2
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    # Reads the mean of all positions: neither the first nor the last nor a pooled one gives its logits.
    model.forward = lambda **kw: type("O", (), {
        "logits": model.classifier(model.distilbert(input_ids=kw["input_ids"])[0].mean(1))})()  # fmt: skip
    ids = torch.randint(3, 40, (3, 6))
    assert Backbone(model).pooling({"input_ids": ids, "attention_mask": torch.ones_like(ids)}) is None
