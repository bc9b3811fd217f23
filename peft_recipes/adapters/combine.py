"""Combine LoRAs of one base into one with PEFT's weighted combinations, and evaluate it on each one's test set."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peft_recipes.adapters.adapter_set import AdapterSet
from peft_recipes.adapters.merge import (
    atomic_folder,
    check_new_folder,
    check_reloaded,
    public_name,
    real_inputs,
)
from peft_recipes.adapters.open import OpenedAdapter, evaluate, open_adapters
from peft_recipes.adapters.saved import RECIPE_FILE
from peft_recipes.errors import RecipeError, unknown
from peft_recipes.recipe.mixture import NAMES_APART
from peft_recipes.runs.files import write_json
from peft_recipes.training.verify import compute_logits

EVIDENCE = "combine.json"
_NAME = "default"  # PEFT saves an adapter of this name into the folder itself, any other into a subfolder

# PEFT's combination types. "cat" is exact, and the ranks add up; "svd" cuts the exact sum to the largest rank. "linear"
# is quick and approximate. The others first drop weights: ties and magnitude_prune small ones, dare random ones; ties
# then takes the sign of the majority. Without _svd they work on A and B separately, not on their product.
METHODS = ("cat", "svd", "linear", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
           "magnitude_prune", "magnitude_prune_svd")  # fmt: skip
_EQUAL_RANKS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_WITHOUT_DENSITY = ("linear", "cat", "svd")


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
    """Combine saved LoRAs of one base into one plain PEFT folder; evaluate it on each one's test set before saving.

    weights: one per adapter (default: equal, summing to 1). method: one of `METHODS`. density: the share of weights
    that ties, dare and magnitude_prune keep (default 0.5). rank: of svd's result (default: the largest). seed: of dare.
    Returns the content of combine.json: for each test set the metrics of the base, of its own adapter and of the
    combination. Raises RecipeError for a user's mistake, before anything is loaded if possible, and VerificationError
    if the saved combination gives other outputs when it is loaded.
    """
    output = Path(output)
    if len(folders) < 2:
        raise RecipeError("Combining takes two adapters or more.")
    weights = _check_options(folders, weights, method, density, rank)
    check_new_folder(output)
    adapters = open_adapters(folders, base, trust_remote_code=trust_remote_code)
    _check_configs(adapters, method)
    adapter_set = AdapterSet.of(adapters)
    test_sets = _evaluate_each(adapter_set)
    if density is None and method not in _WITHOUT_DENSITY:
        density = 0.5
    try:
        model = _combine(adapter_set, weights, method, density, rank, seed)
    except (ValueError, TypeError, RuntimeError) as error:
        raise RecipeError(f"PEFT can't combine them by {method}: {' '.join(str(error).split())}") from error
    metrics: dict[str | None, Any] = {}  # by fingerprint: equal test sets are evaluated once
    for name, test_set in test_sets.items():
        fingerprint = test_set.get("fingerprint")
        if fingerprint and fingerprint not in metrics:
            metrics[fingerprint] = evaluate(adapters[name], model).metrics
        test_set["combined"] = metrics.get(fingerprint)
    evidence = {
        "schema": 1,
        "base": public_name(adapter_set.base),
        "method": method,
        "density": density,
        "rank": model.peft_config[_NAME].r,
        "seed": seed if method.startswith("dare") else None,
        "weights": dict(zip(adapters, weights, strict=True)),
        "test_sets": test_sets,
    }
    _save(adapter_set, model, evidence, output)
    return evidence


def _check_options(
    folders: Sequence[str | Path], weights: Sequence[float] | None, method: str, density: float | None, rank: int | None
) -> list[float]:
    if method not in METHODS:
        raise RecipeError(unknown("method", method, METHODS))
    weights = [1 / len(folders)] * len(folders) if weights is None else list(weights)
    if len(weights) != len(folders):
        raise RecipeError(f"--weights: {len(weights)} weights for {len(folders)} adapters; give one an adapter.")
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise RecipeError(f"--weights {','.join(f'{w:g}' for w in weights)}: expected numbers, not all of them 0.")
    if density is not None and (method in _WITHOUT_DENSITY or not 0 < density <= 1):
        raise RecipeError(f"--density {density:g}: a share above 0 up to 1, for ties, dare and magnitude_prune alone.")
    if rank is not None and (not method.endswith("svd") or rank < 1):
        raise RecipeError(f"--rank {rank}: 1 or more, for svd and the methods that end with it alone.")
    return weights


def _check_configs(adapters: dict[str, OpenedAdapter], method: str) -> None:
    """Raise RecipeError for adapters that PEFT would combine wrongly, or refuse only after loading them."""
    for adapter in adapters.values():
        config, peft_method = adapter.saved.config, adapter.saved.method
        if peft_method != "LORA" or config.use_dora:
            peft_method = "DoRA" if peft_method == "LORA" else peft_method
            raise RecipeError(f"{adapter.folder} is {peft_method}; LoRAs alone can be combined.")
        if config.modules_to_save:  # PEFT refuses two heads, and replaces a single one by a copy of the base's
            raise RecipeError(
                f"{adapter.folder} has a head of its own ({', '.join(config.modules_to_save)}), and PEFT's "
                "combinations leave heads out."
            )
        if config.trainable_token_indices:
            raise RecipeError(
                f"{adapter.folder} has trained tokens of its own (trainable_token_indices), and PEFT's combinations "
                "leave them out. Use it by itself."
            )
    configs = {name: adapter.saved.config for name, adapter in adapters.items()}
    ranks = {name: max([config.r, *config.rank_pattern.values()]) for name, config in configs.items()}
    if method in _EQUAL_RANKS and len(set(ranks.values())) > 1:
        listed = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
        more = f", {method}_svd" if method != "linear" else ""
        raise RecipeError(f"--method {method} takes adapters of one rank; these have {listed}. Use cat, svd{more}.")


def _evaluate_each(adapter_set: AdapterSet) -> dict[str, dict[str, Any]]:
    """Evaluate each adapter and the base on the adapter's test set; the base once on equal test sets."""
    test_sets: dict[str, dict[str, Any]] = {}
    base_metrics: dict[str, Any] = {}
    for name, adapter in adapter_set.adapters.items():
        if not adapter.saved.is_run:
            note = "no run of peft-recipes: it does not say what it was tested on"
            test_sets[name] = {"note": note, "metric": None}
            continue
        fingerprint = adapter.prepared.fingerprint
        if fingerprint not in base_metrics:
            # The base's head is untrained if adapters have their own; Trainer takes no quantised base by itself.
            skipped = adapter.has_own_head or adapter.quantise
            base_metrics[fingerprint] = None if skipped else evaluate(adapter, adapter_set.use(None)).metrics
        test_sets[name] = {
            "dataset": NAMES_APART.join(public_name(source.path) for source in adapter.recipe.sources),
            "fingerprint": fingerprint,
            "examples": adapter.prepared.rows["test"],
            "metric": adapter.recipe.metric,
            "base": base_metrics[fingerprint],
            "own": evaluate(adapter, adapter_set.use(name)).metrics,
        }
    return test_sets


