"""The small CNN: its size, saving and loading, and adapters on it."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModelForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from peft_recipes.models.architectures import parameters_by_component, targets
from peft_recipes.models.small_cnn import SmallCnnConfig, SmallCnnForImageClassification


@pytest.fixture
def images():
    return torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SmallCnnForImageClassification(SmallCnnConfig()).eval()


def logits(model, images):
    with torch.no_grad():
        return model.eval()(pixel_values=images).logits


def test_it_has_421642_parameters_of_which_1290_are_the_head(model):
    assert model.num_parameters() == 421_642
    components = parameters_by_component(model)
    assert components == {"embeddings": 0, "attention": 0, "mlp": 0, "head": 1_290, "other": 420_352}


def test_it_computes_two_pooled_convolutions_and_two_linear_layers(model, images):
    hidden = images
    for conv in (model.conv1, model.conv2):
        hidden = functional.max_pool2d(functional.conv2d(hidden, conv.weight, conv.bias, padding=1).relu(), 2)
    expected = model.classifier(model.fc1(hidden.reshape(4, 3136)).relu())
    labels = torch.tensor([3, 1, 4, 1])
    output = model(pixel_values=images, labels=labels)

    assert isinstance(output, ImageClassifierOutput)
    assert torch.allclose(output.logits, expected)
    assert torch.allclose(output.loss, -expected.log_softmax(-1)[range(4), labels].mean())
    assert model(pixel_values=images).loss is None
    assert torch.equal(model(pixel_values=images, return_dict=False)[0], output.logits)


def test_it_is_initialised_like_pytorchs_layers():
    torch.manual_seed(0)
    for layer in SmallCnnForImageClassification(SmallCnnConfig()).children():
        bound = layer.weight[0].numel() ** -0.5
        assert layer.weight.abs().max() <= bound and 0 < layer.bias.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_labels": 2},  # transformers leaves its default of two labels out of config.json
        {"num_labels": 3},
        {"image_size": 32, "num_channels": 3, "id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}},
    ],
)
def test_a_saved_folder_loads_with_the_same_labels_and_logits(tmp_path, settings):
    model = SmallCnnForImageClassification(SmallCnnConfig(**settings))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)

    images = torch.rand(2, model.config.num_channels, model.config.image_size, model.config.image_size)
    assert torch.equal(logits(loaded, images), logits(model, images))
    assert loaded.config.id2label == model.config.id2label
    assert loaded.config.label2id == model.config.label2id


def test_a_new_number_of_labels_replaces_only_the_head(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=2, ignore_mismatched_sizes=True)
    assert loaded.classifier.out_features == 2
    assert torch.equal(loaded.fc1.weight, model.fc1.weight)
    loaded.save_pretrained(tmp_path / "again")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "again").config.num_labels == 2


LINEAR, CONVOLUTIONS = targets("small-cnn", "all-linear"), targets("small-cnn", "convolutions")


@pytest.mark.parametrize(("names", "trainable"), [(LINEAR, 27_216), (LINEAR + CONVOLUTIONS, 30_360)])
def test_an_adapter_has_the_expected_size_is_trained_and_reloads_with_the_same_logits(
    tmp_path, model, images, names, trainable
):
    model.save_pretrained(tmp_path / "base")
    before = logits(model, images)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=names))
    assert adapted.get_nb_trainable_parameters()[0] == trainable
    assert torch.equal(logits(adapted, images), before)

    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = adapted(pixel_values=images, labels=torch.tensor([7, 2, 1, 0])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(adapted, images)
    assert not torch.allclose(trained, before, atol=1e-2)

    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(loaded, images), trained)
    assert torch.allclose(logits(loaded.merge_and_unload(), images), trained, atol=1e-5)
