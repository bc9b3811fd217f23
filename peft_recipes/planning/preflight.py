"""Checks of a recipe on its data and its base's configuration, before a weight is loaded; for plans and runs alike."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from peft_recipes.arms.merge import embedding_layers
from peft_recipes.errors import RecipeError
from peft_recipes.models import bases
from peft_recipes.models.meta import meta_model
from peft_recipes.models.module_matching import matched_modules
from peft_recipes.models.positions import learnt_positions
from peft_recipes.models.quantisation import stored_quantisation
from peft_recipes.recipe.arm import QUANTISED
from peft_recipes.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch.nn as nn

    from peft_recipes.data.prepared import Prepared
    from peft_recipes.tasks.base import Task

_TRL = ("sft", "language-modeling", "dpo", "kto", "grpo")  # trained by trl's trainers, which fuse the LM head
_OWN_LENGTHS = ("image-classification", "seq2seq")  # the tasks without max_length, or that cut at the positions


def as_stored(recipe: Recipe, config: Any, arms: Collection[str]) -> tuple[Recipe, list[str]]:
    """Let the adapter arms train on the base as it is stored, if that is in nf4 or int8; return the recipe and notes.

    Raises RecipeError for an arm that trains or quantises the base's own weights, and for a base in another format.
    """
    stored = stored_quantisation(config, recipe.model) if recipe.model != bases.SMALL_CNN else None
    if stored is None:
        return recipe, []
    problems, changed = [], dict(recipe.arms)
    for name, arm in recipe.arms.items():
        where = f"arm '{name}': the weights of model '{recipe.model}' are stored in {stored}"
        if arm.peft is not None and arm.quantise in (None, stored) and stored in QUANTISED:
            changed[name] = dataclasses.replace(arm, quantise=stored)
        elif name not in arms:
            continue
        elif arm.method == "full":
            problems.append(f"{where}, which can't be trained. Name the model that it was made from "
                            "(--set model=MODEL), or train adapters alone: --arms lora, for example.")  # fmt: skip
        elif arm.quantise:
            problems.append(f"{where}, not in {arm.quantise}. Leave out quantise, or name the full-precision model.")
        elif stored not in QUANTISED and arm.peft is not None:
            problems.append(f"{where}; adapters are trained on {' and '.join(QUANTISED)}. Name the full-precision "
                            "model: --set model=MODEL.")  # fmt: skip
    if problems:
        raise RecipeError(*problems)
    note = f"The base is stored in {stored}: adapters are trained on it so, and merged into its dequantised weights."
    return dataclasses.replace(recipe, arms=changed), [note]


def check_fit(task: Task, prepared: Prepared | None, config: Any, arms: Collection[str]) -> list[str]:
    """Check max_length, token ids and batches on the base and the data; return notes. Raises RecipeError."""
    recipe = task.recipe
    notes, problems = [], _no_step(task, prepared)
    if recipe.model == bases.SMALL_CNN or recipe.task == "image-classification":
        if problems:
            raise RecipeError(*problems)
        return notes
    model = meta_model(recipe, copy.deepcopy(config))
    problems += _beyond_positions(recipe, prepared, model, arms)
    problems += _beyond_vocabulary(recipe, prepared, model)
    problems += _on_the_head(recipe, arms, model)
    if problems:
        raise RecipeError(*problems)
    if note := _beyond_training(recipe, prepared, config, model):
        notes.append(note)
    return notes + [note for name in arms if name in recipe.arms and (note := _tied(recipe, name, model))]


def _beyond_positions(recipe: Recipe, prepared: Prepared | None, model: nn.Module, arms: Collection[str]) -> list[str]:
    limit, length = learnt_positions(model), recipe.max_length
    if limit is None or recipe.task in _OWN_LENGTHS:
        return []
    if length > limit and length == Recipe.max_length and 0 < (longest := _longest(prepared)) <= limit:
        length = longest  # the default, which nobody chose: what counts is the data
    if length > limit:
        return [f"max_length {length:,} is more than the {limit:,} positions of model '{recipe.model}'. "
                f"Set it to {limit:,} or less: --set max_length={limit}."]  # fmt: skip
    problems = []
    for name in arms:
        virtual = getattr(getattr(recipe.arms.get(name), "peft", None), "num_virtual_tokens", None) or 0
        if length + virtual > limit:
            problems.append(f"arm '{name}': its {virtual} virtual tokens and max_length {length:,} are more than the "
                            f"{limit:,} positions of model '{recipe.model}'. Set --set max_length="
                            f"{max(limit - virtual, 2)}.")  # fmt: skip
    return problems


def _beyond_training(recipe: Recipe, prepared: Prepared | None, config: Any, model: nn.Module) -> str | None:
    """A note where an example is longer than what a base that computes its positions was made for."""
    trained = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(trained, int) or recipe.max_length <= trained or learnt_positions(model) is not None:
        return None
    if (longest := _longest(prepared)) <= trained:
        return None
    return (f"The longest example has {longest:,} tokens, more than the {trained:,} positions that the base was made "
            "for. It computes its positions, so it runs; how well is not known.")  # fmt: skip


def _beyond_vocabulary(recipe: Recipe, prepared: Prepared | None, model: nn.Module) -> list[str]:
    """Whether the data, or its padding, has a token without a row in the base's embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    if prepared is None or prepared.processor is None or len(prepared.processor) <= rows:
        return []
    used = {prepared.processor.pad_token_id} | {
        max(ids)
        for split in _in_memory(prepared)
        for column in split.column_names
        if column.endswith("_ids")
        for ids in split[column]
        if isinstance(ids, list) and ids and isinstance(ids[0], int)
    }
    missing = sorted(token for token in used if isinstance(token, int) and token >= rows)
    if not missing:
        return []
    named = ", ".join(f"{prepared.processor.convert_ids_to_tokens(token)!r} ({token})" for token in missing[:3])
    return [f"model '{recipe.model}': its embedding has {rows:,} rows and its tokenizer {len(prepared.processor):,} "
            f"tokens; the data uses {named}, which have no row. Resize the base once and save it with its tokenizer "
            "(model.resize_token_embeddings(len(tokenizer))), then name that folder: --set model=FOLDER."]  # fmt: skip


