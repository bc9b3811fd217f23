"""EfficientNet-Lite0 with ImageNet weights, written as transformers' EfficientNet: the same function.

EfficientNet-Lite is EfficientNet with ReLU6 and without squeeze-and-excitation, which transformers' class always has.
Its two convolutions are made an exact identity here: all weights are 0 and the last bias is `OPEN`, where a sigmoid is
exactly 1 and its derivative exactly 0. So they never learn anything, in full fine-tuning as well. Parameter
counts include their 26,896 weights, which the original does not have.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from peft_recipes.embedded.cache import quiet_bars
from peft_recipes.embedded.packages import EFFICIENTNET_LITE0, package_files
from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

OPEN = 100.0  # 1 / (1 + exp(-100)) is 1 in fp32 and in fp64
EXACT = 1e-5  # largest difference of a logit; the logits are up to about 10
_MEAN, _SD = 127 / 255, 128 / 255  # of every channel, in the original's TensorFlow code (efficientnet_lite_builder.py)
_EPS = 1e-3  # of its BatchNorm layers

# The package's names -> transformers', below `efficientnet.`
_OUTSIDE = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
_IN_BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}


def efficientnet_lite0(folder: Path) -> None:
    """Write the model with its ImageNet head and its image processor.

    Raises:
        RecipeError: a logit differs from the plain forward pass of the original weights by more than `EXACT`.
    """
    import torch
    from transformers import EfficientNetForImageClassification
    from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

    source = package_files(EFFICIENTNET_LITE0, "the embedded EfficientNet-Lite0") / next(iter(EFFICIENTNET_LITE0.files))
    original = torch.load(source, map_location="cpu", weights_only=True)  # tensors alone: no pickled code is run
    model = EfficientNetForImageClassification(lite0_config()).eval()
    model.load_state_dict(as_efficientnet(original, model.state_dict()))
    gap = largest_gap(original, model)
    if not gap <= EXACT:
        raise RecipeError(
            f"The EfficientNet made from {EFFICIENTNET_LITE0.pin} differs from its original by {gap:.1e} (allowed "
            f"{EXACT:.0e}). Try the tested version of transformers (constraints.txt)."
        )
    with quiet_bars():
        model.save_pretrained(folder)
    EfficientNetImageProcessorPil(
        size={"height": 224, "width": 224}, image_mean=[_MEAN] * 3, image_std=[_SD] * 3, include_top=False
    ).save_pretrained(folder)


def lite0_config() -> EfficientNetConfig:
    """The sizes of EfficientNet-Lite0.

    BatchNorm's momentum is torch's default. At the original's 0.01 (0.99 in TensorFlow) a full fine-tune of a hundred
    steps would end with statistics that are a third those of ImageNet.
    """
    from transformers import EfficientNetConfig

    return EfficientNetConfig(
        image_size=224, width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1_280, hidden_act="relu6",
        squeeze_expansion_ratio=0.0,  # one channel, the fewest that the class allows
        batch_norm_eps=_EPS, batch_norm_momentum=0.1, dropout_rate=0.2, drop_connect_rate=0.2, num_labels=1_000,
    )  # fmt: skip


def as_efficientnet(original: dict[str, torch.Tensor], template: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the original weights to transformers' names; an open squeeze-and-excitation as in `template`'s shapes."""
    import torch

    weights = {}
    for name, weight in original.items():
        module, _, part = name.rpartition(".")
        if module == "_fc":
            weights[f"classifier.{part}"] = weight
        elif block := re.fullmatch(r"_blocks\.(\d+)\.(\w+)", module):
            weights[f"efficientnet.encoder.blocks.{block[1]}.{_IN_BLOCK[block[2]]}.{part}"] = weight
        else:
            weights[f"efficientnet.{_OUTSIDE[module]}.{part}"] = weight
    for name, weight in template.items():
        if ".squeeze_excite." in name:
            weights[name] = torch.full_like(weight, OPEN if name.endswith("expand.bias") else 0.0)
    return weights


def largest_gap(
    original: dict[str, torch.Tensor], model: EfficientNetForImageClassification, sides: tuple[int, ...] = (64, 224)
) -> float:
    """Return the largest difference between the logits of the plain forward pass and of the model.

    On square noise of these sides in pixels, in double precision, so that the order of sums has no effect.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    weights = {name: weight.double() for name, weight in original.items()}
    gaps = []
    model.double()
    with torch.inference_mode():
        for side in sides:
            pixels = torch.randn(2, 3, side, side, generator=generator, dtype=torch.float64)
            gaps.append((plain_logits(weights, pixels) - model(pixel_values=pixels).logits).abs().max().item())
    model.float()
    return max(gaps)


def plain_logits(weights: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """[batch, classes] logits of pixels [batch, 3, height, width]: EfficientNet-Lite from its weights alone.

    Convolutions pad as TensorFlow's "SAME". A block is expanded unless it is the first, and is added to its input if
    it has the same shape (arXiv:1905.11946, table 1).
    """
    import torch.nn.functional as F

    def convolution(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        kernel = weights[f"{name}.weight"]
        groups = x.shape[1] // kernel.shape[1]
        height, width = (max((-(-s // stride) - 1) * stride + kernel.shape[-1] - s, 0) for s in x.shape[-2:])
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(x, kernel, stride=stride, groups=groups)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        mean, variance, scale, bias = (
            weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, scale, bias, eps=_EPS)

    x = F.relu6(norm("_bn0", convolution("_conv_stem", pixels, 2)))
    first_of_stage = {1: 2, 3: 2, 5: 2, 11: 2}  # block -> its stride where that is not 1
    for block in range(1 + max(int(name.split(".")[1]) for name in weights if name.startswith("_blocks."))):
        at, before = f"_blocks.{block}", x
        if f"{at}._expand_conv.weight" in weights:
            x = F.relu6(norm(f"{at}._bn0", convolution(f"{at}._expand_conv", x)))
        x = F.relu6(norm(f"{at}._bn1", convolution(f"{at}._depthwise_conv", x, first_of_stage.get(block, 1))))
        x = norm(f"{at}._bn2", convolution(f"{at}._project_conv", x))
        x = x + before if x.shape == before.shape else x
    x = F.relu6(norm("_bn1", convolution("_conv_head", x)))
    return F.linear(x.mean(dim=(2, 3)), weights["_fc.weight"], weights["_fc.bias"])
