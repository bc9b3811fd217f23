"""What a run stores: the adapter alone, the head alone, or the full model; and that it comes back the same."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peft_recipes import adapters, checks
from peft_recipes.arms import apply_arm
from peft_recipes.errors import RecipeError
from peft_recipes.measuring import file_sizes, median_milliseconds
from peft_recipes.models.quantisation import TOLERANCE, dequantised
from peft_recipes.models.virtual_tokens import read_last_token
from peft_recipes.recipe import Arm, Recipe
from peft_recipes.runs import OWN_FILES

if TYPE_CHECKING:
    import torch.nn as nn

    from peft_recipes.guards import Guards
    from peft_recipes.hardware import Hardware
    from peft_recipes.tasks.base import Prepared, Task

_TIMED_INPUTS = 20
_COMPARED_INPUTS = 2  # of trained, reloaded and merged; stored for `check`, wherever the adapter goes
_COMPARED_TOKENS = 64  # of each: enough to tell models apart, and little enough for the guard to stay cheap


def save(model: nn.Module, arm: Arm, recipe: Recipe, folder: Path, processor: Any) -> dict[str, int]:
    """Writes the checkpoint of an arm, and returns its files' sizes: what must be stored to restore it on the base."""
    if arm.peft is not None:
        model.peft_config["default"].base_model_name_or_path = recipe.model
        # "auto" would ask the Hub whether the vocabulary grew; it never does here.
        model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the run writes its own
        sizes = file_sizes(folder, ["adapter_model.safetensors", "adapter_config.json"])
        return sizes
    if arm.method in OWN_FILES:
        from safetensors.torch import save_file

        trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, folder / OWN_FILES[arm.method])
        return file_sizes(folder, [OWN_FILES[arm.method]])
    model.save_pretrained(folder)
    sizes = file_sizes(folder)
    if processor is not None:
        processor.save_pretrained(folder)  # a folder that loads by itself; not counted, the base has the same
    return {name: size for name, size in sizes.items() if name.startswith(("model", "config", "generation_config"))}


def restore(base: nn.Module, new_weights: list[str], arm: Arm, recipe: Recipe, folder: Path) -> nn.Module:
    """A fresh base with a saved arm on it. Raises RecipeError where a tensor is missing, stray or of another shape."""
    if arm.peft is not None:
        from peft import PeftModel
        from peft.utils import load_peft_weights

        model = PeftModel.from_pretrained(base, folder)
        read_last_token(model)
        _complete(model, load_peft_weights(str(folder), device="cpu"), folder)
        return model
    if arm.method in OWN_FILES:
        from safetensors.torch import load_file

        path = folder / OWN_FILES[arm.method]
        saved = load_file(path)
        outcome = base.load_state_dict(saved, strict=False)
        if outcome.unexpected_keys:
            raise RecipeError(f"{path}: {outcome.unexpected_keys[0]} is no weight of this base.")
        wanted, _ = apply_arm(base, arm, recipe.task, new_weights)
        if missing := [name for name, p in wanted.named_parameters() if p.requires_grad and name not in saved]:
            raise RecipeError(f"{path}: {missing[0]} is missing.")
        return base
    return base.from_pretrained(folder, dtype=torch.float32)


def _complete(model: nn.Module, saved: dict[str, torch.Tensor], folder: Path) -> None:
    """PEFT only warns when keys are missing, and the base's output comes back (peft#2566); here it is an error."""
    from peft import get_peft_model_state_dict

    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    missing, stray = sorted(set(wanted) - set(saved)), sorted(set(saved) - set(wanted))
    wrong = [name for name in set(wanted) & set(saved) if wanted[name].shape != saved[name].shape]
    if missing or stray or wrong:
        first = (missing or stray or wrong)[0]
        raise RecipeError(
            f"{folder}: the adapter does not fit its base: {len(missing)} tensors missing, {len(stray)} not of this "
            f"model, {len(wrong)} of another shape; the first is {first}."
        )


