"""Quantised bases, by bitsandbytes: NF4 with double quantisation (QLoRA's), and int8; and back to full weights.

Linear layers are quantised, and GPT-2's Conv1D, which transformers turns into a Linear first; heads, embeddings, norms
and biases stay fp32. What `prepare_model_for_kbit_training` does beside is done already: everything else is fp32, the
base is frozen by PEFT, and gradient checkpointing is the plan's decision.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError
from peft_recipes.models.architectures import architecture_of

if TYPE_CHECKING:
    import torch.nn as nn

    from peft_recipes.recipe.recipe import Recipe

# Bytes a weight, with its scales: NF4's are 8 bits for each 64 weights, themselves scaled in 256s; int8's 4 a row.
BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}

# How far two models with the same weights may answer apart, as a share of the outputs' size. int8 rounds the inputs of
# every layer, so that what differs in the last bit of a float is a whole step of 1/127 behind the next layer.
TOLERANCE = {None: 1e-3, "nf4": 1e-3, "int8": 2e-2}

_BLOCK = 64  # weights of one NF4 scale
OPTIMIZERS = ("8bit", "bnb")  # what the names of bitsandbytes' optimizers hold


def check_available(device: str) -> None:
    """Raises RecipeError where bitsandbytes is missing, or can't run on this device."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            "Quantised bases and 8-bit optimizers need bitsandbytes: pip install 'peft_recipes[quantised]'."
        )
    if device == "mps":
        raise RecipeError("bitsandbytes has no kernels for Apple's GPU; use the CPU: --set training.use_cpu=true.")


def loading_options(recipe: Recipe, config: Any, kind: str) -> dict[str, Any]:
    """What from_pretrained is given for a quantised base. kind: "nf4" or "int8"."""
    import torch
    from transformers import BitsAndBytesConfig

    from peft_recipes.hardware.device import choose

    hardware = choose(recipe.training, recipe.threads)
    check_available(hardware.device)
    heads = sorted({"lm_head", *(name for names in architecture_of(config).heads.values() for name in names)})
    if kind == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=heads,
            bnb_4bit_compute_dtype=torch.bfloat16 if hardware.precision == "bf16" else torch.float32,
        )  # fmt: skip
    return {"quantization_config": settings, "device_map": {"": hardware.device}}


def keep_exact(model: nn.Module) -> None:
    """Turns off bitsandbytes' own path on CPUs with bf16: it repacks the weights at the first evaluation and computes
    in bf16 from then on, so that a model would answer otherwise than it was trained to."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_rows(model: nn.Module, name: str) -> None:
    """Raises RecipeError where bitsandbytes (0.50) gives NF4 weights back wrongly: on a CPU it takes each row for whole
    blocks of 64, whatever its width (seen: errors of a third of the weights at a width of 32)."""
    for path, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None and parameter.device.type == "cpu" and state.shape[-1] % _BLOCK:
            raise RecipeError(
                f"model '{name}': {path} has rows of {state.shape[-1]} weights, and on a CPU bitsandbytes' NF4 is "
                f"right only where they are a multiple of {_BLOCK}. Use the arm lora-int8 (quantise: int8), or a GPU."
            )


def is_quantised(model: nn.Module) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def dequantised(model: nn.Module) -> nn.Module:
    """The base with the weights that its quantised ones stand for, in fp32: what an adapter is merged into.

    Merging into quantised weights would round the adapter away (transformers#31293). A layer that was a Conv1D is one
    again, so that the model can be saved as what it was.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    turned = [n for n, m in model.named_modules() if getattr(m, "source_cls", None) is Conv1D]
    model = model.dequantize(dtype=torch.float32)
    for name in turned:
        linear = model.get_submodule(name)
        layer = Conv1D(linear.out_features, linear.in_features)
        layer.weight = torch.nn.Parameter(linear.weight.detach().t().contiguous(), requires_grad=False)
        layer.bias = linear.bias
        model.set_submodule(name, layer)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    return model.float()


def quantised_weights(model: nn.Module) -> int:
    """How many weights of an unquantised model, on the meta device, `loading_options` would have quantised."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    heads = {name for names in architecture_of(model.config).heads.values() for name in names} | {"lm_head"}
    layers = [
        module
        for name, module in model.named_modules()
        if (type(module) is Linear or isinstance(module, Conv1D)) and not heads & set(name.split("."))
    ]
    return sum(layer.weight.numel() for layer in layers)
