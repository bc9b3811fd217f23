"""Check an adapter on disk, trained here or elsewhere: what `peft-recipes check` and `push` run.

The files alone: "adapter-only", "finite", "learning". The base's configuration too: "fits". The base's weights too:
"reload", "merge". Two other packages check earlier: `recipe` validates a recipe as it is read, and `guards` checks a
training run before, during and after training. The comparisons of tensors and names are shared with `guards/checks.py`.
"""

from __future__ import annotations

import copy
import functools
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_recipes.adapters.embeddings import embeddings_of, fit_vocabulary
from peft_recipes.adapters.infer_task import base_config, base_quantisation, class_names, infer_task
from peft_recipes.adapters.saved import CONFIG, SavedAdapter, read_adapter
from peft_recipes.arms.apply import REFUSALS
from peft_recipes.arms.merge import merged
from peft_recipes.data.prepared import Prepared
from peft_recipes.errors import RecipeError
from peft_recipes.guards.checks import folder_is_adapter_only, same_outputs, targets_hit_modules
from peft_recipes.models.meta import meta_model
from peft_recipes.models.quantisation import dequantised
from peft_recipes.runs.folder import read_run
from peft_recipes.runs.outputs import OUTPUTS, stored_outputs, verification_logits
from peft_recipes.tasks.base import Task

_OF_THE_WEIGHTS = ("frozen", "reload", "fresh-process", "adapter-only")


@dataclass(frozen=True)
class Finding:
    """The result of one check: ok is None if the check could not be made, and `message` says why."""

    name: str
    ok: bool | None
    message: str = ""


def check_adapter(
    folder: str | Path,
    base: str | None = None,
    *,
    weights: bool = True,
    merge: bool = True,
    trust_remote_code: bool = False,
) -> list[Finding]:
    """Check a saved adapter: its files, its fit to the base, its outputs, and merging.

    base: check with this base, not the one that the adapter names. weights: False leaves out the checks that load the
    base's weights (outputs and merging); merge: False only merging. Raises RecipeError if there is no readable adapter
    or no such base.
    """
    saved = read_adapter(folder)
    task = infer_task(saved, base, trust_remote_code)
    findings = [_check_files(saved), _check_finite(saved), _check_trained(saved)]
    findings.append(check_fit(saved, task, base_config(saved, task)))
    if weights and all(finding.ok is not False for finding in findings):
        findings += _check_outputs_and_merge(saved, task, merge)
    return findings + _recorded_failures(saved.folder, findings)


def _recorded_failures(folder: Path, findings: list[Finding]) -> list[Finding]:
    """The checks that failed when the adapter was trained, unless the same check passes now.

    Those of the weights count as failures; the others (an answer, a latency) are reported only.
    """
    run = read_run(folder)
    passed = {finding.name for finding in findings if finding.ok}
    passed |= {"fresh-process"} if "reload" in passed else set()
    return [
        Finding(f"run: {name}", False if name in _OF_THE_WEIGHTS else None, f"failed after its training: {words}")
        for name, words in (run.failed_checks if run else {}).items()
        if name not in passed
    ]


def _check_files(saved: SavedAdapter) -> Finding:
    try:
        folder_is_adapter_only(path.name for path in saved.folder.iterdir())
    except RuntimeError as error:
        return Finding("adapter-only", False, str(error))
    return Finding("adapter-only", True, "the base is not in it")


