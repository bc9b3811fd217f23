"""An adapter merged into its base: held against the two apart on real inputs, then a plain transformers folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.adapters.open import Served, evaluate, open_adapter, short_names
from peft_recipes.arms.merge import merged
from peft_recipes.errors import RecipeError
from peft_recipes.recipe.options import TASKS
from peft_recipes.runs.files import check_output, write_json
from peft_recipes.runs.outputs import OUTPUTS, stored_outputs

if TYPE_CHECKING:
    import torch
    import torch.nn as nn

TOLERANCE = 1e-3  # of the outputs' size; fp32 leaves 1e-6, a merge that lost something tenths
EVIDENCE = "merge.json"
_INPUTS = 20


class Refused(RuntimeError):
    """A merge or a combination that does not answer as it must; nothing was written."""


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    base: str | None = None,
    *,
    tolerance: float = TOLERANCE,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Merges a saved adapter into its base, and writes a folder that transformers loads by itself, tokenizer included.

    tolerance: how far the merged model's logits may lie from those of base and adapter apart, as a share of their size.
    A base that the adapter learnt on quantised is dequantised first; how far that moves the logits is told apart.
    Returns what merge.json holds: the largest differences on a run's own test inputs (elsewhere on the inputs stored
    with the adapter, or simple ones), and the metrics of the test split before and after. Raises RecipeError for a
    mistake in what was given, Refused where the merged model answers otherwise; then nothing is left behind.
    """
    if not 0 < tolerance < float("inf"):
        raise RecipeError(f"--tolerance {tolerance}: expected a number above 0.")
    output = Path(output)
    check_free(output)
    served = open_adapter(adapter, base, trust_remote_code=trust_remote_code)
    from peft_recipes.training.verify import compute_logits

    inputs, source, notes = _inputs(served)
    base_model, hardware = served.load_base(), served.hardware()
    inputs = inputs or simple_inputs(served, base_model)
    model = served.on(base_model)
    before, metrics_before = compute_logits(model, inputs, hardware), _metrics(served, model, source)
    dequantised = None
    if served.quantise:  # merging goes into the weights that the quantised ones stand for
        model = served.on(served.load_base(whole=True))
        quantised, before = before, compute_logits(model, inputs, hardware)
        dequantised = {"from": served.quantise, **largest_difference(quantised, before)}
    whole = _merged(model, served)
    after, metrics_after = compute_logits(whole, inputs, hardware), _metrics(served, whole, source)
    found = {
        "schema": 1,
        "adapter": short_names([served.folder])[0],
        "method": served.saved.config.peft_type.value,
        "base": public_name(served.model),
        "tolerance": tolerance,
        "dequantised": dequantised,
        **largest_difference(before, after),
        "inputs": {"count": len(inputs), "source": source},
        "metric": served.recipe.metric if metrics_before else None,
        "before": metrics_before,
        "after": metrics_after,
        "loaded_by": loaded_by(served),
        "notes": notes,
    }
    if not found["share_of_outputs"] <= tolerance:  # also true for NaN
        raise Refused(
            f"{served.folder}: the merged model's logits differ by {found['largest_logit_difference']:.3g} "
            f"({found['share_of_outputs']:.2g} of their size, more than {tolerance:g}). Nothing was written."
        )
    with written_beside(output) as folder:
        _store(whole, served, folder)
        found["reloaded_share_of_outputs"] = _reloaded(served, folder, inputs, after)
        write_json(folder / EVIDENCE, found)
    return found


def _merged(model: nn.Module, served: Served) -> nn.Module:
    try:
        whole = merged(model)
    except RuntimeError as error:
        raise Refused(f"{served.folder}: {error} Nothing was written.") from error
    if whole is None:
        kind = served.saved.config.peft_type.value
        raise RecipeError(f"{served.folder} is {kind}, which has no merged form: keep it beside its base.")
    return whole.eval()


def check_free(output: Path) -> None:
    """Raises RecipeError where something lies at `output` already, or nothing can be written there."""
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise RecipeError(f"--output {output}: something is there already. Name another folder.")
    check_output(output)


