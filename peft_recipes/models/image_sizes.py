"""The pixels that an image model takes: channels, height and width, from its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_USUAL_SIDE = 224  # of ImageNet's models, whose configuration (a ResNet's) may not name it


def channels(config: PretrainedConfig) -> int:
    """Return the number of channels; timm's configurations have it in `pretrained_cfg`."""
    return getattr(config, "num_channels", None) or _timm_size(config)[0]


def height_and_width(config: PretrainedConfig) -> tuple[int, int]:
    """Return the height and width in pixels that the model was pretrained with, or 224 x 224 where unknown."""
    size = getattr(config, "image_size", None) or _timm_size(config)[1:]
    return (size[0], size[1]) if isinstance(size, (list, tuple)) else (size, size)


def _timm_size(config: PretrainedConfig) -> tuple[int, int, int]:
    """The (channels, height, width) of a timm model's configuration; of any other 3 x 224 x 224."""
    size = (getattr(config, "pretrained_cfg", None) or {}).get("input_size") or (3, _USUAL_SIDE, _USUAL_SIDE)
    return tuple(size)
