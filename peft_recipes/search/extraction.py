"""A LoRA adapter out of a full fine-tune: the change of each target, cut to a rank by its singular values.

W_trained - W_base = U S V; B = U sqrt(S) and A = sqrt(S) V of the first r of them make the nearest change of rank r
(Eckart & Young 1936). What is no target (embeddings, norms, biases) is lost; how much that is, is said. A new head is
stored whole.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError, unknown
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import check_output, clear, make_folder, write_json
from peft_recipes.runs.folder import Run, read_run
from peft_recipes.runs.lock import locked
from peft_recipes.runs.outputs import store_outputs
from peft_recipes.search.spectra import FullRun, read_full_run
from peft_recipes.training.verify import compute_logits

if TYPE_CHECKING:
    import torch
    import torch.nn as nn
    from peft import LoraConfig

FILE = "extraction.json"
_MERGED_SAME = 1e-4  # relative: what B @ A may differ from the change that it was cut from


@dataclass
class Lost:
    """Shares of the whole squared change: what the adapter holds, what its rank cut off, what is no target of it."""

    held: float
    cut_off: float
    head: float
    outside: float
    outside_by_kind: dict[str, float]


def extract(
    folder: str | Path, rank: int, output: str | Path, *, targets: str | Iterable[str] = "all", overwrite: bool = False
) -> dict[str, Any]:
    """Writes the adapter of that rank to `output`, tests it beside the full run, and returns extraction.json.

    targets: "all" (every linear and convolutional layer), "attention", "mlp", or names as PEFT matches them. The LoRA
    runs of the same rank and seed that lie beside the full run are held against it too. Raises RecipeError: no full run
    there, a rank below 1, a target that hits nothing, an output that is in use.
    """
    from peft_recipes.hardware.device import choose
    from peft_recipes.hardware.environment import environment
    from peft_recipes.training import save

    output = Path(output)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise RecipeError(f"rank: expected a whole number of 1 or more, got {rank!r}.")
    check_output(output)
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise RecipeError(f"{output} is not empty. Replace what is there with --overwrite, or name another folder.")
    full = read_full_run(folder)
    arm = Arm(_config(full, rank, targets), learning_rate=full.run.data["learning_rate"])
    model, lost, parameters = _cut(full, arm)
    make_folder(output)
    with locked(output):
        if overwrite:
            clear(output, keep=(".lock", ".lock-holder"))
        files = save.save(model, arm, full.recipe, output, full.prepared.processor)
        inputs = full.task.inputs(full.prepared, 2)
        hardware = choose(full.recipe.training, full.recipe.threads)
        outputs = compute_logits(model, inputs, hardware)
        last = [logits[:, -1] if logits.dim() == 3 else logits for logits in outputs]
        store_outputs(output, inputs, last)
        _comes_back(full, arm, output, inputs, outputs, hardware)
        evaluations = _tested(full, model, hardware)
        from peft_recipes.runs.predictions import write_predictions

        write_predictions(output, evaluations)
        data = {
            "schema": 1,
            "recipe": full.recipe.name,
            "model": full.recipe.model,
            "dataset": full.recipe.dataset.path,
            "embedded": full.recipe.uses_stand_ins,
            "metric": full.recipe.metric,
            "higher_is_better": full.recipe.higher_is_better,
            "seed": full.run.data["seed"],
            "rank": rank,
            "target_modules": sorted(arm.peft.target_modules),
            "change": vars(lost),
            "parameters": parameters,
            "checkpoint_bytes": sum(files.values()),
            "metrics": {split: found.metrics for split, found in evaluations.items()},
            "rows": full.prepared.rows,
            **_beside(full, rank, output),
            "notes": full.notes,
            "environment": environment(hardware),
        }
        write_json(output / FILE, data)
    return json.loads((output / FILE).read_text(encoding="utf-8"))


def _config(full: FullRun, rank: int, targets: str | Iterable[str]) -> LoraConfig:
    """A plain LoRA of that rank whose scale is 1: the change is in its matrices alone."""
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


def _cut(full: FullRun, arm: Arm) -> tuple[nn.Module, Lost, dict[str, int]]:
    """The base with the adapter on it, what it holds of the change, and its counts."""
    import torch

    from peft_recipes.arms.apply import apply_arm

    change = _changes(full)
    trained = dict(full.trained.named_parameters())
    model, counted = apply_arm(copy.deepcopy(full.base), arm, full.recipe.task, full.new, "extract")
    held, targeted, head = 0.0, set(), set()
    with torch.no_grad():
        for name, layer in _lora_layers(model):
            weight = f"{name}.weight"
            held += _fill(layer, trained[weight].detach(), dict(full.base.named_parameters())[weight].detach())
            targeted.add(weight)
        for name, parameter in model.named_parameters():
            if ".modules_to_save.default." in name:  # a new head: whole
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


def _changes(full: FullRun) -> dict[str, float]:
    """The squared change of every weight, by name."""
    before = dict(full.base.named_parameters())
    return {
        name: float((after.detach().double() - before[name].detach().double()).square().sum())
        for name, after in full.trained.named_parameters()
    }


def _by_kind(model: nn.Module, changed: dict[str, float]) -> dict[str, float]:
    """Embeddings, biases, norms and other weights, each kind's sum; kinds that did not change are left out."""
    import torch.nn as nn

    found: dict[str, float] = {}
    for name, value in changed.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        kind = "biases" if name.endswith("bias") else "norms" if "norm" in type(owner).__name__.lower() else "weights"
        kind = "embeddings" if isinstance(owner, nn.Embedding) else kind
        found[kind] = found.get(kind, 0.0) + value
    return {kind: value for kind, value in found.items() if value}


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that PEFT put LoRA on, each with its name in the base."""
    from peft.tuners.lora import LoraLayer

    found = [(name.removeprefix("base_model.model."), module) for name, module in model.named_modules()
             if isinstance(module, LoraLayer)]  # fmt: skip
    for name, layer in found:
        if "default" not in layer.lora_A:
            raise RecipeError(f"{name} is a {type(layer).__name__}: what changed in an embedding is not extracted.")
    return found


def _fill(layer: Any, after: torch.Tensor, before: torch.Tensor) -> float:
    """Sets a layer's A and B to the best of their rank, and returns the squared change that they hold.

    A Conv1D keeps its weight as [in, out]; a convolution's [out, in, ...] counts as [out, in x ...], as PEFT has it.
    Raises RecipeError for a layer that PEFT computes in another way.
    """
    import torch

    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    change = (after.double() - before.double()).flatten(1)
    if getattr(layer, "fan_in_fan_out", False):
        change = change.T
    if getattr(layer.get_base_layer(), "groups", 1) != 1:
        raise RecipeError(f"{type(layer.get_base_layer()).__name__} in groups: PEFT's LoRA has no form of its change.")
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    rank = min(layer.r["default"], len(s))
    root = s[:rank].sqrt()
    left, right = torch.zeros(up.flatten(1).shape).double(), torch.zeros(down.flatten(1).shape).double()
    left[:, :rank], right[:rank] = u[:, :rank] * root, root[:, None] * v[:rank]
    up.copy_(left.reshape(up.shape))
    down.copy_(right.reshape(down.shape))
    made = layer.get_delta_weight("default").double().flatten(1)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    best = best.T if getattr(layer, "fan_in_fan_out", False) else best
    if float((made - best).norm()) > _MERGED_SAME * max(float(best.norm()), 1e-12):
        raise RecipeError(f"{type(layer).__name__}: PEFT computes its change in another way than B @ A.")
    return float(s[:rank].square().sum())


def _comes_back(full: FullRun, arm: Arm, folder: Path, inputs: Any, outputs: Any, hardware: Any) -> None:
    """Loads what was saved onto the base again. Raises RuntimeError where it answers otherwise."""
    from peft_recipes.guards import checks
    from peft_recipes.training import save

    again = save.restore(copy.deepcopy(full.base), full.new, arm, full.recipe, folder).eval()
    for mine, theirs in zip(compute_logits(again, inputs, hardware), outputs, strict=True):
        checks.same_outputs(mine, theirs, "The adapter loaded again differs from the one that was saved")


def _tested(full: FullRun, model: nn.Module, hardware: Any) -> dict[str, Any]:
    """The evaluations of the adapter, by the recipe's own trainer."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="extract-") as folder:
        arguments = full.task.arguments(None, full.run.data["seed"], hardware, Path(folder), True)
        trainer = full.task.trainer(model, full.prepared, arguments, [])
        splits = ["validation", "test", *(name for name in full.recipe.evaluate_also if name in full.prepared.ids)]
        return {split: full.task.evaluate(trainer, full.prepared, split) for split in splits}


