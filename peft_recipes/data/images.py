"""Images for image-classification: to a model's pixels, and the shift (rotation, noise) that a recipe may ask for."""

from __future__ import annotations

import base64
import io
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PretrainedConfig


def shift(image: Image, identity: str, transform: dict[str, float] | None) -> Image:
    """The image turned by up to `rotation` degrees and with normal noise of sd `noise` (of the full range) added.

    Drawn from the example's own identity, so that every arm and every seed sees the same picture.
    """
    if not transform:
        return image
    from PIL import Image as images

    random = np.random.default_rng(zlib.crc32(identity.encode()))
    if degrees := transform.get("rotation", 0):
        image = image.rotate(random.uniform(-degrees, degrees), resample=images.Resampling.BILINEAR)
    if sd := transform.get("noise", 0):
        pixels = np.asarray(image, dtype=np.float32) / 255
        noisy = np.clip(pixels + random.normal(0, sd, pixels.shape), 0, 1)
        image = images.fromarray((noisy * 255).round().astype(np.uint8), mode=image.mode)
    return image


def pixels(image: Image, config: PretrainedConfig, processor: Any | None) -> np.ndarray:
    """[channels, height, width] float32, by the model's own image processor, or scaled to 0..1 where it has none."""
    channels = getattr(config, "num_channels", 3)
    image = image.convert("L" if channels == 1 else "RGB")
    if processor is not None:
        return np.asarray(processor(image, return_tensors="np")["pixel_values"][0], dtype=np.float32)
    size = config.image_size
    if image.size != (size, size):
        image = image.resize((size, size))
    array = np.asarray(image, dtype=np.float32) / 255
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def as_base64(image: Image) -> str:
    """The image as PNG in base64, for a report."""
    buffer = io.BytesIO()
    image.convert("L" if image.mode == "L" else "RGB").save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
