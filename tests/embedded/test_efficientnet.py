"""EfficientNet-Lite0 as transformers' EfficientNet: the same logits, and a squeeze-and-excitation that stays open."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from transformers import EfficientNetForImageClassification

from peft_recipes.embedded import cache, efficientnet, stand_ins
from peft_recipes.embedded.efficientnet import EXACT, as_efficientnet, largest_gap

USERS_CACHE = cache.cache_dir()  # before a fixture sets another


@pytest.fixture(scope="module")
def both():
    """Random weights under the package's names, and the model that is made from them."""
    torch.manual_seed(0)
    model = EfficientNetForImageClassification(efficientnet.lite0_config()).eval()
    original = {original_name(k): random_like(k, v) for k, v in model.state_dict().items() if "squeeze" not in k}
    model.load_state_dict(as_efficientnet(original, model.state_dict()))
    return original, model


def original_name(name: str) -> str:
    module, _, part = name.removeprefix("efficientnet.").rpartition(".")
    if module == "classifier":
        return f"_fc.{part}"
    if block := re.fullmatch(r"encoder\.blocks\.(\d+)\.(.+)", module):
        inside = {theirs: own for own, theirs in efficientnet._IN_BLOCK.items()}[block[2]]
        return f"_blocks.{block[1]}.{inside}.{part}"
    return f"{({theirs: own for own, theirs in efficientnet._OUTSIDE.items()})[module]}.{part}"


def random_like(name: str, value: torch.Tensor) -> torch.Tensor:
    """Weights that keep the size of their input, and statistics that are neither 0 nor 1."""
    if value.dim() > 1:
        return torch.randn_like(value) * (2 / value[0].numel()) ** 0.5
    return torch.rand_like(value) + 0.5 if value.is_floating_point() else value


def test_the_logits_are_those_of_the_original_weights(both):
    assert largest_gap(*both, sides=(64, 96)) <= EXACT


def test_the_check_detects_a_wrong_weight(both):
    original, model = both
    weight = model.efficientnet.encoder.blocks[9].projection.project_bn.running_mean
    weight[3] += 0.1
    assert largest_gap(original, model, sides=(64,)) > EXACT
    weight[3] -= 0.1


def test_the_squeeze_and_excitation_is_an_identity_that_learns_nothing(both):
    model = both[1].train()
    layer = model.efficientnet.encoder.blocks[1].squeeze_excite
    values = torch.randn(2, layer.dim, 4, 4)
    assert torch.equal(layer(values), values)
    model(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.tensor([1, 2])).loss.backward()
    gradients = {name: p.grad.abs().max().item() for name, p in model.named_parameters() if p.grad is not None}
    assert {value for name, value in gradients.items() if "squeeze_excite" in name} == {0.0}
    assert all(value > 0 for name, value in gradients.items() if "conv" in name and "squeeze_excite" not in name)
    model.zero_grad()


def test_its_identity_adds_few_parameters(both):
    counts = {name: p.numel() for name, p in both[1].named_parameters()}
    extra = sum(count for name, count in counts.items() if "squeeze_excite" in name)
    head = sum(count for name, count in counts.items() if name.startswith("classifier."))
    assert (extra, sum(counts.values()) - extra - head) == (26_896, 3_371_008)


def test_the_model_in_the_users_cache_is_complete():
    """Skipped if it is not cached: tests download nothing."""
    from safetensors import safe_open

    folder = USERS_CACHE / "models" / stand_ins.MODELS["efficientnet-lite0"].folder_name("efficientnet-lite0")
    if not folder.is_dir():
        pytest.skip("not cached on this machine")
    with safe_open(folder / "model.safetensors", "pt") as file:
        count = sum(
            math.prod(file.get_slice(key).get_shape())
            for key in file.keys()  # noqa: SIM118
            if "running_" not in key and "num_batches" not in key
        )
    assert count == 4_678_904
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 224, "width": 224} and processor["include_top"] is False
    assert str(USERS_CACHE) not in "".join(file.read_text() for file in folder.glob("*.json"))