@contextlib.contextmanager
def written_beside(output: Path) -> Iterator[Path]:
    """A folder beside `output` that becomes it at the end; where anything fails it is taken away."""
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        folder = output.absolute().with_name(f".{output.absolute().name}.{os.getpid()}")
        folder.mkdir()
    except OSError as error:
        raise RecipeError(f"--output {output} can't be made: {error.strerror}.") from error
    try:
        yield folder
        os.replace(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _inputs(served: Served) -> tuple[list[dict[str, torch.Tensor]], str, list[str]]:
    """The inputs that before and after are held on, where they come from, and why they are not the run's own."""
    notes = []
    if served.is_run:
        try:
            return served.task.inputs(served.prepared, _INPUTS), "the run's test split", notes
        except RecipeError as error:  # a run from another machine, whose data is not here
            notes.append(f"The run's own data can't be had: {error}")
    if stored := stored_outputs(served.folder):
        return stored[0], "stored with the adapter", notes
    return [], "simple", notes


def simple_inputs(served: Served, base: nn.Module) -> list[dict[str, torch.Tensor]]:
    """A few tokens, for an adapter that comes without any input. Raises RecipeError for images: there are none."""
    from peft_recipes.adapters.check import some_inputs
    from peft_recipes.data.prepared import Prepared

    found = some_inputs(served.task, Prepared({}, {}, ""), base)
    if not found:
        raise RecipeError(f"{served.folder} comes without a run's data and without {OUTPUTS}: there is no "
                          "real image to hold the merged model's answers on.")  # fmt: skip
    return found


def _metrics(served: Served, model: nn.Module, source: str) -> dict[str, float] | None:
    return evaluate(served, model).metrics if source == "the run's test split" else None


def largest_difference(before: list[torch.Tensor], after: list[torch.Tensor]) -> dict[str, float]:
    """Of two models' logits for the same inputs: absolute, and as a share of the outputs' size (at least 1)."""
    gaps = [float((a - b).abs().max()) for a, b in zip(before, after, strict=True)]
    sizes = [max(1.0, float(a.abs().max())) for a in before]
    shares = [gap / size for gap, size in zip(gaps, sizes, strict=True)]
    worst = max(shares, key=lambda share: (share != share, share))  # NaN is the worst
    return {"largest_logit_difference": max(gaps, key=lambda gap: (gap != gap, gap)), "share_of_outputs": worst}


def public_name(model: str) -> str:
    """A base's name for a file that may travel: of a folder of this machine its own name alone."""
    from peft_recipes.models import bases

    return Path(model).expanduser().resolve().name if bases.is_local(model) else model


def loaded_by(served: Served) -> str:
    """The Python that loads the merged folder, of which it names the class alone."""
    from peft_recipes.models import bases

    also = ", peft_recipes.models.small_cnn" if served.recipe.model == bases.SMALL_CNN else ""
    return f"import transformers{also}; transformers.{TASKS[served.recipe.task].auto_class}.from_pretrained"


def _store(whole: nn.Module, served: Served, folder: Path) -> None:
    whole.save_pretrained(folder)
    if served.processor is not None:
        served.processor.save_pretrained(folder)


def _reloaded(served: Served, folder: Path, inputs: list[dict[str, torch.Tensor]], wanted: list[torch.Tensor]) -> float:
    """Loads the folder as any user would, and holds its answers against those of the model that was written."""
    import torch
    import transformers

    from peft_recipes.training.verify import compute_logits

    auto = getattr(transformers, TASKS[served.recipe.task].auto_class)
    again = auto.from_pretrained(folder, dtype=torch.float32).to(served.hardware().device).eval()
    share = largest_difference(wanted, compute_logits(again, inputs, served.hardware()))["share_of_outputs"]
    if not share <= TOLERANCE:
        raise Refused(f"{served.folder}: the merged folder, loaded again, answers otherwise ({share:.2g} of the "
                      "outputs' size). Nothing was written.")  # fmt: skip
    return share
