"""A head that learns on stored features ends as one that is trained the slow way, with the backbone's dropout off."""

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
def still(tiny, tmp_path):
    """A recipe with only a head arm, on a base without dropout."""
    import json
    import shutil

    def make(classify, kind, **training):
        folder = tmp_path / f"still-{kind}"
        if not folder.exists():
            shutil.copytree(tiny(kind), folder)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | QUIET))
        recipe = classify(kind, model=str(folder), arms={"head": Arm("head", learning_rate=1e-2)})
        recipe.training.update(training)
        return recipe

    return make


def slowly(monkeypatch):
    monkeypatch.setattr(head_trainer.HeadTrainer, "_pick", lambda *_: None)


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.parametrize("kind", ["distilbert", "gpt2", "llama"])
def test_features_give_the_slow_ways_losses_weights_and_predictions(
    classify, still, tmp_path, monkeypatch, kind, strategy
):
    recipe = still(classify, kind, train_sampling_strategy=strategy)
    fast = train(recipe, "head", output=tmp_path / "fast")
    slowly(monkeypatch)
    slow = train(recipe, "head", output=tmp_path / "slow")
    assert fast.data["training"]["batches"] == "features" and slow.data["training"]["batches"] == "padded"
    for (_, one), (_, two) in zip(fast.data["training"]["losses"], slow.data["training"]["losses"], strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    for one, two in zip(fast.data["training"]["validation"], slow.data["training"]["validation"], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4) and one["accuracy"] == two["accuracy"]
    weights = [load_file(next(run.folder.glob("head*.safetensors"))) for run in (fast, slow)]
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=1e-5)
    assert fast.metrics["test"]["accuracy"] == slow.metrics["test"]["accuracy"]
    assert fast.data["training"]["tokens"] == slow.data["training"]["tokens"]


def test_features_beyond_the_limit_are_mapped_from_a_file_with_the_same_result(classify, still, tmp_path, monkeypatch):
    recipe = still(classify, "distilbert")
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
def test_features_heed_the_training_options_as_the_slow_way_does(classify, still, tmp_path, monkeypatch, training):
    recipe = still(classify, "distilbert", **training)
    fast = train(recipe, "head", output=tmp_path / "fast").data
    slowly(monkeypatch)
    slow = train(recipe, "head", output=tmp_path / "slow").data
    assert fast["training"]["batches"] == "features"
    assert fast["training"]["steps"] == slow["training"]["steps"]
    for (_, one), (_, two) in zip(fast["training"]["losses"], slow["training"]["losses"], strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert fast["metrics"]["test"]["loss"] == pytest.approx(slow["metrics"]["test"]["loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["distilbert", "llama"])
def test_accumulated_batches_learn_as_one_large_batch(classify, still, tmp_path, kind):
    losses = {}
    for batch, accumulation in ((16, 1), (4, 4)):
        recipe = still(classify, kind, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
                       train_sampling_strategy="sequential")  # fmt: skip
        recipe.arms["full"] = Arm(learning_rate=5e-3)
        data = train(recipe, "full", output=tmp_path / f"{batch}").data
        losses[batch] = data["training"]["losses"]
        assert data["training"]["steps"] == 12
    for (_, one), (_, two) in zip(losses[16], losses[4], strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_the_pass_over_the_backbone_counts_as_training(classify, still, tmp_path):
    figures = train(still(classify, "distilbert"), "head", output=tmp_path).data["training"]
    assert figures["seconds"] > figures["first_pass_seconds"] > 0


@pytest.mark.parametrize("kind", ["bert", "roberta", "vit", "qwen2", "opt"])
def test_what_the_head_reads_is_found_for_other_architectures(kind):
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
    pick = backbone.pick(batch)
    assert pick is not None
    with torch.no_grad():
        assert torch.allclose(backbone.logits_of(pick(backbone.output(batch), batch)), model(**batch).logits, atol=1e-5)


def test_a_model_whose_head_reads_something_else_is_trained_the_slow_way():
    transformers.set_seed(0)
    config = tiny_config("distilbert", 40)
    config.num_labels = 2
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    # Reads the mean of all positions: neither the first nor the last nor a pooled one gives its logits.
    model.forward = lambda **kw: type("O", (), {
        "logits": model.classifier(model.distilbert(input_ids=kw["input_ids"])[0].mean(1))})()  # fmt: skip
    ids = torch.randint(3, 40, (3, 6))
    assert Backbone(model).pick({"input_ids": ids, "attention_mask": torch.ones_like(ids)}) is None
