"""Derive the row of an architecture that is not in the table from the repeated blocks of a model without weights."""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from peft_recipes.errors import RecipeError
from peft_recipes.models.architecture_table import TIMM, Architecture, head_modules

# Names of the modules around a layer, over the architectures in transformers
_ATTENTION = re.compile(r"attn|attention|^self$|^(q|k|v|o|query|key|value|qkv)(_proj|_lin)?$|^wqkv$", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|^(ff|intermediate|output|moe|experts?)$|dense|^(fc|lin|w|wi|wo)_?\d?$", re.IGNORECASE
)
# A mixture's router, or the gate of its shared expert: it chooses experts, it is no layer of the MLP
_ROUTER = re.compile(r"(^|_)(router|gate)$", re.IGNORECASE)
# The encoders of a multimodal model beside its text decoder
_TOWER = re.compile(r"vision|visual|image|audio|speech|video", re.IGNORECASE)
# Architectures whose forward reads the weights of these Mamba layers itself, past an adapter (PEFT rejects the first)
_MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
# Blocks of several classes in one list, such as Jamba's attention and Mamba layers
_BLOCK = re.compile(r"(Layer|Block)$")


def walk_config(config: PreTrainedConfig) -> Architecture:
    """Build the base model of a configuration on the meta device and `walk` it. Raises RecipeError if that fails."""
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except Exception as error:  # a model class can raise anything
        raise RecipeError(
            f"The table has no row for model type '{config.model_type}', and the model could not be built without "
            f"weights to look for its layers ({type(error).__name__}: {error}). Name them in target_modules."
        ) from error
    return walk(model)


def walk(model: nn.Module) -> Architecture:
    """Return the row that a model's repeated blocks suggest.

    Blocks are the members of the outermost ModuleLists (in timm also Sequentials) that hold one class of module, or
    several classes of layer, with linear layers in it; of a multimodal model only the text decoder's. A layer in a
    block is attention or MLP by the names of the modules around it; one that is neither is only in "all-linear". The
    routers of a mixture are in no group. A model without such blocks has a row without linear layers.
    """
    model_type = model.config.model_type
    blocks = _repeated_blocks(model)
    prefixes = tuple(f"{name}." for name in blocks)
    modules = dict(model.named_modules())
    layers = {
        n: m
        for n, m in modules.items()
        if isinstance(m, (nn.Linear, Conv1D))
        and n.startswith(prefixes)
        and not _is_router(n, m)
        and not (model_type in _MAMBA and n.endswith(("out_proj", "dt_proj")))
    }
    if not layers:
        return _without_blocks(model, modules)
    in_block = {name: _path_in_block(name, prefixes) for name in layers}
    components = {name: _component(path) for name, path in in_block.items()}
    targets: dict[str, list[str] | str] = {"all-linear": _targets(list(layers), in_block, blocks, modules)}
    for component in ("attention", "mlp"):
        names = [name for name in layers if components[name] == component]
        targets[component] = _targets(names, in_block, blocks, modules)
    lists = {group: tuple(names) for group, names in targets.items() if not isinstance(names, str)}
    other = [path for name, path in in_block.items() if components[name] == "other"]
    return Architecture(
        model_type=model_type,
        blocks=", ".join(blocks),
        attention=lists.get("attention", ()),
        mlp=lists.get("mlp", ()),
        linear=lists.get("all-linear", ()),
        patterns={group: pattern for group, pattern in targets.items() if isinstance(pattern, str)},
        embeddings=_embeddings(modules, prefixes),
        heads=tuple(head_modules(model)),
        layer="Conv1D" if all(isinstance(module, Conv1D) for module in layers.values()) else "Linear",
        note=_note(model, blocks, prefixes, other),
    )


def _repeated_blocks(model: nn.Module) -> dict[str, nn.ModuleList]:
    blocks: dict[str, nn.ModuleList] = {}
    lists = (nn.ModuleList, nn.Sequential) if model.config.model_type == TIMM else nn.ModuleList
    for name, module in model.named_modules():
        if not isinstance(module, lists) or name.startswith(tuple(f"{outer}." for outer in blocks)):
            continue
        classes = {type(block) for block in module}
        alike = len(classes) == 1 or all(_BLOCK.search(block.__name__) for block in classes)
        if alike and any(
            child is not block and isinstance(child, (nn.Linear, Conv1D))
            for block in module
            for child in block.modules()
        ):
            blocks[name] = module
    if model.config.get_text_config() is not model.config:
        blocks = {name: module for name, module in blocks.items() if not _TOWER.search(name)} or blocks
    return blocks


def _is_router(name: str, layer: nn.Module) -> bool:
    """Whether a layer is a router by its name, with fewer outputs than inputs (an MLP's `gate` has more)."""
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
    return bool(_ROUTER.search(name.rpartition(".")[2])) and weight.shape[0] < weight.shape[1]


