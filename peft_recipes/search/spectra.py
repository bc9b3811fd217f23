"""What full fine-tuning changed, module by module: how much of it an adapter of some rank could hold.

The change of a weight is the trained one minus the base's (a base that was trained first, too). Its squared singular
values add up to its squared size; the first r of them are what the best adapter of rank r could hold (Eckart & Young
1936). A convolution counts as the matrix [out, in x height x width], as PEFT's LoRA has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import write_json
from peft_recipes.runs.folder import Run, read_run

if TYPE_CHECKING:
    import torch
    import torch.nn as nn

    from peft_recipes.data.prepared import Prepared
    from peft_recipes.tasks.base import Task

FILE = "spectrum.json"
_KEPT_VALUES = 64  # of each module in the file; the shares are of all
ENOUGH = 0.9  # of the squared change: the rank that holds as much is told


@dataclass
class FullRun:
    """A finished run of full fine-tuning: its recipe and data, its base as it began, and the model as it ended.

    new: the names of the weights that the base did not bring (its head).
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
    """The spectrum of a run of full fine-tuning, also written beside it (spectrum.json, spectrum.png).

    Raises RecipeError: no run there, not one of full fine-tuning, not finished, its weights gone.
    """
    from peft_recipes.reporting.spectrum_report import write_spectrum_plot

    full = read_full_run(folder)
    data = {
        "schema": 1,
        "recipe": full.recipe.name,
        "model": full.recipe.model,
        "dataset": full.recipe.dataset.path,
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
    """A run's base and its trained model, loaded. Raises RecipeError where the folder holds no such run."""
    import transformers

    from peft_recipes.hardware.environment import code_version
    from peft_recipes.kernels import activations
    from peft_recipes.runs.folder import resolved_recipe
    from peft_recipes.tasks.registry import task_of
    from peft_recipes.training.save import restore

    folder = Path(folder)
    run = _checked(folder)
    recipe = resolved_recipe(folder / "recipe.yaml")
    task = task_of(recipe)
    prepared = task.prepare()
    notes = []
    if run.data["environment"].get("dataset_fingerprint") != prepared.fingerprint:
        notes.append("The data is not what the run was trained and tested on.")
    if recipe.pretraining is not None and run.data["environment"].get("peft_recipes") != code_version():
        notes.append("The base was trained again, by another version of this code than the run's.")
    transformers.set_seed(run.data["seed"])  # a new head as the run drew it
    base, new = task.load_base(prepared)
    trained = restore(base, new, recipe.arms[run.data["arm"]], recipe, folder)  # another object: the base stays
    activations.fuse(trained)
    return FullRun(run, recipe, task, prepared, base.eval(), trained.eval(), new, notes)


def _checked(folder: Path) -> Run:
    run = read_run(folder)
    if run is None:
        below = sorted(str(path.parent) for path in folder.glob("**/full*/seed-*/run.json"))[:4]
        hint = f" There are runs of full fine-tuning in: {', '.join(below)}." if below else ""
        raise RecipeError(f"{folder} holds no run.json, so it is no run of peft-recipes.{hint}")
    if not run.ok:
        raise RecipeError(f"{folder}: the run did not finish ({run.data['status']}: {run.data.get('error')}).")
    if run.data.get("method") != "full":
        raise RecipeError(
            f"{folder} is a run of '{run.data.get('arm')}' ({run.data.get('method')}). What is looked at here is what "
            "full fine-tuning changed: name a run of a full arm."
        )
    if not list(folder.glob("model*.safetensors")):
        raise RecipeError(f"{folder} has no model.safetensors: its weights were not kept. Train it again.")
    return run


def spectrum_of(base: nn.Module, trained: nn.Module, new: list[str]) -> dict[str, Any]:
    """The change from `base` to `trained`: of each weight, of each kind of module, and of all."""
    before, weights, others = dict(base.named_parameters()), [], {}
    for name, after in trained.named_parameters():
        change = after.detach().double() - before[name].detach().double()
        squared, size = float(change.square().sum()), float(before[name].detach().double().square().sum())
        kind = _kind(trained, name)
        if kind == "other":
            others[name] = (squared, size)
            continue
        weights.append(_weight(name, kind, change, squared, size, name in new))
    total = sum(row["squared_change"] for row in weights) + sum(squared for squared, _ in others.values())
    for row in weights:
        row["share"] = row["squared_change"] / total if total else 0.0
    weights.sort(key=lambda row: -row["share"])
    together = {"targets": _targets(weights, total), "ranks": _ranks(weights, total)}
    for row in weights:
        row["singular_values"] = row["singular_values"][:_KEPT_VALUES]
    return {
        "squared_change": total,
        "modules": weights,
        **together,
        "outside": {
            "squared_change": sum(squared for squared, _ in others.values()),
            "share": sum(squared for squared, _ in others.values()) / total if total else 0.0,
            "parameters": len(others),
        },
    }


def _kind(model: nn.Module, name: str) -> str:
    """ "linear", "convolution", "embedding", or "other": a norm, a bias, what no adapter of a rank is put on."""
    import torch.nn as nn
    from transformers.pytorch_utils import Conv1D

    owner = model.get_submodule(name.rpartition(".")[0])
    if not name.endswith("weight"):
        return "other"
    kinds = {"linear": (nn.Linear, Conv1D), "convolution": (nn.Conv1d, nn.Conv2d, nn.Conv3d), "embedding": nn.Embedding}
    return next((kind for kind, classes in kinds.items() if isinstance(owner, classes)), "other")


def _weight(name: str, kind: str, change: torch.Tensor, squared: float, size: float, new: bool) -> dict[str, Any]:
    values = squared_singular_values(change.flatten(1))
    held = values.cumsum(0) / squared if squared else values
    ranks = powers_of_two(len(values))
    return {
        "module": name.rpartition(".")[0],
        "kind": kind,
        "new": new,  # a head drawn anew: its change is measured from where it was drawn
        "shape": list(change.shape),
        "squared_change": squared,
        "relative_change": (squared / size) ** 0.5 if size else None,
        "singular_values": [float(value) for value in values.clamp(min=0).sqrt()],
        "held": {str(rank): float(held[rank - 1]) if squared else 1.0 for rank in ranks},
        "enough_rank": int((held < ENOUGH - 1e-12).sum()) + 1 if squared else 0,
    }


def squared_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """The squared singular values of a matrix, the largest first, in float64: the eigenvalues of its smaller square."""
    import torch

    wide = matrix.double()
    small = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    return torch.linalg.eigvalsh(small).flip(0).clamp(min=0)


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`, and `most` itself."""
    ranks = [2**power for power in range(most.bit_length()) if 2**power <= most]
    return ranks if ranks[-1] == most else [*ranks, most]


def _targets(weights: list[dict[str, Any]], total: float) -> list[dict[str, Any]]:
    """The modules of one name in all blocks together: what a target of an adapter would hit."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in weights:
        groups.setdefault(_target_name(row["module"]), []).append(row)
    found = []
    for name, rows in groups.items():
        squared = sum(row["squared_change"] for row in rows)
        sizes = [row["squared_change"] / row["relative_change"] ** 2 for row in rows if row["relative_change"]]
        found.append({
            "target": name,
            "kind": rows[0]["kind"],
            "modules": len(rows),
            "new": rows[0]["new"],
            "share": squared / total if total else 0.0,
            "relative_change": (squared / sum(sizes)) ** 0.5 if sizes else None,
            "held": _held_together(rows, squared),
            "enough_rank": _least_rank(rows, squared),
            "parameters_a_rank": sum(row["shape"][0] + _inner(row["shape"]) for row in rows),
        })  # fmt: skip
    return sorted(found, key=lambda row: -row["share"])


def _target_name(module: str) -> str:
    """The end of a module's name that is the same in all blocks: "attn.c_proj" of "transformer.h.3.attn.c_proj"."""
    parts = module.split(".")
    numbered = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbered[-1] + 1 :]) if numbered and numbered[-1] + 1 < len(parts) else parts[-1]


def _inner(shape: list[int]) -> int:
    size = 1
    for side in shape[1:]:
        size *= side
    return size


def _ranks(weights: list[dict[str, Any]], total: float) -> dict[str, Any]:
    """What adapters of one rank on every matrix (embeddings apart) could hold of the whole change."""
    matrices = [row for row in weights if row["kind"] != "embedding"]
    squared = sum(row["squared_change"] for row in matrices)
    held = _held_together(matrices, squared)
    return {
        "share_of_all": squared / total if total else 0.0,
        "held": held,
        "enough_rank": _least_rank(matrices, squared),
    }


def _held_together(rows: list[dict[str, Any]], squared: float) -> dict[str, float]:
    """rank -> the share of these modules' change that adapters of that rank hold together."""
    longest = max((len(row["singular_values"]) for row in rows), default=1)
    return {str(rank): _share_at(rows, squared, rank) for rank in powers_of_two(longest)}


def _share_at(rows: list[dict[str, Any]], squared: float, rank: int) -> float:
    kept = sum(sum(value**2 for value in row["singular_values"][:rank]) for row in rows)
    return min(kept / squared, 1.0) if squared else 1.0


def _least_rank(rows: list[dict[str, Any]], squared: float) -> int:
    """The smallest rank that holds ENOUGH of these modules' change."""
    longest = max((len(row["singular_values"]) for row in rows), default=0)
    return _first(lambda rank: _share_at(rows, squared, rank) >= ENOUGH - 1e-12, longest) if squared else 0


def _first(true_from: Callable[[int], bool], most: int) -> int:
    """The smallest number from 1 at which a condition holds that holds for all larger ones too."""
    low, high = 1, max(most, 1)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if true_from(middle) else (middle + 1, high)
    return low
