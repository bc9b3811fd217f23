"""Extract a LoRA adapter from a full fine-tune: a truncated SVD of the change of each target module.

W_trained - W_base = U S V; B = U sqrt(S) and A = sqrt(S) V, cut to the first r singular values, give the best
approximation of rank r (Eckart & Young 1936). The changes of other weights (embeddings, norms, biases) are lost;
extraction.json says how much that is. A new task head is saved completely.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError, unknown
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import check_output, clear, make_folder, write_json
from peft_recipes.runs.folder import Run, read_run
from peft_recipes.runs.lock import LOCK_FILES, locked
from peft_recipes.runs.outputs import store_outputs
from peft_recipes.search.spectra import FullRun, read_full_run
from peft_recipes.training.verify import compute_logits

if TYPE_CHECKING:
    import torch
    import torch.nn as nn
    from peft import LoraConfig

FILE = "extraction.json"
_MERGED_SAME = 1e-4  # relative tolerance between PEFT's delta weight and the truncated SVD


@dataclass
class Lost:
    """Shares of the total squared change: in the adapter, cut off by its rank, in the head, in untargeted weights."""

    held: float
    cut_off: float
    head: float
    outside: float
    outside_by_kind: dict[str, float]


def extract(
    folder: str | Path, rank: int, output: str | Path, *, targets: str | Iterable[str] = "all", overwrite: bool = False
) -> dict[str, Any]:
    """Extract an adapter of the given rank from a full run, evaluate it, and return extraction.json.

    The adapter is saved to `output` and compared with the full run and with the trained LoRA runs of the same rank and
    seed in the same comparison folder. targets: "all" (every linear and convolutional layer), "attention", "mlp", or
    module names as PEFT matches them. Raises RecipeError if the folder holds no full run, the rank is below 1, a target
    matches no module, or the output folder is in use.
    """
    from peft_recipes.hardware.device import choose
    from peft_recipes.hardware.environment import environment
    from peft_recipes.runs.predictions import write_predictions
    from peft_recipes.training import save

    output = Path(output)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise RecipeError(f"rank: expected a whole number of 1 or more, got {rank!r}.")
    check_output(output)
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise RecipeError(f"{output} is not empty. Replace what is there with --overwrite, or name another folder.")
    full = read_full_run(folder)
    arm = Arm(_config(full, rank, targets), learning_rate=full.run.data["learning_rate"])
    model, lost, parameters = _extract_change(full, arm)
    make_folder(output)
    with locked(output), _nothing_half_written(output):
        if overwrite:
            clear(output, keep=LOCK_FILES)
        files = save.save(model, arm, full.recipe, output, full.prepared.processor)
        inputs = full.task.inputs(full.prepared, 2)
        hardware = choose(full.recipe.training, full.recipe.threads)
        outputs = compute_logits(model, inputs, hardware)
        last = [logits[:, -1] if logits.dim() == 3 else logits for logits in outputs]
        store_outputs(output, inputs, last)
        _check_reload(full, arm, output, inputs, outputs, hardware)
        evaluations = _evaluate(full, model, hardware)
        write_predictions(output, evaluations)
        data = {
            "schema": 1,
            "recipe": full.recipe.name,
            "model": full.recipe.model,
            "dataset": full.recipe.data_name,
            "embedded": full.recipe.uses_stand_ins,
            "metric": full.recipe.metric,
            "higher_is_better": full.recipe.higher_is_better,
            "seed": full.run.data["seed"],
            "rank": rank,
            "target_modules": sorted(arm.peft.target_modules),
            "change": vars(lost),
            "parameters": parameters,
            "checkpoint_bytes": sum(files.values()),
            "metrics": {split: evaluation.metrics for split, evaluation in evaluations.items()},
            "rows": full.prepared.rows,
            **_compare_with_trained(full, rank, output),
            "notes": full.notes,
            "environment": environment(hardware),
        }
        write_json(output / FILE, data)
    return json.loads((output / FILE).read_text(encoding="utf-8"))


@contextlib.contextmanager
def _nothing_half_written(output: Path) -> Iterator[None]:
    """Clear the folder where writing it fails, as it does on a full disk."""
    try:
        yield
    except BaseException:
        clear(output, keep=LOCK_FILES)
        raise


def _config(full: FullRun, rank: int, targets: str | Iterable[str]) -> LoraConfig:
    """A plain LoRA config with scale 1."""
    from peft import LoraConfig

    from peft_recipes.models.architecture_table import GROUPS
    from peft_recipes.models.architectures import architecture_of

    row = architecture_of(full.base.config)
    if isinstance(targets, str) and targets == "all":
        names: Any = row.group("all-linear")
        if not isinstance(names, str):
            names = [*names, *row.group("convolutions")]
    elif isinstance(targets, str) and targets in GROUPS:
        names = row.group(targets)
        if not names:
            raise RecipeError(f"'{row.model_type}' has no {targets} layers to target.")
    elif isinstance(targets, str):
        raise RecipeError(unknown("targets", targets, ["all", *GROUPS]) + " Or a list of names.")
    else:
        names = list(targets)
    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=names)


def _extract_change(full: FullRun, arm: Arm) -> tuple[nn.Module, Lost, dict[str, int]]:
    """The base with the extracted adapter, the shares of the change, and the parameter counts."""
    import torch

    from peft_recipes.arms.apply import apply_arm

    base, trained = dict(full.base.named_parameters()), dict(full.trained.named_parameters())
    change = {
        name: float((after.detach().double() - base[name].detach().double()).square().sum())
        for name, after in trained.items()
    }
    model, counted = apply_arm(copy.deepcopy(full.base), arm, full.recipe.task, full.new, "extract")
    held, targeted, head = 0.0, set(), set()
    with torch.no_grad():
        for name, layer in _lora_layers(model):
            weight = f"{name}.weight"
            held += _set_lora_weights(layer, trained[weight].detach(), base[weight].detach())
            targeted.add(weight)
        for name, parameter in model.named_parameters():
            if ".modules_to_save.default." in name:  # a new head
                plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
                parameter.copy_(trained[plain])
                head.add(plain)
    total = sum(change.values()) or 1.0
    inside = sum(change[name] for name in targeted)
    outside = {name: value for name, value in change.items() if name not in targeted | head}
    lost = Lost(
        held=held / total,
        cut_off=max(inside - held, 0.0) / total,
        head=sum(change[name] for name in head) / total,
        outside=sum(outside.values()) / total,
        outside_by_kind={kind: value / total for kind, value in _by_kind(full.trained, outside).items()},
    )
    return model.eval(), lost, {"trainable": counted.trainable, "total": counted.total}


def _by_kind(model: nn.Module, changes: dict[str, float]) -> dict[str, float]:
    """Sum squared changes over embeddings, biases, norms and other weights; kinds without change are omitted."""
    import torch.nn as nn

    sums: dict[str, float] = {}
    for name, value in changes.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        kind = "biases" if name.endswith("bias") else "norms" if "norm" in type(owner).__name__.lower() else "weights"
        kind = "embeddings" if isinstance(owner, nn.Embedding) else kind
        sums[kind] = sums.get(kind, 0.0) + value
    return {kind: value for kind, value in sums.items() if value}


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The model's LoRA layers with their names in the base. Raises RecipeError for an embedding."""
    from peft.tuners.lora import LoraLayer

    layers = []
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            name = name.removeprefix("base_model.model.")
            if "default" not in layer.lora_A:
                raise RecipeError(f"{name} is a {type(layer).__name__}: the change of an embedding is not extracted.")
            layers.append((name, layer))
    return layers


