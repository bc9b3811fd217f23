"""Guards: cheap, on by default; each says what, where and what to do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    import datasets
    import torch
    import torch.nn as nn
    from peft import PeftConfig, PeftModel


def targets_hit_modules(model: nn.Module, config: PeftConfig, name: str) -> None:
    """Every target name hits a module. PEFT itself accepts a wrong name among good ones without a word (peft#1959)."""
    from peft_recipes.models.module_matching import matched_modules, nearest_modules, target_names, unmatched

    problems = []
    for target in unmatched(model, config):
        near = nearest_modules(model, target)
        hint = f"Nearest: {', '.join(near)}." if near else f"This model has: {', '.join(target_names(model))}."
        problems.append(f"arm '{name}': target '{target}' hits no module of {type(model).__name__}. {hint}")
    if not problems and getattr(config, "target_modules", None) and not matched_modules(model, config):
        there = ", ".join(target_names(model))
        problems.append(f"arm '{name}': its targets hit no module of {type(model).__name__}. This model has: {there}.")
    if problems:
        raise RecipeError(*problems)


def something_is_trainable(model: nn.Module, name: str) -> None:
    """At least one weight learns."""
    if not any(p.requires_grad for p in model.parameters()):
        raise RecipeError(f"arm '{name}': nothing is trainable; its method froze every weight and added none.")


def more_than_one_class(train: datasets.Dataset, labels: list[str], path: str) -> None:
    """A train split of one class teaches nothing."""
    counts = Counter(train["label"])
    if len(counts) < 2:
        only = labels[next(iter(counts))]
        raise RecipeError(
            f"dataset '{path}': all {len(train)} training rows are of one class, '{only}'. "
            "Is the file sorted by label? Set other sizes or another dataset.seed."
        )


def missing_classes(splits: dict[str, datasets.Dataset], labels: list[str]) -> list[str]:
    """A note for each evaluation split that lacks a class of the train split: its accuracy would say little."""
    learnt = set(splits["train"]["label"])
    return [
        f"The {split} split has no example of: {', '.join(labels[i] for i in sorted(gone))}."
        for split in ("validation", "test")
        if split in splits and (gone := learnt - set(splits[split]["label"]))
    ]


def has_labelled_tokens(rows: datasets.Dataset, max_length: int, split: str) -> tuple[datasets.Dataset, int]:
    """The rows that keep a labelled token after truncation, and how many do not. Raises RecipeError when none does."""
    keep = [i for i, labels in enumerate(rows["labels"]) if any(label != -100 for label in labels[1:])]
    if not keep:
        raise RecipeError(
            f"No {split} example has a token to learn within {max_length} tokens: the prompts alone are longer. "
            f"Set a larger one: --set max_length={2 * max_length}."
        )
    return (rows if len(keep) == len(rows) else rows.select(keep)), len(rows) - len(keep)


def loss_is_finite(loss: float, step: int) -> None:
    """Stops a run whose loss is NaN or infinite; nothing after that step is worth the time."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"The loss is {loss} at step {step}. Usual causes: a learning rate too high for this arm, or a broken "
            "example. Lower arms.<ARM>.learning_rate, or set training.max_grad_norm."
        )


def weights_moved(before: dict[str, torch.Tensor], model: nn.Module, name: str) -> None:
    """The trainable weights differ from what they were: an adapter that can't learn raises no error by itself."""
    import torch

    from peft_recipes.distributed import gather

    gather.reshard(model)
    learning = dict(model.named_parameters())
    now = {path: gather.full_tensor(learning[path]).cpu() for path in before}  # all, as every process gathers the same
    if before and all(torch.equal(old, now[path]) for path, old in before.items()):
        raise RuntimeError(
            f"arm '{name}': after training none of its weights has moved. Is its learning rate 0, or does gradient "
            "checkpointing run without input gradients (transformers#42489)?"
        )


def learns_are_saved(model: PeftModel, new_weights: list[str], name: str) -> None:
    """Every weight that learns, and every newly made one, is among what the adapter stores.

    Otherwise it comes back random, or as it was in the base, without a word (peft#577).
    """
    from peft import get_peft_model_state_dict

    if any(config.is_prompt_learning for config in model.peft_config.values()):
        return  # stored as computed embeddings, not as the weights that learn
    stored = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model, save_embedding_layers=False).values()}
    lost = [path for path, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in stored]
    parameters = {_plain_name(path): p for path, p in model.named_parameters() if ".original_module." not in path}
    lost += [path for path in new_weights if path in parameters and parameters[path].data_ptr() not in stored]
    if lost:
        raise RecipeError(
            f"arm '{name}': {lost[0]} is new or learns, but would not be saved with the adapter"
            f"{f' ({len(lost)} such weights)' if len(lost) > 1 else ''}. Name its module in the arm's modules_to_save."
        )


