"""Adapters of one base combined into one by PEFT's weighted combinations, and tried on each one's own test set."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.adapters.adapter_set import AdapterSet
from peft_recipes.adapters.merge import (
    Refused,
    check_free,
    largest_difference,
    public_name,
    simple_inputs,
    written_beside,
)
from peft_recipes.adapters.open import Served, evaluate, open_adapters
from peft_recipes.errors import RecipeError, unknown
from peft_recipes.runs.files import write_json

if TYPE_CHECKING:
    import torch.nn as nn

EVIDENCE = "combine.json"
_NAME = "default"  # PEFT writes an adapter of this name into the folder itself, any other into a folder below

# PEFT's combinations of LoRAs. Those of A and B apart need equal ranks; "density" is the part of the weights they keep.
METHODS = {
    "linear": "weights on A and B apart: quick and rough; equal ranks",
    "cat": "exact: the ranks add up",
    "svd": "the exact sum, cut to the largest rank",
    "ties": "small weights dropped, then the sign of the majority; equal ranks",
    "ties_svd": "the same on the products",
    "dare_linear": "weights dropped at random, the rest scaled up; equal ranks",
    "dare_linear_svd": "the same on the products",
    "dare_ties": "weights dropped at random, then the sign of the majority; equal ranks",
    "dare_ties_svd": "the same on the products",
    "magnitude_prune": "small weights dropped; equal ranks",
    "magnitude_prune_svd": "the same on the products",
}
_EQUAL_RANKS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_RANDOM = ("dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd")


def combine_adapters(
    folders: Sequence[str | Path],
    output: str | Path,
    weights: Sequence[float] | None = None,
    method: str = "svd",
    *,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Combines saved LoRAs of one base into one plain PEFT folder, evaluated on each one's test set before it is saved.

    weights: one an adapter (default: equal, adding up to 1). method: of `METHODS`. density: what ties, dare and
    magnitude_prune keep (default 0.5). rank: of what svd leaves (default: the largest). seed: of dare. Returns what
    combine.json holds: for each test set the metrics of the base, of the adapter that it belongs to and of the
    combination. Raises RecipeError, before anything is loaded where it can be.
    """
    output = Path(output)
    if len(folders) < 2:
        raise RecipeError("Combining takes two adapters or more.")
    weights = _checked(folders, weights, method, density, rank)
    check_free(output)
    opened = open_adapters(folders, base, trust_remote_code=trust_remote_code)
    _check_kinds(opened, method)
    kept = AdapterSet.of(opened)
    evidence = _each_alone(kept)
    density = density if density is not None or method in ("linear", "cat", "svd") else 0.5
    try:
        combined = _combined(kept, weights, method, density, rank, seed)
    except (ValueError, TypeError, RuntimeError) as error:
        raise RecipeError(f"PEFT can't combine them by {method}: {' '.join(str(error).split())}") from error
    measured: dict[str, Any] = {}
    for name, found in evidence.items():
        if (place := found.get("fingerprint")) not in measured:
            measured[place] = _metrics(opened[name], combined)
        found["combined"] = measured[place]
    made = {
        "schema": 1,
        "base": public_name(kept.base),
        "method": method,
        "density": density,
        "rank": combined.peft_config[_NAME].r,
        "seed": seed if method in _RANDOM else None,
        "weights": dict(zip(opened, weights, strict=True)),
        "test_sets": evidence,
    }
    _store(kept, combined, made, output)
    return made


def _checked(
    folders: Sequence[str | Path], weights: Sequence[float] | None, method: str, density: float | None, rank: int | None
) -> list[float]:
    import math

    if method not in METHODS:
        raise RecipeError(unknown("method", method, METHODS))
    weights = [1 / len(folders)] * len(folders) if weights is None else list(weights)
    if len(weights) != len(folders):
        raise RecipeError(f"--weights: {len(weights)} weights for {len(folders)} adapters; give one an adapter.")
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise RecipeError(f"--weights {','.join(f'{w:g}' for w in weights)}: expected numbers, not all of them 0.")
    if density is not None and (method in ("linear", "cat", "svd") or not 0 < density <= 1):
        raise RecipeError(f"--density {density:g}: a share above 0 up to 1, for ties, dare and magnitude_prune alone.")
    if rank is not None and (not method.endswith("svd") or rank < 1):
        raise RecipeError(f"--rank {rank}: 1 or more, for svd and the methods that end with it alone.")
    return weights


