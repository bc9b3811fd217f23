"""Spectrum of a full fine-tune: how much of each weight's change an adapter of a given rank could represent.

The change of a weight is its trained value minus the base's (after pretraining, if the recipe has one). Its squared
singular values sum to its squared Frobenius norm; the first r of them are what the best adapter of rank r represents
(Eckart & Young 1936). A convolution counts as a matrix [out, in x height x width], as in PEFT's LoRA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError
from peft_recipes.recipe.metrics import PREFERENCE
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import write_json
from peft_recipes.runs.folder import Run, read_run

if TYPE_CHECKING:
    import torch
    import torch.nn as nn

    from peft_recipes.data.prepared import Prepared
    from peft_recipes.tasks.base import Task

FILE = "spectrum.json"
_KEPT_VALUES = 64  # singular values of each module in spectrum.json; shares are computed from all
ENOUGH = 0.9  # share of the squared change that defines `enough_rank`


@dataclass
class FullRun:
    """A finished full fine-tuning run, loaded: its recipe and data, its base model and its trained model.

    new: names of the weights that the base's checkpoint lacks (the task head).
    """

    run: Run
    recipe: Recipe
    task: Task
    prepared: Prepared
    base: nn.Module
    trained: nn.Module
    new: list[str]
    notes: list[str]


def spectrum(folder: str | Path) -> dict[str, Any]:
    """Compute the spectrum of a full fine-tuning run; write spectrum.json and spectrum.png to its folder.

    Raises RecipeError if the folder holds no finished run of full fine-tuning with its weights.
    """
    from peft_recipes.reporting.spectrum_report import write_spectrum_plot

    full = read_full_run(folder)
    data = {
        "schema": 1,
        "recipe": full.recipe.name,
        "model": full.recipe.model,
        "dataset": full.recipe.data_name,
        "embedded": full.recipe.uses_stand_ins,
        "seed": full.run.data["seed"],
        "learning_rate": full.run.data["learning_rate"],
        **spectrum_of(full.base, full.trained, full.new),
        "notes": full.notes,
        "environment": full.run.data["environment"],
    }
    write_json(full.run.folder / FILE, data)
    write_spectrum_plot(data, full.run.folder)
    return data


def read_full_run(folder: str | Path) -> FullRun:
    """Load a run's base model and trained model. Raises RecipeError if the folder holds no such run."""
    import transformers

    from peft_recipes.hardware.environment import code_version
    from peft_recipes.kernels import activations
    from peft_recipes.runs.folder import resolved_recipe
    from peft_recipes.tasks.registry import task_of
    from peft_recipes.training.save import restore

    folder = Path(folder)
    run = _read_run(folder)
    recipe = resolved_recipe(folder / "recipe.yaml")
    notes = []
    if recipe.metric == PREFERENCE:
        recipe = recipe.with_changes({"metric": "loss", "judge": None})
        notes.append("Compared by the loss: a win rate needs the answers of two runs and a judge.")
    task = task_of(recipe)
    prepared = task.prepare()
    if run.data["environment"].get("dataset_fingerprint") != prepared.fingerprint:
        notes.append("The data differs from the data that the run was trained and tested on.")
    if recipe.pretraining is not None and run.data["environment"].get("peft_recipes") != code_version():
        notes.append("The base was pretrained again, by another version of this code than the run's.")
    transformers.set_seed(run.data["seed"])  # the same initial head as in the run
    base, new = task.load_base(prepared)
    task.use_base(base, prepared)
    trained = restore(base, new, recipe.arms[run.data["arm"]], recipe, folder)  # returns another model
    activations.fuse(trained)
    return FullRun(run, recipe, task, prepared, base.eval(), trained.eval(), new, notes)


def _read_run(folder: Path) -> Run:
    run = read_run(folder)
    if run is None:
        below = sorted(str(path.parent) for path in folder.glob("**/full*/seed-*/run.json"))[:4]
        hint = f" There are runs of full fine-tuning in: {', '.join(below)}." if below else ""
        raise RecipeError(f"{folder} holds no run.json, so it is no run of peft-recipes.{hint}")
    if not run.ok:
        raise RecipeError(f"{folder}: the run did not finish ({run.data['status']}: {run.data.get('error')}).")
    if run.data.get("method") != "full":
        raise RecipeError(
            f"{folder} is a run of '{run.data.get('arm')}' ({run.data.get('method')}). The spectrum is that of full "
            "fine-tuning: name a run of a full arm."
        )
    if not list(folder.glob("model*.safetensors")):
        raise RecipeError(f"{folder} has no model.safetensors: its weights were not kept. Train it again.")
    return run