def _no_step(task: Task, prepared: Prepared | None) -> list[str]:
    training = task.recipe.training
    if prepared is None or not training.get("dataloader_drop_last") or task.recipe.task == "grpo":
        return []
    rows, batch = prepared.rows.get("train"), training.get("per_device_train_batch_size", 8)
    if rows is None or rows >= batch:
        return []
    return [f"training.dataloader_drop_last: the {rows} training examples are less than one batch of {batch}, so all "
            "of them would be dropped and there is no step. Leave it out, or use smaller batches: "
            f"--set training.per_device_train_batch_size={max(rows, 1)}."]  # fmt: skip


def _in_memory(prepared: Prepared) -> list[Any]:
    """The splits whose rows can be read here and again by the trainer; not a stream."""
    return [split for split in prepared.splits.values() if hasattr(split, "__len__")]


def _longest(prepared: Prepared | None) -> int:
    if prepared is None:
        return 0
    splits = [split for split in _in_memory(prepared) if "input_ids" in split.column_names]
    return max((len(ids) for split in splits for ids in split["input_ids"]), default=0)


def _tied(recipe: Recipe, name: str, model: nn.Module) -> str | None:
    """What to know of an adapter on the embedding or the LM head where both share one weight; None elsewhere."""
    method, layers = recipe.arms[name].peft, embedding_layers(model)
    if method is None or getattr(method, "ensure_weight_tying", False) or not _share(layers):
        return None
    hit = _adapted(method, model, layers)
    if not hit:
        return None
    way = f" To change both alike: --set arms.{name}.peft.ensure_weight_tying=true"
    if recipe.task in _TRL and not set(hit) <= set(_adapted(method, model, layers, targets=False)):
        way += f", with {hit[0].rpartition('.')[2]} in modules_to_save and not in target_modules"
    way = f"{way}." if hasattr(method, "ensure_weight_tying") else ""
    return (f"arm '{name}': this base shares one weight between its embedding and its LM head, and the adapter changes "
            f"{' and '.join(hit)} {'each by itself' if len(hit) > 1 else 'alone'}. Merged, the two are stored "
            f"apart.{way}")  # fmt: skip


def _on_the_head(recipe: Recipe, arms: Collection[str], model: nn.Module) -> list[str]:
    """The adapters on an LM head that trl's trainers, which compute with its own weight, would refuse or not train."""
    layers, problems = embedding_layers(model), []
    if recipe.task not in _TRL or not layers:
        return []
    for name in arms:
        method = recipe.arms[name].peft if name in recipe.arms else None
        if method is None:
            continue
        targets = set(_matched(model, method))
        adapted = [module for path, module in model.named_modules() if path in targets and module in layers]
        ties = getattr(method, "ensure_weight_tying", False) or method.peft_type == "TRAINABLE_TOKENS"
        if layers[1] in adapted or (adapted and ties and _share(layers)):
            why = "its adapter" if layers[1] in adapted else "its adapter on an embedding that is tied to the LM head"
            problems.append(f"arm '{name}': {why} is on the LM head, and trl's trainers compute with the head's own "
                            "weight, so it would not be trained. Leave the head out of target_modules, or train it "
                            "in full: modules_to_save.")  # fmt: skip
    return problems


def _share(layers: list[Any]) -> bool:
    return bool(layers) and layers[0].weight is layers[1].weight


def _matched(model: nn.Module, method: Any) -> list[str]:
    """The modules that get an adapter; none where the method names none and PEFT has no default for the base."""
    try:
        return matched_modules(model, method)
    except RecipeError:
        return []


def _adapted(method: Any, model: nn.Module, layers: list[Any], targets: bool = True) -> list[str]:
    """The paths of those layers that the method adapts (targets: False leaves them out) or trains in full."""
    matched = {*(_matched(model, method) if targets else ()), *(getattr(method, "modules_to_save", None) or ())}
    paths = {path for path, module in model.named_modules() if module in layers}
    return sorted(path for path in paths if path in matched or path.rpartition(".")[2] in matched)
