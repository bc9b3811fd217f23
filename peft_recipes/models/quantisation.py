"""Quantised bases with bitsandbytes: NF4 with double quantisation (QLoRA) and int8, and dequantisation for merging.

Linear layers are quantised, also GPT-2's Conv1D, which transformers converts to Linear first; heads, embeddings, norms
and biases stay fp32. `prepare_model_for_kbit_training` is not needed: everything else is fp32 already, PEFT freezes
the base, and the plan decides on gradient checkpointing.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError
from peft_recipes.models.architectures import architecture_of

if TYPE_CHECKING:
    import torch.nn as nn
    from transformers import PretrainedConfig

    from peft_recipes.recipe.recipe import Recipe

# Bytes per weight with its scales: NF4 has 8 bits per 64 weights, themselves scaled in groups of 256; int8 4 per row.
BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "fp4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}

# Largest difference between two models with the same weights, relative to the size of the outputs. int8 rounds each
# layer's inputs, so a difference in the last bit of a float becomes a step of 1/127 after the next layer.
TOLERANCE = {None: 1e-3, "nf4": 1e-3, "fp4": 1e-3, "int8": 2e-2}

OPTIMIZERS = ("8bit", "bnb")  # parts of the names of bitsandbytes' optimizers
_NF4_BLOCK = 64  # weights per NF4 scale


def check_available(device: str) -> None:
    """Raise RecipeError if bitsandbytes is missing or can't run on this device."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            "Quantised bases and 8-bit optimizers need bitsandbytes: pip install 'peft_recipes[quantised]'."
        )
    if device == "mps":
        raise RecipeError("bitsandbytes has no kernels for Apple's GPU; use the CPU: --set training.use_cpu=true.")


def loading_options(recipe: Recipe, config: PretrainedConfig, quantise: str) -> dict[str, Any]:
    """Return the options of `from_pretrained` for a quantised base. quantise: "nf4" or "int8"."""
    import torch
    from transformers import BitsAndBytesConfig

    from peft_recipes.hardware.device import choose

    hardware = choose(recipe.training, recipe.threads)
    check_available(hardware.device)
    settings = BitsAndBytesConfig(
        load_in_8bit=quantise == "int8",
        load_in_4bit=quantise == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=hardware.autocast_dtype or torch.float32,
        llm_int8_skip_modules=sorted(_heads(config)),  # also of 4-bit models
    )
    return {"quantization_config": settings, "device_map": {"": hardware.device}}


def stored_quantisation(config: PretrainedConfig, model: str) -> str | None:
    """Return how a base's weights are stored: "nf4", "fp4" or "int8" by bitsandbytes; None: not quantised.

    Raises RecipeError for a base that another library has quantised (GPTQ, AWQ, FP8): an adapter can be neither
    trained nor merged here on its weights.
    """
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method") or "bitsandbytes"))
    if settings.get("load_in_8bit") and "bitsandbytes" in method:
        return "int8"
    if settings.get("load_in_4bit") and "bitsandbytes" in method:
        return str(settings.get("bnb_4bit_quant_type", "fp4"))
    raise RecipeError(
        f"model '{model}': its weights are stored in {method}, which is not read here. Name the model in 16 or 32 bits "
        "that it was made from (--set model=MODEL; for a saved adapter --base MODEL)."
    )


def stored_options(recipe: Recipe, config: PretrainedConfig, stored: str) -> dict[str, Any]:
    """Return the options of `from_pretrained` for a base that is stored quantised; a new head is not quantised."""
    from peft_recipes.hardware.device import choose

    device = choose(recipe.training, recipe.threads).device
    check_available(device)
    settings = config.quantization_config
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    skipped = sorted({*(settings.get("llm_int8_skip_modules") or ()), *_heads(config)})
    config.quantization_config = {**settings, "llm_int8_skip_modules": skipped}
    return {"config": config, "device_map": {"": device}}


def compute_as_chosen(model: nn.Module, recipe: Recipe) -> None:
    """Let 4-bit layers that were stored so compute in this machine's precision, not in that of their making."""
    import torch

    from peft_recipes.hardware.device import choose

    dtype = choose(recipe.training, recipe.threads).autocast_dtype or torch.float32
    for module in model.modules():
        if hasattr(module, "compute_type_is_set"):
            module.compute_dtype, module.compute_type_is_set = dtype, True


def disable_bf16_kernels(model: nn.Module) -> None:
    """Turn off bitsandbytes' kernels for CPUs with bf16: after the first evaluation they compute in bf16 only."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_nf4_widths(model: nn.Module, name: str) -> None:
    """Raise RecipeError if bitsandbytes (0.50) would read NF4 weights wrongly: on a CPU it takes rows for full blocks.

    Measured at a width of 32: errors of a third of the weights.
    """
    for path, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None and parameter.device.type == "cpu" and state.shape[-1] % _NF4_BLOCK:
            raise RecipeError(
                f"model '{name}': {path} has rows of {state.shape[-1]} weights, and on a CPU bitsandbytes' NF4 is "
                f"right only if they are a multiple of {_NF4_BLOCK}. Use the arm lora-int8 (quantise: int8), or a GPU."
            )


def is_quantised(model: nn.Module) -> bool:
    """Whether the model's linear layers are quantised."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def dequantised(model: nn.Module) -> nn.Module:
    """Return the quantised base with fp32 weights of the same values, to merge an adapter into.

    Merging into quantised weights would round the adapter away (transformers#31293). Layers that were Conv1D are Conv1D
    again, so that the model can be saved with its own architecture.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    converted = [name for name, module in model.named_modules() if getattr(module, "source_cls", None) is Conv1D]
    model = model.dequantize(dtype=torch.float32)
    for name in converted:
        linear = model.get_submodule(name)
        layer = Conv1D(linear.out_features, linear.in_features)
        layer.weight = torch.nn.Parameter(linear.weight.detach().t().contiguous(), requires_grad=False)
        layer.bias = linear.bias
        model.set_submodule(name, layer)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    # How the weights were read from 4 or 8 bits can't be reversed, and transformers would try when it saves.
    if read_by := getattr(model, "_weight_conversions", None):
        model._weight_conversions = [conversion for conversion in read_by if _reverses(conversion)]
    return model.float()


def _reverses(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def quantised_weights(model: nn.Module) -> int:
    """Count the weights of an unquantised (meta) model that `loading_options` would quantise."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    heads = _heads(model.config)
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if (type(module) is Linear or isinstance(module, Conv1D)) and not heads & set(name.split("."))
    )


def _heads(config: PretrainedConfig) -> set[str]:
    return {"lm_head", *architecture_of(config).heads}