def _check_finite(saved: SavedAdapter) -> Finding:
    bad = [name for name, t in saved.tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if not _has_rank_pattern(saved):  # AdaLoRA may leave a layer with rank 0
        bad += [name for name, t in saved.tensors.items() if t.numel() == 0]
    if bad:
        return Finding("finite", False, f"{len(bad)} tensors are empty or hold NaN or infinity, first {bad[0]}")
    return Finding("finite", True, f"{len(saved.tensors)} tensors")


def _has_rank_pattern(saved: SavedAdapter) -> bool:
    return saved.config.peft_type == "ADALORA" and bool(saved.config.rank_pattern)


def _check_trained(saved: SavedAdapter) -> Finding:
    """LoRA's B is initialised to zeros: if all of them still are, the adapter was not trained."""
    lora_b = [t for name, t in saved.tensors.items() if "lora_B" in name or "lora_embedding_B" in name]
    if not lora_b:
        return Finding("learning", None, "not known for this method")
    trained = sum(bool(t.any()) for t in lora_b)
    if not trained:
        return Finding("learning", False, "every lora_B is zero: the adapter changes nothing")
    return Finding("learning", True, f"{trained} of {len(lora_b)} lora_B are no longer zero")


def check_fit(saved: SavedAdapter, task: Task, config: Any) -> Finding:
    """Check, without weights, that the tensors have the names and shapes that PEFT gives them on this base."""
    from peft import get_peft_model, get_peft_model_state_dict

    bases = f"made for '{saved.config.base_model_name_or_path}', checked on '{task.recipe.model}'"
    init = getattr(saved.config, "init_lora_weights", None)
    if init in ("loftq", "corda"):
        return Finding("fits", False, f"init_lora_weights is '{init}', which PEFT would compute anew from quantised "
                       "weights or training data that are not here. If the adapter is for its base as it is, set it to "
                       f"true in {CONFIG}")  # fmt: skip
    settings = copy.deepcopy(saved.config)
    settings.inference_mode = False
    if isinstance(getattr(settings, "init_lora_weights", None), str):
        settings.init_lora_weights = True  # PiSSA and OLoRA decompose weights, and there are none here
    any_rank = _has_rank_pattern(saved)
    if any_rank:
        settings.rank_pattern = None  # PEFT would cut weights by it, and there are none here
    model = meta_model(task.recipe, config)
    fit_vocabulary(saved, model)
    try:
        targets_hit_modules(model, settings, "adapter")
        adapted = get_peft_model(model, settings)
    except (RecipeError, *REFUSALS) as error:  # whatever PEFT says of such a configuration is why it does not fit
        return Finding("fits", False, f"{bases}: {_one_line(error)}")
    if settings.is_prompt_learning:  # its encoder's output is stored, which needs weights to compute
        present = "prompt_embeddings" in saved.tensors
        return Finding("fits", present, "" if present else f"{bases}: there are no prompt_embeddings")
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    missing = sorted(set(expected) - set(saved.tensors))
    # PEFT stores the base's embeddings as well where they are targets, or have another size.
    copies = get_peft_model_state_dict(adapted, save_embedding_layers=True) if embeddings_of(model) else {}
    expected |= {name: tensor for name, tensor in copies.items() if name in saved.tensors}
    unexpected = sorted(set(saved.tensors) - set(expected))
    both = [] if any_rank else sorted(set(expected) & set(saved.tensors))
    mismatched = [name for name in both if expected[name].shape != saved.tensors[name].shape]
    if missing or unexpected or mismatched:
        return Finding("fits", False,
                       f"{bases}: {len(missing)} tensors missing, {len(unexpected)} not of this model, "
                       f"{len(mismatched)} of another shape; the first is {[*missing, *unexpected, *mismatched][0]}",
                       )  # fmt: skip
    return Finding("fits", True, "; ".join(filter(None, (f"{len(expected)} tensors, on {task.recipe.model}",
                                                         saved.unknown_note))))  # fmt: skip


def _one_line(error: Exception) -> str:
    """The first problem, and how many more there are."""
    if not isinstance(error, RecipeError):
        return textwrap.shorten(str(error), 300, placeholder=" ...")
    first, *more = error.problems
    return first.removeprefix("arm 'adapter': ") + (f" ({len(more)} more targets like it)" if more else "")


def _check_outputs_and_merge(saved: SavedAdapter, task: Task, merge: bool) -> list[Finding]:
    """Compare the adapter's outputs with the stored ones, and the merged model's with the adapter's."""
    from peft import PeftModel

    quantise = base_quantisation(saved, task.recipe)
    labels = class_names(saved, task.recipe)
    prepared = task.prepare() if task.recipe.pretraining else Prepared({}, {}, "", labels=labels)

    def load_base() -> nn.Module:
        torch.manual_seed(0)
        load = task.load_base if prepared.processor is not None else functools.partial(_without_tokenizer, task)
        base = load(prepared, quantise)[0]
        fit_vocabulary(saved, base)
        return base

    def outputs(model: nn.Module) -> list[torch.Tensor]:
        return [verification_logits(model, batch) for batch in inputs]

    model = PeftModel.from_pretrained(load_base().eval(), saved.folder).eval()
    stored = stored_outputs(saved.folder)
    if stored is None:
        inputs, expected = sample_inputs(task, prepared, model.get_base_model()), None
        findings = [Finding("reload", None, f"there is no {OUTPUTS} to compare its outputs with")]
        if not inputs:
            return [*findings, Finding("merge", None, "there are no inputs to compare outputs on")]
    else:
        inputs, expected = stored
        findings = [_compare("reload", expected, outputs(model))]
    if not merge:
        return findings
    if quantise:  # an adapter is merged into the dequantised weights
        model = PeftModel.from_pretrained(dequantised(load_base()).eval(), saved.folder).eval()
    if quantise or expected is None:
        expected = outputs(model)
    try:
        merged_model = merged(model)
    except RuntimeError as error:
        return [*findings, Finding("merge", False, str(error))]
    if merged_model is None:
        return [*findings, Finding("merge", None, f"{saved.method} can't be merged")]
    return [*findings, _compare("merge", expected, outputs(merged_model))]


def sample_inputs(task: Task, prepared: Prepared, base: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Return two test examples if the data is loaded, else 16 token ids; nothing for images without data."""
    if prepared.splits:
        return task.inputs(prepared, 2)
    vocab_size = getattr(base.config.get_text_config(), "vocab_size", None)
    if not vocab_size:
        return []
    ids = torch.arange(3, 19)[None] % vocab_size
    if not base.config.is_encoder_decoder:
        return [{"input_ids": ids}]
    if task.recipe.task.endswith("classification"):  # it reads the end token's output, and shifts the text by itself
        end = base.config.eos_token_id
        return [{"input_ids": torch.cat([ids[ids != end], torch.tensor([end])])[None]}]
    return [{"input_ids": ids, "decoder_input_ids": ids[:, :4]}]


def _without_tokenizer(task: Task, prepared: Prepared, quantise: str | None) -> tuple[nn.Module, list[str]]:
    """Load the base of an adapter that may come without a tokenizer, with a padding token of the model's own."""
    base, new_weights = Task.load_base(task, prepared, quantise)
    if getattr(base.config, "pad_token_id", None) is None:
        base.config.pad_token_id = getattr(base.config, "eos_token_id", None)
    return base, new_weights


def _compare(name: str, expected: Iterable[torch.Tensor], outputs: Iterable[torch.Tensor]) -> Finding:
    try:
        gap = max(same_outputs(a, b, "stored and loaded") for a, b in zip(expected, outputs, strict=True))
    except RuntimeError as error:
        return Finding(name, False, str(error))
    return Finding(name, True, f"largest difference {gap:.1e} of the outputs' size")