def _without_blocks(model: nn.Module, modules: dict[str, nn.Module]) -> Architecture:
    """The row of a model without linear layers in blocks, such as a ResNet: only its convolutions can be targeted."""
    heads = tuple(head_modules(model))
    # LoRA needs a rank that the groups of a convolution divide: a depthwise one has too many.
    names = [
        name
        for name, module in modules.items()
        if _is_plain_convolution(module) and module.groups == 1
        and not name.startswith(tuple(f"{head}." for head in heads)) and name not in heads
    ]  # fmt: skip
    base = f"{model.base_model_prefix}." if model.base_model is not model else ""
    paths = dict.fromkeys(re.escape(name.removeprefix(base)) for name in names)
    return Architecture(
        model_type=model.config.model_type,
        blocks="",
        attention=(),
        mlp=(),
        embeddings=(),
        heads=heads,
        patterns={"convolutions": rf"(.*\.)?({'|'.join(paths)})"} if paths else {},
        note=f"The table has no row for model type '{model.config.model_type}', and no repeated blocks with linear "
        "layers were found in it: only its convolutions can be targeted, as 'convolutions' or by name.",
    )


def _is_plain_convolution(module: nn.Module) -> bool:
    """Whether a module computes as torch's own convolution, not one that also pads its input or scales its weights.

    An adapter would see neither (timm's Conv2dSame, BiT's WeightStandardizedConv2d).
    """
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def _path_in_block(name: str, prefixes: tuple[str, ...]) -> str:
    """`h.3.attn.c_attn` in blocks `h` -> `attn.c_attn`."""
    prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
    return name.removeprefix(prefix).partition(".")[2]


def _component(path: str) -> str:
    parts = path.split(".")
    if any(_ATTENTION.search(part) for part in parts):
        return "attention"
    return "mlp" if any(_MLP.search(part) for part in parts) else "other"


def _targets(
    layers: list[str], in_block: dict[str, str], blocks: dict[str, nn.ModuleList], modules: dict[str, nn.Module]
) -> list[str] | str:
    """Return name endings that match these layers and no other module, or one pattern if no such endings exist.

    Endings have two or three parts (`attn.c_attn`): one part (`dense`) could also match a layer in a head, which a
    base model does not have.
    """
    for parts in (2, 3):
        endings = list(dict.fromkeys(".".join(in_block[name].split(".")[-parts:]) for name in layers))
        matched = {name for name in modules if name.endswith(tuple(f".{ending}" for ending in endings))}
        if matched == set(layers) and all("." in e and not re.search(r"(^|\.)\d", e) for e in endings):
            return endings
    lists = "|".join(dict.fromkeys(re.escape(block.rpartition(".")[2]) for block in blocks))
    paths = "|".join(dict.fromkeys(_replace_numbers(re.escape(in_block[name]), r"\d+") for name in layers))
    pattern = rf"(.*\.)?({lists})\.\d+\.({paths})"
    if all(name in in_block for name in modules if re.fullmatch(pattern, name)):
        return pattern
    return rf"(?!.*({_TOWER.pattern})){pattern}"  # the encoder of a multimodal model has the same names


def _replace_numbers(path: str, number: str) -> str:
    """`layers.3.ffn` -> `layers.<number>.ffn`, also in an escaped path: merges the members of inner ModuleLists."""
    return re.sub(r"(?<![^.])\d+(?![^\\.])", lambda _: number, path)


def _embeddings(modules: dict[str, nn.Module], prefixes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the embeddings outside the blocks, or the module named `embeddings` that holds them with their norm."""
    names: list[str] = []
    for name, module in modules.items():
        is_embedding = isinstance(module, nn.Embedding) or name.rpartition(".")[2] == "embeddings"
        if is_embedding and not name.startswith((*prefixes, *(f"{outer}." for outer in names))):
            names.append(name)
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _note(
    model: nn.Module, blocks: dict[str, nn.ModuleList], prefixes: tuple[str, ...], other_layers: list[str]
) -> str:
    listed = ", ".join(f"{name} ({len(block)} x {type(block[0]).__name__})" for name, block in blocks.items())
    note = (
        f"The table has no row for model type '{model.config.model_type}': its layers were determined from its "
        f"repeated blocks, {listed}."
    )
    other = dict.fromkeys(_replace_numbers(path, "N") for path in other_layers)
    if other:
        note += f" Neither attention nor mlp by name, so in all-linear alone: {', '.join(other)}."
    stacked = [n for n, weight in model.named_parameters() if n.startswith(prefixes) and weight.dim() == 3]
    experts = dict.fromkeys(name.rpartition(".")[2] for name in stacked if "expert" in name)
    if experts:
        note += (
            f" Its experts are stacked parameters, not layers; target_parameters reaches them: {', '.join(experts)}."
        )
    return note
