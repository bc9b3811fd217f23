"""Make a LoRA of any adapter that changes weights, and measure what the conversion loses.

PEFT's own conversion is used where PEFT has one. Other methods that can be merged (DoRA, OFT, IA3) are converted from
the change that they make to each weight: its truncated SVD, the best approximation of that rank.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.adapters.merge import TEST_SPLIT, check_reloaded, largest_difference, real_inputs
from peft_recipes.adapters.open import evaluate
from peft_recipes.adapters.saved import CONFIG, RECIPE_FILE, WEIGHTS
from peft_recipes.arms.merge import merged as merged_model
from peft_recipes.errors import RecipeError
from peft_recipes.exporting.subject import Subject
from peft_recipes.inference.evaluate import compared, test_facts
from peft_recipes.training.verify import compute_logits

if TYPE_CHECKING:
    import torch
    from torch import nn

PEFTS, OURS = "peft.convert_to_lora", "SVD of the merged weights' change"
_INPUTS = 8
_PREFIX = "base_model.model."
# Methods that change inputs or activations, and no weight.
_NO_WEIGHT = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT",
              "CARTRIDGE")  # fmt: skip
CONVERTIBLE = "LoRA variants (DoRA, ...), AdaLoRA, LoHa, LoKr, OFT, BOFT, HRA, IA3, VeRA, VB-LoRA, RandLoRA, FourierFT"


def check(subject: Subject, rank: int | None) -> None:
    """Raise RecipeError for a rank that is none, and for a method whose change is no change of weights."""
    if rank is None:
        raise RecipeError("--to lora needs --rank R, the rank of the LoRA: 16, for example.")
    if rank < 1:
        raise RecipeError(f"--rank {rank}: expected 1 or more.")
    if subject.method in _NO_WEIGHT:
        raise RecipeError(
            f"{subject.folder} is {subject.method}, which changes the input and no weight, so no LoRA can stand for it."
            f" Convertible: {CONVERTIBLE}."
        )
    if subject.opened.saved.config.__dict__.get("modules_to_save") and subject.opened.generates:
        names = ", ".join(sorted(subject.opened.saved.config.modules_to_save))
        raise RecipeError(
            f"{subject.folder} has modules of its own (modules_to_save: {names}), which a LoRA for a server can't "
            "hold. Merge it with `peft-recipes merge`."
        )


def export(subject: Subject, rank: int, folder: Path) -> dict[str, Any]:
    """Write the LoRA's folder; return what export.json says: how it was made and what it loses.

    Raises RecipeError for a method that can neither be converted nor merged.
    """
    opened = subject.opened
    base = opened.load_base(dequantise=True)
    inputs, source, notes = real_inputs(opened, base, _INPUTS)
    if source == TEST_SPLIT:
        opened.task.use_base(base, opened.prepared, None)
    original = opened.attach(base)
    hardware = opened.hardware()
    before = compute_logits(original, inputs, hardware)
    evaluated = evaluate(opened, original) if source == TEST_SPLIT else None
    config, tensors, by, share = _convert(subject, original, rank)
    _write(subject, folder, config, tensors)
    model = _load(subject, folder)
    if source == TEST_SPLIT:
        opened.task.use_base(model.get_base_model(), opened.prepared, None)
    after = compute_logits(model, inputs, hardware)
    check_reloaded(_load(subject, folder), inputs, after, hardware)
    row = None
    if evaluated is not None:
        converted = evaluate(opened, model)
        row = compared(evaluated, converted, test_facts(opened, converted), opened.recipe.task)
        metrics = {"original": evaluated.metrics, "lora": converted.metrics}
        row = {"original": row.pop("base"), "lora": row.pop("adapter"), **row, "metrics": metrics}
    return {
        "rank": rank,
        "converted_by": by,
        "kept_of_change": share,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "test": row,
        "logits": largest_difference(before, after),
        "inputs": {"count": len(inputs), "source": source},
        "notes": notes,
        "verification": {"engine": "PEFT", "passed": True, "reloaded": True},
    }


def _convert(
    subject: Subject, model: nn.Module, rank: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor], str, float | None]:
    """Return the LoRA's config and tensors, what made them, and the share of the squared change that they keep.

    PEFT (0.21) converts variants of LoRA too, without what they add: of DoRA it leaves out the magnitude. And PiSSA's A
    and B stand for no change of the base as it is stored.
    """
    changes = _changes(subject, model)
    if subject.method != "LORA" and model.supports_lora_conversion():
        tensors = _by_peft(model, rank)
        return _config(subject, tensors, rank), tensors | _heads(subject), PEFTS, _kept(changes, tensors)
    tensors = _by_svd(changes, rank)
    if not tensors:
        raise RecipeError(f"{subject.folder} changes no weight of its base, so there is no LoRA to make.")
    return _config(subject, tensors, rank), tensors | _heads(subject), OURS, _kept(changes, tensors)


def _by_peft(model: nn.Module, rank: int) -> dict[str, torch.Tensor]:
    from peft import convert_to_lora

    try:
        _, tensors = convert_to_lora(model, rank)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"--rank {rank}: PEFT can't convert it: {' '.join(str(error).split())}") from error
    return {name: tensor for name, tensor in tensors.items() if ".lora_" in name}


def _by_svd(changes: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """A and B of each changed layer from the truncated SVD of its change [out, in]."""
    import torch

    tensors: dict[str, torch.Tensor] = {}
    for name, change in changes.items():
        u, s, v = torch.linalg.svd(change.double(), full_matrices=False)
        if rank > len(s):
            raise RecipeError(f"--rank {rank}: {name} has {len(s)} rows or columns, so its rank is at most that.")
        root = s[:rank].sqrt()
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = (root[:, None] * v[:rank]).float().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = (u[:, :rank] * root).float().contiguous()
    return tensors


def _kept(changes: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> float | None:
    """The share of the squared change that B A stands for: 1 - |change - B A|^2 / |change|^2."""
    total = sum(float(change.double().square().sum()) for change in changes.values())
    lost = 0.0
    for name, change in changes.items():
        a, b = (tensors.get(f"{_PREFIX}{name}.lora_{which}.weight") for which in "AB")
        product = b.double() @ a.double() if a is not None and b is not None else 0.0
        lost += float((change.double() - product).square().sum())
    return 1 - lost / total if total else None


def _changes(subject: Subject, model: nn.Module) -> dict[str, torch.Tensor]:
    """What the adapter changes of each linear layer's weight: merged minus base, [out, in].

    Raises RecipeError for a method that can't be merged, and for a change of anything else.
    """
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    result = merged_model(copy.deepcopy(model))
    if result is None:
        raise RecipeError(
            f"{subject.folder} is {subject.method}, which PEFT can't merge, so no LoRA can stand for it. Convertible: "
            f"{CONVERTIBLE}."
        )
    base = dict(subject.opened.load_base(dequantise=True).named_parameters(remove_duplicate=False))
    heads = set(getattr(subject.opened.saved.config, "modules_to_save", None) or ())
    changes = {}
    for name, after in result.named_parameters(remove_duplicate=False):
        before, (owner, _, kind) = base.get(name), name.rpartition(".")
        if heads & set(name.split(".")) or before is None or torch.equal(after, before):
            continue
        layer = result.get_submodule(owner)
        if kind != "weight" or not isinstance(layer, (nn.Linear, Conv1D)) or after.shape != before.shape:
            raise RecipeError(f"{subject.folder} changes {name}, which no LoRA of linear layers can express.")
        change = after.detach() - before.detach()
        changes[owner] = change.T if isinstance(layer, Conv1D) else change
    return changes


def _heads(subject: Subject) -> dict[str, torch.Tensor]:
    """The tensors of a task head that is saved with the adapter; a LoRA of a classifier keeps them."""
    names = set(getattr(subject.opened.saved.config, "modules_to_save", None) or ())
    return {key: tensor for key, tensor in subject.opened.saved.tensors.items() if names & set(key.split("."))}


def _config(subject: Subject, tensors: dict[str, torch.Tensor], rank: int) -> dict[str, Any]:
    """The LoraConfig as a file: scale 1, and as targets the layers that have an A, by their full names."""
    from peft import LoraConfig

    saved = subject.opened.saved.config
    names = sorted({name.removeprefix(_PREFIX).partition(".lora_")[0] for name in tensors})
    heads = sorted(getattr(saved, "modules_to_save", None) or ()) or None
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=names, task_type=saved.task_type, inference_mode=True,
        base_model_name_or_path=saved.base_model_name_or_path, modules_to_save=heads,
        fan_in_fan_out=subject.config.model_type == "gpt2",
        rank_pattern=_other_ranks(tensors, rank), alpha_pattern=_other_ranks(tensors, rank),
    ).to_dict()  # fmt: skip
    config["target_modules"] = sorted(config["target_modules"])
    return {key: getattr(value, "value", value) for key, value in config.items()}


def _other_ranks(tensors: dict[str, torch.Tensor], rank: int) -> dict[str, int]:
    """The ranks of layers that PEFT converted exactly by another rank than the one that was asked for (MiSS)."""
    return {
        name.removeprefix(_PREFIX).partition(".lora_A.")[0]: len(tensor)
        for name, tensor in tensors.items()
        if ".lora_A." in name and len(tensor) != rank
    }


def _write(subject: Subject, folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    from peft_recipes.exporting.tokenizer import save_tokenizer

    text = json.dumps(config, indent=2, ensure_ascii=False, default=sorted)
    (folder / CONFIG).write_text(f"{text}\n", encoding="utf-8")
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    if subject.opened.generates and subject.opened.has_own_tokenizer:
        save_tokenizer(subject, folder)
    if subject.opened.saved.is_run:  # `evaluate`, `merge` and `predict` read the task from it
        shutil.copy(subject.folder / RECIPE_FILE, folder / RECIPE_FILE)


def _load(subject: Subject, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(subject.opened.load_base(dequantise=True), folder).eval()