def spectrum_of(base: nn.Module, trained: nn.Module, new: list[str]) -> dict[str, Any]:
    """Spectrum of the change from `base` to `trained`: of each weight, of each target name, and of all together."""
    before, weights, others = dict(base.named_parameters()), [], []
    for name, after in trained.named_parameters():
        change = after.detach().double() - before[name].detach().double()
        squared, size = float(change.square().sum()), float(before[name].detach().double().square().sum())
        kind = _kind(trained, name)
        if kind == "other":
            others.append(squared)
            continue
        weights.append(_weight(name, kind, change, squared, size, name in new))
    total = sum(row["squared_change"] for row in weights) + sum(others)
    for row in weights:
        row["share"] = row["squared_change"] / total if total else 0.0
    weights.sort(key=lambda row: -row["share"])
    groups = {"targets": _targets(weights, total), "ranks": _ranks(weights, total)}
    for row in weights:
        row["singular_values"] = row["singular_values"][:_KEPT_VALUES]
    outside = sum(others)
    return {
        "squared_change": total,
        "modules": weights,
        **groups,
        "outside": {
            "squared_change": outside,
            "share": outside / total if total else 0.0,
            "parameters": len(others),
        },
    }


def _kind(model: nn.Module, name: str) -> str:
    """Classify a parameter: "linear", "convolution", "embedding" or "other" (norms and biases)."""
    import torch.nn as nn
    from transformers.pytorch_utils import Conv1D

    owner = model.get_submodule(name.rpartition(".")[0])
    if not name.endswith("weight"):
        return "other"
    kinds = {"linear": (nn.Linear, Conv1D), "convolution": (nn.Conv1d, nn.Conv2d, nn.Conv3d), "embedding": nn.Embedding}
    return next((kind for kind, classes in kinds.items() if isinstance(owner, classes)), "other")


def _weight(name: str, kind: str, change: torch.Tensor, squared: float, size: float, new: bool) -> dict[str, Any]:
    """The entry of one weight in spectrum.json."""
    values = squared_singular_values(change.flatten(1))
    held = values.cumsum(0) / squared if squared else values
    ranks = powers_of_two(len(values))
    return {
        "module": name.rpartition(".")[0],
        "kind": kind,
        "new": new,  # a new head: its change is measured from its random initialisation
        "shape": list(change.shape),
        "squared_change": squared,
        "relative_change": (squared / size) ** 0.5 if size else None,
        "singular_values": [float(value) for value in values.clamp(min=0).sqrt()],
        "held": {str(rank): float(held[rank - 1]) if squared else 1.0 for rank in ranks},
        "enough_rank": int((held < ENOUGH - 1e-12).sum()) + 1 if squared else 0,
    }


def squared_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """Squared singular values in float64, largest first: the eigenvalues of the smaller Gram matrix."""
    import torch

    wide = matrix.double()
    small = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    return torch.linalg.eigvalsh(small).flip(0).clamp(min=0)


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`, and `most` itself."""
    ranks = [2**power for power in range(most.bit_length()) if 2**power <= most]
    return ranks if ranks[-1] == most else [*ranks, most]


def _targets(weights: list[dict[str, Any]], total: float) -> list[dict[str, Any]]:
    """Entries of the modules that share a name across blocks: what one `target_modules` name matches."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in weights:
        groups.setdefault(_target_name(row["module"]), []).append(row)
    targets = []
    for name, rows in groups.items():
        squared = sum(row["squared_change"] for row in rows)
        sizes = [row["squared_change"] / row["relative_change"] ** 2 for row in rows if row["relative_change"]]
        target = {
            "target": name,
            "kind": rows[0]["kind"],
            "modules": len(rows),
            "new": rows[0]["new"],
            "share": squared / total if total else 0.0,
            "relative_change": (squared / sum(sizes)) ** 0.5 if sizes else None,
            **_shares_by_rank(rows, squared),
            "parameters_a_rank": sum(row["shape"][0] + math.prod(row["shape"][1:]) for row in rows),
        }
        targets.append(target)
    return sorted(targets, key=lambda row: -row["share"])


def _target_name(module: str) -> str:
    """The part of a module's name after its block number: "attn.c_proj" of "transformer.h.3.attn.c_proj"."""
    parts = module.split(".")
    numbers = [position for position, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers and numbers[-1] + 1 < len(parts) else parts[-1]


def _ranks(weights: list[dict[str, Any]], total: float) -> dict[str, Any]:
    """How much of the total change adapters of one rank on every matrix (except embeddings) could represent."""
    matrices = [row for row in weights if row["kind"] != "embedding"]
    squared = sum(row["squared_change"] for row in matrices)
    return {"share_of_all": squared / total if total else 0.0, **_shares_by_rank(matrices, squared)}


def _shares_by_rank(rows: list[dict[str, Any]], squared: float) -> dict[str, Any]:
    """The shares of these modules' change that adapters of one rank represent, and the smallest rank with ENOUGH."""
    import numpy as np

    energy = np.zeros(max((len(row["singular_values"]) for row in rows), default=1))
    for row in rows:
        energy[: len(row["singular_values"])] += np.square(row["singular_values"])
    shares = np.minimum(energy.cumsum() / squared, 1.0) if squared else np.ones(len(energy))
    return {
        "held": {str(rank): float(shares[rank - 1]) for rank in powers_of_two(len(shares))},
        "enough_rank": int((shares < ENOUGH - 1e-12).sum()) + 1 if squared else 0,
    }
