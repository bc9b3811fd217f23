"""The checks, in the order of a run: targets and data, the first batch, training, the saved adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from peft_recipes.data.columns import column_values
from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    import datasets
    import torch
    import torch.nn as nn
    from peft import PeftConfig, PeftModel


def targets_hit_modules(model: nn.Module, config: PeftConfig, name: str) -> None:
    """Check that every target name matches a module; PEFT accepts a wrong name among good ones (peft#1959)."""
    from peft_recipes.models.module_matching import matched_modules, nearest_modules, target_names, unmatched

    problems = []
    for target in unmatched(model, config):
        near = nearest_modules(model, target)
        hint = f"Nearest: {', '.join(near)}." if near else f"This model has: {', '.join(target_names(model))}."
        problems.append(f"arm '{name}': target '{target}' hits no module of {type(model).__name__}. {hint}")
    if not problems and getattr(config, "target_modules", None) and not matched_modules(model, config):
        names = ", ".join(target_names(model))
        problems.append(f"arm '{name}': its targets hit no module of {type(model).__name__}. This model has: {names}.")
    if problems:
        raise RecipeError(*problems)


def something_is_trainable(model: nn.Module, name: str) -> None:
    """Check that at least one weight is trainable."""
    if not any(p.requires_grad for p in model.parameters()):
        raise RecipeError(f"arm '{name}': nothing is trainable; its method froze every weight and added none.")


def trained_weights_are_saved(model: PeftModel, new_weights: list[str], name: str) -> None:
    """Check that the adapter's checkpoint holds every trainable weight and every new one (a task head).

    Otherwise a reload silently brings them back random, or as in the base (peft#577).
    """
    from peft import get_peft_model_state_dict

    if any(config.is_prompt_learning for config in model.peft_config.values()):
        return  # the checkpoint holds the computed embeddings, not the trained weights
    saved = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model, save_embedding_layers=False).values()}
    lost = [path for path, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in saved]
    wrappers = re.compile(r"base_model\.model\.|modules_to_save\.default\.|base_layer\.")
    in_base = {wrappers.sub("", path): p for path, p in model.named_parameters() if ".original_module." not in path}
    lost += [path for path in new_weights if path in in_base and in_base[path].data_ptr() not in saved]
    if lost:
        raise RecipeError(
            f"arm '{name}': {lost[0]} is new or trainable, but would not be saved with the adapter"
            f"{f' ({len(lost)} such weights)' if len(lost) > 1 else ''}. Name its module in the arm's modules_to_save."
        )


def more_than_one_class(train: datasets.Dataset, labels: list[str], path: str) -> None:
    """Check that the train split has more than one class."""
    classes = set(train["label"])
    if len(classes) < 2:
        raise RecipeError(
            f"dataset '{path}': all {len(train)} training rows are of one class, '{labels[classes.pop()]}'. "
            "Is the file sorted by label? Set other sizes or another dataset.seed."
        )


def labels_differ(train: datasets.Dataset, labels: list[str] | None, path: str) -> None:
    """Check that the labels of the train split are not all the same: classes, lists of classes, or numbers (None)."""
    values = train["label"]
    if labels is not None and not isinstance(values[0], list):
        more_than_one_class(train, labels, path)
    elif all(value == values[0] for value in values):
        raise RecipeError(
            f"dataset '{path}': all {len(train)} training rows have the same label, {values[0]}. Is the file sorted by "
            "label? Set other sizes or another dataset.seed."
        )


def missing_classes(splits: dict[str, datasets.Dataset], labels: list[str] | None) -> list[str]:
    """Return a note for each evaluation split without any example of a training class, whose accuracy says little.

    labels: the class names; None for labels that are numbers.
    """
    if labels is None:
        return []
    in_train = _classes(splits["train"])
    return [
        f"The {split} split has no example of: {', '.join(labels[i] for i in sorted(missing))}."
        for split in ("validation", "test")
        if split in splits and (missing := in_train - _classes(splits[split]))
    ]


def _classes(rows: datasets.Dataset) -> set[int]:
    """The ids of the classes that occur; a label is a class id or a list of them."""
    return {i for label in column_values(rows, "label") for i in (label if isinstance(label, list) else [label])}


def has_labelled_tokens(rows: datasets.Dataset, max_length: int, split: str) -> tuple[datasets.Dataset, int]:
    """Keep the examples with a labelled token after truncation; return them and the number left out.

    Raises RecipeError if none is left.
    """
    keep = [i for i, labels in enumerate(column_values(rows, "labels")) if any(label != -100 for label in labels[1:])]
    if not keep:
        raise RecipeError(
            f"No {split} example has a labelled token within {max_length} tokens: the prompts alone are longer. "
            f"Set a larger one: --set max_length={2 * max_length}."
        )
    return (rows if len(keep) == len(rows) else rows.select(keep)), len(rows) - len(keep)


def end_token_is_labelled(rows: datasets.Dataset, end_tokens: set[int], max_length: int) -> None:
    """Check that some untruncated training example has a label on an end-of-text token."""
    untruncated = [labels for labels in column_values(rows, "labels") if len(labels) < max_length]
    if untruncated and end_tokens and not any(end_tokens & set(labels) for labels in untruncated):
        raise RecipeError(
            "No training example has a label on an end-of-text token, so the model would never learn to stop. "
            "Does the chat template close the assistant's turn with the tokenizer's end-of-text token?"
        )