def _combine(
    adapter_set: AdapterSet, weights: list[float], method: str, density: float | None, rank: int | None, seed: int
) -> Any:
    """Add the combination to the set's model and make it the active adapter.

    PEFT copies its options from the first adapter's, but gives it a scaling of its own. Under rsLoRA that would be
    sqrt(rank) and not 1, and an initialisation like PiSSA's would change the base: both are switched off meanwhile.
    """
    model, names = adapter_set.model, [adapter_set.peft_name(name) for name in adapter_set.names]
    original = model.peft_config[names[0]]
    plain = copy.copy(original)
    plain.use_rslora, plain.init_lora_weights = False, True
    model.peft_config[names[0]] = plain
    torch.manual_seed(seed)
    options = {"density": density} if density is not None else {}
    options |= {"svd_rank": rank} if rank is not None else {}
    adapter_set.use(adapter_set.names[0])
    try:
        model.add_weighted_adapter(names, weights, _NAME, combination_type=method, **options)
    finally:
        model.peft_config[names[0]] = original
    model.set_adapter(_NAME, inference_mode=True)
    return model.eval()


def _save(adapter_set: AdapterSet, model: Any, evidence: dict[str, Any], output: Path) -> None:
    """Write the folder, once the saved combination gives the same outputs on a fresh base."""
    from peft import PeftModel

    first = next(iter(adapter_set.adapters.values()))
    hardware = first.hardware()
    inputs, _, _ = real_inputs(first, model.get_base_model(), 4)
    expected = compute_logits(model, inputs, hardware)
    model.peft_config[_NAME].base_model_name_or_path = first.saved.config.base_model_name_or_path
    with atomic_folder(output) as folder:
        model.save_pretrained(folder, selected_adapters=[_NAME], save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        reloaded = PeftModel.from_pretrained(first.load_base(), folder).eval()
        check_reloaded(reloaded, inputs, expected, hardware)
        if first.saved.is_run:  # `merge` and `predict` read the task from it
            shutil.copy(first.folder / RECIPE_FILE, folder / RECIPE_FILE)
        write_json(folder / EVIDENCE, evidence)
