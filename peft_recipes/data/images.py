"""Images for image classification: pixel values, and the recipe's transform (rotation, noise)."""

from __future__ import annotations

import base64
import io
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_recipes.models.image_sizes import channels, height_and_width

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PretrainedConfig


def shift(image: Image, identity: str, transform: dict[str, float] | None) -> Image:
    """Rotate an image by up to `rotation` degrees and add normal noise with sd `noise` (of the full range).

    The random numbers are seeded by the example's id, so that every arm and every seed gets the same image.
    """
    if not transform:
        return image
    from PIL import Image as images

    random = np.random.default_rng(zlib.crc32(identity.encode()))
    if degrees := transform.get("rotation", 0):
        image = image.rotate(random.uniform(-degrees, degrees), resample=images.Resampling.BILINEAR)
    if sd := transform.get("noise", 0):
        values = np.asarray(image, dtype=np.float32) / 255
        noisy = np.clip(values + random.normal(0, sd, values.shape), 0, 1)
        image = images.fromarray((noisy * 255).round().astype(np.uint8), mode=image.mode)
    return image


def pixels(image: Image, config: PretrainedConfig, processor: Any | None) -> np.ndarray:
    """Pixel values [channels, height, width] in float32: from the image processor, or scaled to 0..1 without one."""
    grey = channels(config) == 1
    image = image.convert("L" if grey else "RGB")
    if processor is not None:  # "pt" is what all processors return; timm's nothing else
        return np.asarray(processor(image, return_tensors="pt")["pixel_values"][0], dtype=np.float32)
    height, width = height_and_width(config)
    if image.size != (width, height):
        image = image.resize((width, height))
    array = np.asarray(image, dtype=np.float32) / 255
    return array[None] if grey else array.transpose(2, 0, 1)


def resize_to(processor: Any, side: int) -> None:
    """Let an image processor make square images of `side` pixels, uncropped, in place of its own size."""
    if hasattr(processor, "val_transforms"):  # timm's: made of its data configuration
        import timm

        processor.data_config |= {"input_size": (3, side, side), "crop_pct": 1.0}
        processor.val_transforms = timm.data.create_transform(**processor.data_config, is_training=False)
        return
    processor.do_resize, processor.do_center_crop = True, False
    processor.size = {"height": side, "width": side}


def as_base64(image: Image) -> str:
    """The image as PNG in base64, for a report."""
    buffer = io.BytesIO()
    image.convert("L" if image.mode == "L" else "RGB").save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
