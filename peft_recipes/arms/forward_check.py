"""A forward pass of an image model with its adapter, before anything else is done with it.

Some models read attributes of a layer that PEFT has wrapped (MobileNet its convolutions' stride), others standardise
its weights or pad its input. PEFT adapts such layers without a word, and the first training step fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_recipes.errors import RecipeError
from peft_recipes.models.image_sizes import channels, height_and_width

if TYPE_CHECKING:
    import torch.nn as nn


def check_forward(model: nn.Module, name: str, method: str) -> None:
    """Run an adapted image model on one black image; the model may be on the meta device.

    Raises RecipeError if the model can't compute with the adapter. Models of text are left: their layers are linear.
    """
    import torch

    if getattr(model, "main_input_name", None) != "pixel_values":
        return
    config, training = model.config, model.training
    device = next(model.parameters()).device
    pixels = torch.zeros(1, channels(config), *height_and_width(config), device=device)
    try:
        model.eval()
        with torch.no_grad():
            model(pixel_values=pixels)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if device.type == "meta" and (isinstance(error, NotImplementedError) or "meta" in text.lower()):
            return  # an operation that has no result without data
        raise RecipeError(
            f"arm '{name}': the model can't compute with {method} on these layers ({type(error).__name__}: "
            f"{text.rstrip('.')}). Name other layers in target_modules."
        ) from error
    finally:
        model.train(training)