def _check_kinds(opened: dict[str, Served], method: str) -> None:
    """What PEFT would combine into something else than asked, or refuse only after all is loaded."""
    configs = {name: served.saved.config for name, served in opened.items()}
    for name, config in configs.items():
        if config.peft_type.value != "LORA" or config.use_dora:
            what = "DoRA" if config.peft_type.value == "LORA" else config.peft_type.value
            raise RecipeError(f"{opened[name].folder} is {what}; LoRAs alone can be combined.")
        if config.modules_to_save:  # PEFT refuses two heads, and of one it would make a fresh copy of the base's
            raise RecipeError(
                f"{opened[name].folder} brings a head of its own ({', '.join(config.modules_to_save)}), and PEFT's "
                "combinations leave heads out."
            )
    ranks = {name: max([config.r, *config.rank_pattern.values()]) for name, config in configs.items()}
    if method in _EQUAL_RANKS and len(set(ranks.values())) > 1:
        said = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
        more = f", {method}_svd" if method != "linear" else ""
        raise RecipeError(f"--method {method} takes adapters of one rank; these have {said}. Use cat, svd{more}.")


def _metrics(served: Served, model: nn.Module) -> dict[str, float] | None:
    return evaluate(served, model).metrics if served.is_run else None


def _each_alone(kept: AdapterSet) -> dict[str, dict[str, Any]]:
    """Each one's test set: what the base (once, where sets are alike) and the adapter itself reach on it."""
    made: dict[str, dict[str, Any]] = {}
    bases: dict[str, Any] = {}
    for name, served in kept.served.items():
        if not served.is_run:
            note = "no run of peft-recipes: it does not say what it was tested on"
            made[name] = {"note": note, "metric": None}
            continue
        place = served.prepared.fingerprint
        if place not in bases:
            # A head that is new has learnt nothing, and Trainer takes no quantised model without an adapter.
            silent = served.brings_head or served.quantise
            bases[place] = None if silent else _metrics(served, kept.use(None))
        made[name] = {
            "dataset": public_name(served.recipe.dataset.path),
            "fingerprint": place,
            "examples": served.prepared.rows["test"],
            "metric": served.recipe.metric,
            "base": bases[place],
            "own": _metrics(served, kept.use(name)),
        }
    return made


def _combined(
    kept: AdapterSet, weights: list[float], method: str, density: float | None, rank: int | None, seed: int
) -> Any:
    """The set's model with the combination in it, active.

    The new adapter takes its options from the first one's, with a scaling of its own: under rsLoRA that would be
    sqrt(rank) and not 1, and an initialisation like PiSSA's would change the base.
    """
    import torch

    model, inner = kept.model, [kept.peft_name(name) for name in kept.names]
    first = copy.copy(model.peft_config[inner[0]])
    first.use_rslora, first.init_lora_weights = False, True
    before, model.peft_config[inner[0]] = model.peft_config[inner[0]], first
    torch.manual_seed(seed)
    options = {"density": density} if density is not None else {}
    options |= {"svd_rank": rank} if rank is not None else {}
    kept.use(kept.names[0])
    try:
        model.add_weighted_adapter(inner, weights, _NAME, combination_type=method, **options)
    finally:
        model.peft_config[inner[0]] = before
    model.set_adapter(_NAME, inference_mode=True)
    return model.eval()


def _store(kept: AdapterSet, combined: Any, made: dict[str, Any], output: Path) -> None:
    """The folder, once its copy on a fresh base has answered the same."""
    from peft import PeftModel

    from peft_recipes.training.verify import compute_logits

    first = next(iter(kept.served.values()))
    inputs = first.task.inputs(first.prepared, 4) if first.is_run else simple_inputs(first, combined.get_base_model())
    wanted = compute_logits(combined, inputs, first.hardware())
    combined.peft_config[_NAME].base_model_name_or_path = first.saved.config.base_model_name_or_path
    with written_beside(output) as folder:
        combined.save_pretrained(folder, selected_adapters=[_NAME], save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card
        again = PeftModel.from_pretrained(first.load_base(), folder).eval()
        share = largest_difference(wanted, compute_logits(again, inputs, first.hardware()))["share_of_outputs"]
        if not share <= 1e-3:
            raise Refused(f"The combination, loaded again, answers otherwise ({share:.2g} of the outputs' size).")
        if first.is_run:  # what the base is, and what `merge` and `predict` need to know of the task
            shutil.copy(first.folder / "recipe.yaml", folder / "recipe.yaml")
        write_json(folder / EVIDENCE, made)