def padding_is_set(model: nn.Module, tokenizer: Any, batch: dict[str, Any]) -> None:
    """Check that tokenizer and model have the same padding token, and that padding in a batch has no label."""
    in_model = getattr(model.config, "pad_token_id", None)
    if tokenizer.pad_token_id is None or in_model != tokenizer.pad_token_id:
        raise RuntimeError(
            f"The padding token is {tokenizer.pad_token_id} in the tokenizer and {in_model} in the model: a classifier "
            "would read the wrong token. Set one in the base's tokenizer and configuration."
        )
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if getattr(model.config, "is_encoder_decoder", False):
        return  # the labels are those of another sequence
    per_token = mask is not None and labels is not None and mask.shape == labels.shape
    # Labels of several classes are floats [examples, classes], which may have the mask's shape by chance.
    if per_token and not labels.is_floating_point() and bool((labels[mask == 0] >= 0).any()):
        raise RuntimeError("A padding token of the first batch has a label: the model would learn to write padding.")


def loss_is_finite(loss: float, step: int) -> None:
    """Stop a run whose loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"The loss is {loss} at step {step}. Usual causes: a learning rate too high for this arm, or a broken "
            "example. Lower arms.<ARM>.learning_rate, or set training.max_grad_norm."
        )


def trainable_snapshot(model: nn.Module, limit: int = 2_000_000) -> dict[str, torch.Tensor]:
    """Copy trainable weights for `weights_moved`: the smallest first, at least one, up to about `limit` numbers."""
    snapshot: dict[str, torch.Tensor] = {}
    for path, parameter in sorted(model.named_parameters(), key=lambda item: item[1].numel()):
        if parameter.requires_grad and (not snapshot or sum(t.numel() for t in snapshot.values()) < limit):
            snapshot[path] = parameter.detach().cpu().clone()
    return snapshot


def weights_moved(before: dict[str, torch.Tensor], model: nn.Module, name: str) -> None:
    """Check that the trainable weights have changed: an adapter that can't be trained raises no error by itself."""
    import torch

    from peft_recipes.distributed import gather

    gather.reshard(model)
    weights = dict(model.named_parameters())
    after = {path: gather.full_tensor(weights[path]).cpu() for path in before}  # all of them: gathering is collective
    if before and all(torch.equal(old, after[path]) for path, old in before.items()):
        raise RuntimeError(
            f"arm '{name}': after training none of its weights has moved. Is its learning rate 0, does gradient "
            "checkpointing run without input gradients (transformers#42489), or (grpo) did the answers to a prompt "
            "always have equal rewards?"
        )


def frozen_sums(model: nn.Module) -> dict[str, int]:
    """Return a checksum of each frozen weight and buffer, the sum of its bits as integers (0.2 s per GB).

    Buffers (BatchNorm's running statistics) are frozen in a model that has frozen weights, except in `modules_to_save`.

    The checksum of a weight that FSDP2 shards is the sum of its shards' checksums.
    """
    import torch

    from peft_recipes.distributed import gather

    gather.reshard(model)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    frozen = {path: p for path, p in model.named_parameters() if not p.requires_grad}
    if frozen:
        saved = model.state_dict(keep_vars=True)  # without the buffers that are computed from the configuration
        trained = "modules_to_save."
        frozen |= {path: b for path, b in model.named_buffers() if path in saved and trained not in path}
    sums = {
        path: int(gather.local_shard(p).contiguous().view(integers[p.element_size()]).sum(dtype=torch.int64))
        for path, p in frozen.items()
        if p.device.type != "meta" and not p.is_complex()
    }
    return gather.sum_over_ranks(sums, model)


def frozen_unchanged(before: dict[str, int], model: nn.Module, name: str) -> None:
    """Check that the frozen weights have not changed: an adapter trained on a changed base fits no base."""
    after = frozen_sums(model)
    changed = [path for path, old in before.items() if after.get(path, old) != old]
    if changed:
        raise RuntimeError(
            f"arm '{name}': {len(changed)} weights that should be frozen have changed in training, first {changed[0]}. "
            "The saved adapter would not fit the base. Does a callback or the method itself write to the base?"
        )


def gap(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the largest absolute difference of two outputs, relative to the first's largest value (at least 1)."""
    return float((first - second).abs().max()) / max(1.0, float(first.abs().max()))


def same_outputs(first: torch.Tensor, second: torch.Tensor, what: str, tolerance: float = 1e-3) -> float:
    """Return the `gap` of two outputs that should be equal. Raises RuntimeError if it exceeds the tolerance."""
    difference = gap(first, second)
    if not difference <= tolerance:  # also true for NaN
        raise RuntimeError(f"{what}: outputs differ by {difference:.2g} of their size, more than {tolerance:g}.")
    return difference


def folder_is_adapter_only(files: Iterable[str]) -> None:
    """Check that the adapter was saved without the base."""
    base_files = [name for name in files if name.startswith(("model", "pytorch_model"))]
    if base_files:
        raise RuntimeError(f"The adapter's folder holds the base as well: {', '.join(base_files)}.")