def verify(
    task: Task, prepared: Prepared, arm: Arm, trained: nn.Module, folder: Path, hardware: Hardware, guard: Guards
) -> dict[str, Any]:
    """Loads what was saved onto a fresh base and holds its outputs against the trained model's; times each form.

    Returns latency_ms and generation_tokens_per_second, each of base, adapter and merged, None where a form does not
    exist. guard: keeps the largest differences, as shares of the outputs' size. Raises RuntimeError where saved and
    trained differ.
    """
    inputs = task.inputs(prepared, _TIMED_INPUTS)
    compared = [
        {name: tensor[:, :_COMPARED_TOKENS] if tensor.dim() == 2 else tensor for name, tensor in batch.items()}
        for batch in inputs[:_COMPARED_INPUTS]
    ]
    before = outputs(trained, compared, hardware)
    if arm.peft is not None:
        last = [logits[:, -1] if logits.dim() == 3 else logits for logits in before]
        adapters.store_outputs(folder, compared, last)
    base, new_weights = task.load_base(prepared, arm.quantise)
    base = base.to(hardware.device).eval()
    times: dict[str, float | None] = {"base": None, "adapter": None, "merged": None}
    speeds: dict[str, float | None] = dict(times)

    def measure(form: str, model: nn.Module) -> None:
        model.eval()
        times[form] = median_milliseconds(
            lambda batch: outputs(model, [batch], hardware, exact=False), inputs, hardware.device
        )
        speeds[form] = task.generation_speed(model, prepared)

    if arm.peft is None:
        base = restore(base, new_weights, arm, task.recipe, folder).to(hardware.device).eval()
        guard("reload", _same, before, base, compared, hardware, "The reloaded model")
        measure("base", base)
    else:
        measure("base", base)
        model = restore(base, new_weights, arm, task.recipe, folder).to(hardware.device).eval()
        tolerance = TOLERANCE[arm.quantise]
        guard("reload", _same, before, model, compared, hardware, "The reloaded adapter", tolerance)
        measure("adapter", model)
        if arm.quantise:
            before, model = _on_full_weights(task, prepared, arm, folder, before, compared, hardware, guard)
        merged = adapters.merged(model)
        if merged is None:
            guard.results["merge"] = f"{arm.method_name} can't be merged"
        else:
            guard("merge", _same, before, merged, compared, hardware, "The merged model")
            measure("merged", merged)
    generates = any(speed is not None for speed in speeds.values())
    return {"latency_ms": times, "generation_tokens_per_second": speeds if generates else None}


def _on_full_weights(
    task: Task,
    prepared: Prepared,
    arm: Arm,
    folder: Path,
    quantised: list[torch.Tensor],
    inputs: list[dict[str, torch.Tensor]],
    hardware: Hardware,
    guard: Guards,
) -> tuple[list[torch.Tensor], nn.Module]:
    """A quantised arm on the weights that its base stands for, which is what it can be merged into, and its outputs.

    How far they are from the quantised model's is kept, as a share of their size: int8 rounds its inputs as well.
    """
    base, new_weights = task.load_base(prepared, arm.quantise)
    base = dequantised(base).to(hardware.device).eval()
    model = restore(base, new_weights, arm, task.recipe, folder).to(hardware.device).eval()
    found = outputs(model, inputs, hardware)
    guard.results["dequantised"] = max(checks.gap(a, b) for a, b in zip(quantised, found, strict=True))
    return found, model


def _same(
    first: list[torch.Tensor],
    model: nn.Module,
    inputs: list[dict[str, torch.Tensor]],
    hardware: Hardware,
    what: str,
    tolerance: float = 1e-3,
) -> float:
    second = outputs(model, inputs, hardware)
    said = f"{what} differs from the trained one"
    return max(checks.same_outputs(a, b, said, tolerance) for a, b in zip(first, second, strict=True))


def outputs(
    model: nn.Module, inputs: list[dict[str, torch.Tensor]], hardware: Hardware, *, exact: bool = True
) -> list[torch.Tensor]:
    """The logits of each input, on the CPU in fp32, the model in evaluation mode.

    exact: computed in fp32, as the weights are, whatever training computed in: rounding to bf16 would hide differences
    and make some (merged against unmerged) where there are none.
    """
    model.eval()
    with torch.no_grad(), contextlib.nullcontext() if exact else hardware.autocast():
        return [model(**{k: v.to(hardware.device) for k, v in batch.items()}).logits.float().cpu() for batch in inputs]


def meta_checkpoint_bytes(model: nn.Module, arm: Arm) -> int:
    """Bytes of the tensors that an arm's checkpoint will hold (file headers apart), from a model on the meta device."""
    if arm.peft is not None and arm.peft.is_prompt_learning:
        return 4 * _prompt_numbers(model)
    if arm.peft is not None:
        from peft import get_peft_model_state_dict

        tensors = get_peft_model_state_dict(model, save_embedding_layers=False).values()
    elif arm.method in OWN_FILES:
        tensors = [p for p in model.parameters() if p.requires_grad]
    else:
        tensors = list(model.parameters())
    return sum(t.numel() * 4 for t in tensors)  # fp32


def _prompt_numbers(model: nn.Module) -> int:
    """What is stored of learnt prompts: what their encoder gives, which PEFT can't compute without weights, and a head.

    A prefix has keys and values for each layer, the others one vector a token.
    """
    config = model.peft_config["default"]
    each = 2 * config.num_layers if config.peft_type.value == "PREFIX_TUNING" else config.num_transformer_submodules
    head = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "prompt_encoder." not in n)
    return config.num_virtual_tokens * each * config.token_dim + head


def with_arm_on_meta(task: Task, config: Any, arm: Arm, name: str) -> tuple[nn.Module, Any]:
    """The base on the meta device with an arm applied, and its counts: what a plan and a preflight need, no weights."""

    def applied() -> tuple[nn.Module, Any]:
        model = task.meta_model(copy.deepcopy(config))
        return apply_arm(model, arm, task.recipe.task, task.new_weights_on_meta(model), name)

    try:
        with torch.device("meta"):  # PEFT would make the adapter's own weights for real
            return applied()
    except (RuntimeError, RecipeError):  # a method that reads its weights while it is put on (BOFT)
        return applied()
