"""An architecture without a row in the table, read off the repeated blocks of a model that holds no weights."""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from peft_recipes.errors import RecipeError
from peft_recipes.models.architecture_table import Architecture, head_modules

# What the module around a layer is called, over the architectures that transformers has
_ATTENTION = re.compile(r"attn|attention|^self$|^(q|k|v|o|query|key|value|qkv)(_proj|_lin)?$|^wqkv$", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|^(ff|intermediate|output|moe|experts?)$|dense|^(fc|lin|w|wi|wo)_?\d?$", re.IGNORECASE
)


def walk_config(config: PreTrainedConfig) -> Architecture:
    """Build the configuration's base model on the meta device and `walk` it. Raises RecipeError where that fails."""
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except Exception as error:  # a model class may fail in any way; the user's way on is the same
        raise RecipeError(
            f"The table has no row for model type '{config.model_type}', and the model could not be built without "
            f"weights to look for its layers ({type(error).__name__}: {error}). Name them in target_modules."
        ) from error
    return walk(model)


def walk(model: nn.Module) -> Architecture:
    """The row that a model's repeated blocks suggest.

    A block is a member of the outermost ModuleLists whose members are all of one class and hold linear layers. A layer
    inside is attention or mlp by the names of the modules around it; one that is neither is in "all-linear" alone.
    Raises RecipeError when the model has no such blocks.
    """
    model_type = model.config.model_type
    blocks = _repeated_blocks(model)
    inside = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name.startswith(tuple(f"{block}." for block in blocks))
    }
    if not inside:
        raise RecipeError(
            f"The table has no row for model type '{model_type}', and no repeated blocks with linear layers were "
            "found in it. Name the layers in target_modules."
        )
    relative = {name: _inside_block(name, blocks) for name in inside}
    kinds = {name: _kind(path) for name, path in relative.items()}
    groups = {
        "attention": [name for name in inside if kinds[name] == "attention"],
        "mlp": [name for name in inside if kinds[name] == "mlp"],
        "all-linear": list(inside),
    }
    everything = [name for name, _ in model.named_modules()]
    named = {which: _names(wanted, relative, blocks, everything) for which, wanted in groups.items()}
    lists = {which: tuple(names) for which, names in named.items() if not isinstance(names, str)}
    return Architecture(
        model_type=model_type,
        blocks=", ".join(blocks),
        attention=lists.get("attention", ()),
        mlp=lists.get("mlp", ()),
        linear=lists.get("all-linear", ()),
        patterns={which: names for which, names in named.items() if isinstance(names, str)},
        embeddings=_embeddings(model, blocks),
        heads={"any": tuple(head_modules(model))},
        layer="Conv1D" if all(isinstance(module, Conv1D) for module in inside.values()) else "Linear",
        note=_note(model, blocks, relative, kinds),
    )


def _repeated_blocks(model: nn.Module) -> dict[str, nn.ModuleList]:
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or name.startswith(tuple(f"{outer}." for outer in found)):
            continue
        if len({type(member) for member in module}) == 1 and _holds_linear(module[0]):
            found[name] = module
    return found


def _holds_linear(block: nn.Module) -> bool:
    return any(child is not block and isinstance(child, (nn.Linear, Conv1D)) for child in block.modules())


def _inside_block(name: str, blocks: dict[str, nn.ModuleList]) -> str:
    """`h.3.attn.c_attn` in blocks `h` -> `attn.c_attn`."""
    block = next(block for block in blocks if name.startswith(f"{block}."))
    return name[len(block) + 1 :].partition(".")[2]


def _kind(path: str) -> str:
    parts = path.split(".")
    if any(_ATTENTION.search(part) for part in parts):
        return "attention"
    return "mlp" if any(_MLP.search(part) for part in parts) else "other"


def _names(wanted: list[str], relative: dict[str, str], blocks: dict, everything: list[str]) -> list[str] | str:
    """The ends of names that hit the wanted layers and no other module, or one pattern where such ends can't be had.

    An end of two or three parts (`attn.c_attn`) is trusted; one part (`dense`) could also end the name of a layer in a
    head that this model, a base, does not have.
    """
    for parts in (2, 3):
        ends = list(dict.fromkeys(".".join(relative[name].split(".")[-parts:]) for name in wanted))
        hit = {name for name in everything if name.endswith(tuple(f".{end}" for end in ends))}
        if hit == set(wanted) and all("." in end and not re.search(r"(^|\.)\d", end) for end in ends):
            return ends
    lists = "|".join(dict.fromkeys(re.escape(block.rpartition(".")[2]) for block in blocks))
    paths = "|".join(dict.fromkeys(_any_number(re.escape(relative[name]), r"\d+") for name in wanted))
    return rf"(.*\.)?({lists})\.\d+\.({paths})"


def _any_number(path: str, number: str) -> str:
    """`layers.3.ffn` -> `layers.<number>.ffn`, also in an escaped path: what differs between members of inner lists."""
    return re.sub(r"(?<![^.])\d+(?![^\\.])", lambda _: number, path)


def _embeddings(model: nn.Module, blocks: dict[str, nn.ModuleList]) -> tuple[str, ...]:
    """Embedding tables outside the blocks, or the module called `embeddings` that holds them with their norm."""
    inner = tuple(f"{block}." for block in blocks)
    found: list[str] = []
    for name, module in model.named_modules():
        named_so = name.rpartition(".")[2] == "embeddings"
        if (named_so or isinstance(module, nn.Embedding)) and not name.startswith((*inner, *(f"{n}." for n in found))):
            found.append(name)
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in found))


def _note(model: nn.Module, blocks: dict, relative: dict[str, str], kinds: dict[str, str]) -> str:
    listed = ", ".join(f"{name} ({len(block)} x {type(block[0]).__name__})" for name, block in blocks.items())
    note = (
        f"The table has no row for model type '{model.config.model_type}': its layers were read off its repeated "
        f"blocks, {listed}."
    )
    other = dict.fromkeys(_any_number(path, "N") for name, path in relative.items() if kinds[name] == "other")
    if other:
        note += f" Neither attention nor mlp by name, so in all-linear alone: {', '.join(other)}."
    inner = tuple(f"{block}." for block in blocks)
    stacked = [name for name, parameter in model.named_parameters() if name.startswith(inner) and parameter.dim() == 3]
    experts = dict.fromkeys(name.rpartition(".")[2] for name in stacked if "expert" in name)
    if experts:
        note += (
            f" Its experts are stacked parameters, not layers; target_parameters reaches them: {', '.join(experts)}."
        )
    return note
