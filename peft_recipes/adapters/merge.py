"""Merge an adapter into its base, compare outputs before and after, and write a plain transformers folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_recipes.adapters.check import sample_inputs
from peft_recipes.adapters.open import OpenedAdapter, evaluate, open_adapter, short_names
from peft_recipes.arms.merge import merged
from peft_recipes.data.prepared import Prepared
from peft_recipes.errors import RecipeError, unknown
from peft_recipes.hardware.device import Hardware
from peft_recipes.models import bases
from peft_recipes.recipe.options import TASKS
from peft_recipes.runs.files import check_output, write_json
from peft_recipes.runs.outputs import OUTPUTS, stored_outputs
from peft_recipes.scoring.generation import end_token_ids
from peft_recipes.training.verify import compute_logits

TOLERANCE = 1e-3  # of the outputs' size; a correct merge in fp32 differs by 1e-6, a wrong one by 0.1 or more
EVIDENCE = "merge.json"
DTYPES = ("float32", "bfloat16", "float16")
_INPUTS = 20
TEST_SPLIT = "the run's test split"


class VerificationError(RuntimeError):
    """A merged or combined model does not give the outputs that it must; nothing was written."""


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    base: str | None = None,
    *,
    tolerance: float = TOLERANCE,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Merge a saved adapter into its base and write a folder that transformers loads by itself, tokenizer included.

    The merge is computed and verified in float32. dtype: what the weights are stored in ("float32", "bfloat16",
    "float16"); None: as the base's are. tolerance: how far the merged model's logits may be from those of base and
    adapter, as a share of their size. A base that is quantised is dequantised first; how far that, and the rounding to
    `dtype`, move the logits is reported separately.
    Returns the content of merge.json: the largest differences on a run's own test inputs (else on the inputs stored
    with the adapter, else on token ids), and the metrics of the test split before and after. Raises RecipeError for a
    user's mistake, VerificationError if the merged model's outputs differ; then nothing is written.
    """
    import transformers

    if not 0 < tolerance < float("inf"):
        raise RecipeError(f"--tolerance {tolerance}: expected a number above 0.")
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(unknown("dtype", dtype, DTYPES, "--dtype"))
    output = Path(output)
    check_new_folder(output)
    opened = open_adapter(adapter, base, trust_remote_code=trust_remote_code)
    dtype = dtype or bases.stored_dtype(opened.recipe)
    base_model, hardware = opened.load_base(), opened.hardware()
    inputs, source, notes = real_inputs(opened, base_model, _INPUTS)
    if source == TEST_SPLIT:
        opened.task.use_base(base_model, opened.prepared, opened.quantise)

    def measure(model: nn.Module) -> tuple[list[torch.Tensor], dict[str, float] | None]:
        logits = compute_logits(model, inputs, hardware)
        return logits, evaluate(opened, model).metrics if source == TEST_SPLIT else None

    model = opened.attach(base_model)
    before, metrics_before = measure(model)
    dequantised = None
    if opened.quantise:  # an adapter is merged into the dequantised weights
        model = opened.attach(opened.load_base(dequantise=True))
        quantised, before = before, compute_logits(model, inputs, hardware)
        dequantised = {"from": opened.quantise, **largest_difference(quantised, before)}
    model = _merge(model, opened)
    exact = compute_logits(model, inputs, hardware)
    rounded = _round(model, dtype, opened)
    after, metrics_after = measure(model)
    auto_class = getattr(transformers, TASKS[opened.recipe.task].auto_class)
    small_cnn = ", peft_recipes.models.small_cnn" if opened.base_name == bases.SMALL_CNN else ""
    evidence = {
        "schema": 1,
        "adapter": short_names([opened.folder])[0],
        "method": opened.saved.method,
        "base": public_name(opened.base_name),
        "tolerance": tolerance,
        "dequantised": dequantised,
        **largest_difference(before, exact),
        "dtype": dtype,
        "rounded": largest_difference(exact, after) if rounded else None,
        "inputs": {"count": len(inputs), "source": source},
        "metric": opened.recipe.metric if metrics_before else None,
        "before": metrics_before,
        "after": metrics_after,
        "loaded_by": f"import transformers{small_cnn}; transformers.{auto_class.__name__}.from_pretrained",
        "notes": notes,
    }
    if not evidence["share_of_outputs"] <= tolerance:  # also true for NaN
        raise VerificationError(
            f"{opened.folder}: the merged model's logits differ by {evidence['largest_logit_difference']:.3g} "
            f"({evidence['share_of_outputs']:.2g} of their size, more than {tolerance:g}). Nothing was written."
        )
    with atomic_folder(output) as folder:
        _cast(model, getattr(torch, dtype))
        _end_as_the_adapter(model, opened)
        model.save_pretrained(folder)
        if opened.processor is not None:
            opened.processor.save_pretrained(folder)
        evidence["bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        reloaded = auto_class.from_pretrained(folder, dtype=torch.float32).to(hardware.device)
        evidence["reloaded_share_of_outputs"] = check_reloaded(reloaded, inputs, after, hardware)
        write_json(folder / EVIDENCE, evidence)
    return evidence


def _merge(model: nn.Module, adapter: OpenedAdapter) -> nn.Module:
    try:
        merged_model = merged(model)
    except RuntimeError as error:
        raise VerificationError(f"{adapter.folder}: {error} Nothing was written.") from error
    if merged_model is None:
        raise RecipeError(f"{adapter.folder} is {adapter.saved.method}, which can't be merged: keep it with its base.")
    return merged_model.eval()


def _round(model: nn.Module, dtype: str, adapter: OpenedAdapter) -> bool:
    """Round the weights in memory to what `dtype` holds; return whether it is less than float32.

    Raises VerificationError for a weight that float16 can't hold.
    """
    if dtype == "float32":
        return False
    _cast(model, getattr(torch, dtype))
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise VerificationError(f"{adapter.folder}: {dtype} can't hold all weights of the merged model: --dtype "
                                "bfloat16 or float32. Nothing was written.")  # fmt: skip
    _cast(model, torch.float32)
    return True


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters in place, so that shared ones stay shared, and name the dtype in the config."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _end_as_the_adapter(model: nn.Module, adapter: OpenedAdapter) -> None:
    """Let the merged model's answers end at the end token of the tokenizer that the adapter brings, as well."""
    config = getattr(model, "generation_config", None)
    own = adapter.processor.eos_token_id if adapter.generates and adapter.has_own_tokenizer else None
    if config is None or own is None:
        return
    ends = end_token_ids(model)
    if own not in ends:
        config.eos_token_id = sorted(ends | {own}) if ends else own


def check_new_folder(output: Path) -> None:
    """Raise RecipeError if there is something at `output` already, or nothing can be written there."""
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise RecipeError(f"--output {output}: something is there already. Name another folder.")
    check_output(output)


@contextlib.contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `output` that is renamed to it at the end, or removed if anything fails."""
    path = output.absolute()
    folder = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise RecipeError(f"--output {output} can't be made: {error.strerror}.") from error
    try:
        yield folder
        os.replace(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def real_inputs(
    adapter: OpenedAdapter, base: nn.Module, count: int
) -> tuple[list[dict[str, torch.Tensor]], str, list[str]]:
    """Return inputs to compare outputs on, their source, and notes: the run's test examples if its data is available,
    else the inputs stored with the adapter, else token ids. Raises RecipeError for an image model without any.
    """
    notes = []
    if adapter.saved.is_run:
        try:
            return adapter.task.inputs(adapter.prepared, count), TEST_SPLIT, notes
        except RecipeError as error:  # a run from another machine, whose data is not here
            notes.append(f"The run's own data is not available: {error}")
    if stored := stored_outputs(adapter.folder):
        return stored[0], "stored with the adapter", notes
    inputs = sample_inputs(adapter.task, Prepared({}, {}, ""), base)
    if not inputs:
        raise RecipeError(f"{adapter.folder} comes without a run's data and without {OUTPUTS}: there is no "
                          "real image to compare outputs on.")  # fmt: skip
    return inputs, "simple", notes


def largest_difference(before: list[torch.Tensor], after: list[torch.Tensor]) -> dict[str, float]:
    """Return the largest difference of two models' logits: absolute, and as a share of their size (at least 1)."""
    gaps = [float((a - b).abs().max()) for a, b in zip(before, after, strict=True)]
    shares = [gap / max(1.0, float(a.abs().max())) for gap, a in zip(gaps, before, strict=True)]

    def largest(values: list[float]) -> float:
        return max(values, key=lambda value: (value != value, value))  # NaN counts as the largest

    return {"largest_logit_difference": largest(gaps), "share_of_outputs": largest(shares)}


def public_name(model: str) -> str:
    """Return a base's name for a file that may leave this machine: of a local path its last part only."""
    return Path(model).expanduser().resolve().name if bases.is_local(model) else model


def check_reloaded(
    model: nn.Module, inputs: list[dict[str, torch.Tensor]], expected: list[torch.Tensor], hardware: Hardware
) -> float:
    """Compare the logits of a model that was saved and loaded with those before, and return the largest difference as
    a share of their size. Raises VerificationError if it is above `TOLERANCE`.
    """
    share = largest_difference(expected, compute_logits(model, inputs, hardware))["share_of_outputs"]
    if not share <= TOLERANCE:  # also true for NaN
        raise VerificationError(f"What was saved gives other outputs when it is loaded ({share:.2g} of their size). "
                                "Nothing was written.")  # fmt: skip
    return share