def _set_lora_weights(layer: Any, after: torch.Tensor, before: torch.Tensor) -> float:
    """Set A and B to the truncated SVD of after - before, and return the squared change that they represent.

    A Conv1D's weight is [in, out]; a convolution's [out, in, ...] counts as [out, in x ...], as in PEFT. Raises
    RecipeError for a layer whose delta weight PEFT does not compute as B @ A.
    """
    import torch

    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    change = (after.double() - before.double()).flatten(1)
    if getattr(layer, "fan_in_fan_out", False):
        change = change.T
    if getattr(layer.get_base_layer(), "groups", 1) != 1:
        raise RecipeError(f"{type(layer.get_base_layer()).__name__} with groups: PEFT's LoRA can't represent it.")
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    rank = min(layer.r["default"], len(s))
    root = s[:rank].sqrt()
    left, right = torch.zeros(up.flatten(1).shape).double(), torch.zeros(down.flatten(1).shape).double()
    left[:, :rank], right[:rank] = u[:, :rank] * root, root[:, None] * v[:rank]
    up.copy_(left.reshape(up.shape))
    down.copy_(right.reshape(down.shape))
    delta = layer.get_delta_weight("default").double().flatten(1)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    best = best.T if getattr(layer, "fan_in_fan_out", False) else best
    if float((delta - best).norm()) > _MERGED_SAME * max(float(best.norm()), 1e-12):
        raise RecipeError(f"{type(layer).__name__}: PEFT does not compute its delta weight as B @ A.")
    return float(s[:rank].square().sum())