def _beside(full: FullRun, rank: int, output: Path) -> dict[str, Any]:
    """The full run, and every LoRA of the same rank and seed that was trained beside it, against the extracted one."""
    from peft_recipes.statistics.bootstrap import margin_for

    recipe, value = full.recipe, full.run.metrics["test"][full.recipe.metric]
    margin = recipe.margin or margin_for(recipe.metric, value)
    mine = Run(output, {"metrics": {}})
    rows = [{"arm": full.run.data["arm"], "value": value, "parameters": full.run.data["parameters"]["trainable"],
             "extracted_minus_it": _difference(recipe, mine, full.run, margin)}]  # fmt: skip
    for run in _trained_beside(full, rank):
        rows.append({
            "arm": run.data["arm"],
            "value": run.metrics["test"][recipe.metric],
            "parameters": run.data["parameters"]["trainable"],
            "targets": run.data["target_modules"],
            "extracted_minus_it": _difference(recipe, mine, run, margin),
        })  # fmt: skip
    return {"margin": margin, "beside": rows}


def _trained_beside(full: FullRun, rank: int) -> list[Run]:
    root, seed = full.run.folder.parent.parent, full.run.folder.name
    found = []
    for path in sorted(root.glob(f"*/{seed}/run.json")):
        run = read_run(path.parent)
        same = run is not None and run.ok and run.data.get("method") == "LORA" and run.data.get("rank") == rank
        if same and run.data["environment"]["dataset_fingerprint"] == full.prepared.fingerprint:
            found.append(run)
    return found


def _difference(recipe: Recipe, ours: Run, theirs: Run, margin: float) -> dict[str, Any] | None:
    """Extracted minus the other, paired by test example; None where they were tested on other examples."""
    import numpy as np

    from peft_recipes.statistics.bootstrap import paired_difference, verdict
    from peft_recipes.statistics.results import scores

    mine, other = scores(ours, recipe), scores(theirs, recipe)
    if not np.array_equal(mine[0], other[0]):
        return None
    found = paired_difference(mine[1][None], other[1][None], weights=mine[2])
    return {**found.to_dict(), "verdict": verdict(found, margin, recipe.higher_is_better)}