def _plain_name(path: str) -> str:
    """A weight's name in the base, of its name in a PeftModel."""
    for part in ("base_model.model.", "modules_to_save.default.", "base_layer."):
        path = path.replace(part, "")
    return path


def frozen_sums(model: nn.Module) -> dict[str, int]:
    """A sum over the bits of each weight that does not learn: of a gigabyte in a fifth of a second.

    Of weights that are spread over processes, the sum of their parts' sums.
    """
    import torch

    from peft_recipes.distributed import gather

    gather.reshard(model)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = {
        path: int(gather.local_shard(p).contiguous().view(kinds[p.element_size()]).sum(dtype=torch.int64))
        for path, p in model.named_parameters()
        if not p.requires_grad and p.device.type != "meta"
    }
    return gather.sum_over_ranks(sums, model)


def frozen_unchanged(before: dict[str, int], model: nn.Module, name: str) -> None:
    """The frozen weights are what they were: an adapter on a changed base is an adapter for no base at all."""
    now = frozen_sums(model)
    moved = [path for path, old in before.items() if now.get(path, old) != old]
    if moved:
        raise RuntimeError(
            f"arm '{name}': {len(moved)} weights that should be frozen have changed in training, first {moved[0]}. "
            "What was saved would not fit the base. Does a callback or the method itself write to the base?"
        )


def padding_is_set(model: nn.Module, tokenizer: Any, batch: dict[str, Any]) -> None:
    """The tokenizer's padding token is the model's, and a padded place of a batch carries no label."""
    if tokenizer.pad_token_id is None or getattr(model.config, "pad_token_id", None) != tokenizer.pad_token_id:
        raise RuntimeError(
            f"The padding token is {tokenizer.pad_token_id} in the tokenizer and "
            f"{getattr(model.config, 'pad_token_id', None)} in the model: a classifier would read the wrong token. "
            "Set one in the base's tokenizer and configuration."
        )
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if mask is not None and labels is not None and mask.shape == labels.shape and bool((labels[mask == 0] >= 0).any()):
        raise RuntimeError("A padded place of the first batch carries a label: the model would learn to write padding.")


def end_is_learnt(rows: datasets.Dataset, ends: set[int], max_length: int) -> None:
    """Some training example that was not cut has an end-of-text token with a label."""
    whole = [labels for labels in rows["labels"] if len(labels) < max_length]
    if whole and ends and not any(ends & set(labels) for labels in whole):
        raise RecipeError(
            "No training example has a label on an end-of-text token, so the model would never learn to stop. "
            "Does the chat template close the assistant's turn with the tokenizer's end-of-text token?"
        )


def trainable_snapshot(model: nn.Module, limit: int = 2_000_000) -> dict[str, torch.Tensor]:
    """Copies of trainable weights, the smallest first, at least one and up to `limit` numbers, for `weights_moved`."""
    taken: dict[str, torch.Tensor] = {}
    for path, parameter in sorted(model.named_parameters(), key=lambda item: item[1].numel()):
        if parameter.requires_grad and (not taken or sum(t.numel() for t in taken.values()) < limit):
            taken[path] = parameter.detach().cpu().clone()
    return taken


def same_outputs(first: torch.Tensor, second: torch.Tensor, what: str, tolerance: float = 1e-3) -> float:
    """The largest difference of two outputs that must be equal, as a share of their size. Raises beyond tolerance."""
    found = gap(first, second)
    if not found <= tolerance:  # also true for NaN
        raise RuntimeError(f"{what}: outputs differ by {found:.2g} of their size, more than {tolerance:g}.")
    return found


def gap(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference of two outputs as a share of the first's size (of 1 where that is less)."""
    return float((first - second).abs().max()) / max(1.0, float(first.abs().max()))


def folder_is_adapter_only(files: Iterable[str]) -> None:
    """What was saved is the adapter and not the base beside it."""
    stray = [name for name in files if name.startswith(("model", "pytorch_model"))]
    if stray:
        raise RuntimeError(f"The adapter's folder holds the base as well: {', '.join(stray)}.")