def _check_reload(full: FullRun, arm: Arm, folder: Path, inputs: Any, outputs: Any, hardware: Any) -> None:
    """Load the saved adapter onto the base. Raises RuntimeError if its outputs differ from `outputs`."""
    from peft_recipes.guards import checks
    from peft_recipes.training import save

    reloaded = save.restore(copy.deepcopy(full.base), full.new, arm, full.recipe, folder).eval()
    for actual, expected in zip(compute_logits(reloaded, inputs, hardware), outputs, strict=True):
        checks.same_outputs(actual, expected, "The reloaded adapter differs from the saved one")


def _evaluate(full: FullRun, model: nn.Module, hardware: Any) -> dict[str, Any]:
    """Evaluate the adapter on each split with the recipe's own trainer."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="extract-") as folder:
        arguments = full.task.arguments(None, full.run.data["seed"], hardware, Path(folder), True)
        trainer = full.task.trainer(model, full.prepared, arguments, [])
        splits = ["validation", "test", *(name for name in full.recipe.evaluate_also if name in full.prepared.ids)]
        return {split: full.task.evaluate(trainer, full.prepared, split) for split in splits}


def _compare_with_trained(full: FullRun, rank: int, output: Path) -> dict[str, Any]:
    """Compare the extracted adapter with the full run and with the LoRA runs of the same rank, seed and data."""
    from peft_recipes.recipe.metrics import margin_for

    recipe, value = full.recipe, full.run.metrics["test"][full.recipe.metric]
    margin, extracted = recipe.margin or margin_for(recipe.metric, value), Run(output, {"metrics": {}})
    rows = []
    for run in (full.run, *_lora_runs(full, rank)):
        row = {
            "arm": run.data["arm"],
            "value": run.metrics["test"][recipe.metric],
            "parameters": run.data["parameters"]["trainable"],
            "extracted_minus_it": _difference(recipe, extracted, run, margin),
        }
        rows.append(row if run is full.run else {**row, "targets": run.data["target_modules"]})
    return {"margin": margin, "beside": rows}


def _lora_runs(full: FullRun, rank: int) -> list[Run]:
    comparison_folder, seed = full.run.folder.parent.parent, full.run.folder.name
    runs = []
    for path in sorted(comparison_folder.glob(f"*/{seed}/run.json")):
        run = read_run(path.parent)
        same = run is not None and run.ok and run.data.get("method") == "LORA" and run.data.get("rank") == rank
        if same and run.data["environment"]["dataset_fingerprint"] == full.prepared.fingerprint:
            runs.append(run)
    return runs


def _difference(recipe: Recipe, extracted: Run, trained: Run, margin: float) -> dict[str, Any] | None:
    """Extracted minus trained, paired by test example; None if the test examples differ or are too few."""
    import numpy as np

    from peft_recipes.statistics.bootstrap import paired_difference, verdict
    from peft_recipes.statistics.scores import scores

    ids, values, weights = scores(extracted, recipe)
    trained_ids, trained_values, _ = scores(trained, recipe)
    if len(ids) < 2 or not np.array_equal(ids, trained_ids):
        return None
    difference = paired_difference(values[None], trained_values[None], weights=weights)
    return {**difference.to_dict(), "verdict": verdict(difference, margin, recipe.higher_is_better)}
