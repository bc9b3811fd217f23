"""The guards that apply to a saved adapter: its files, its fit to a base, what it answers, merging."""

from __future__ import annotations

import dataclasses
import functools
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.adapters.saved import CONFIG, SavedAdapter, read_adapter
from peft_recipes.arms.apply import REFUSALS
from peft_recipes.arms.merge import merged
from peft_recipes.errors import RecipeError
from peft_recipes.models.meta import meta_model
from peft_recipes.models.quantisation import dequantised
from peft_recipes.runs.outputs import OUTPUTS, answers, stored_outputs

if TYPE_CHECKING:
    import torch
    import torch.nn as nn

    from peft_recipes.recipe.recipe import Recipe
    from peft_recipes.tasks.base import Task

# Names of the weights whose rows are the classes.
_HEADS = (".classifier.weight", ".score.weight", ".classifier.out_proj.weight")


@dataclass(frozen=True)
class Finding:
    """One check of an adapter: ok is None where it could not be made, and `said` why."""

    name: str
    ok: bool | None
    said: str = ""


def check_adapter(
    folder: str | Path,
    base: str | None = None,
    *,
    weights: bool = True,
    merge: bool = True,
    trust_remote_code: bool = False,
) -> list[Finding]:
    """The guards that apply to a saved adapter, its own run's or made elsewhere.

    base: held against this model instead of the one that the adapter names. weights: False leaves out what needs the
    base's weights (its outputs, and merging); merge: False only the merging. Raises RecipeError where there is no
    readable adapter or no such base.
    """
    saved = read_adapter(folder)
    task = adapter_task(saved, base, trust_remote_code)
    found = [_adapter_only(saved), _finite(saved), _learnt(saved)]
    config = base_config(saved, task)
    found.append(fit(saved, task, config))
    if weights and all(finding.ok is not False for finding in found):
        found += _outputs_and_merge(saved, task, merge)
    return found


def adapter_task(saved: SavedAdapter, base: str | None, trust_remote_code: bool) -> Task:
    """The task whose base the adapter sits on: of its own recipe.yaml, or of its PEFT task type."""
    from peft_recipes.recipe.arm import Arm
    from peft_recipes.recipe.dataset import Dataset
    from peft_recipes.recipe.recipe import Recipe
    from peft_recipes.runs.folder import resolved_recipe
    from peft_recipes.tasks.registry import task_of

    model = base or saved.config.base_model_name_or_path
    if (saved.folder / "recipe.yaml").is_file():
        recipe = resolved_recipe(saved.folder / "recipe.yaml")
        model = base or recipe.model
    else:
        task = _kind(saved)
        recipe = Recipe(name="adapter", task=task, model=model or "unknown",
                        dataset=Dataset("embedded:none"), arms={"full": Arm(learning_rate=1.0)})  # fmt: skip
    if not model:
        raise RecipeError(f"{saved.folder / CONFIG} names no base model. Name it: --base MODEL.")
    # What a downloaded recipe says of remote code is not the user's word.
    return task_of(dataclasses.replace(recipe, model=model, trust_remote_code=trust_remote_code))


# How the classes end that the Auto classes give, and the task that a model of such a class is for.
_CLASSES = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForCausalLM": "language-modeling",
    "LMHeadModel": "language-modeling",
}


def _kind(saved: SavedAdapter) -> str:
    """The task of an adapter that was made elsewhere: by PEFT's task type, or the class of the model it sat on."""
    kinds = {"CAUSAL_LM": "language-modeling", "SEQ_CLS": "text-classification"}
    sat_on = str((saved.config.auto_mapping or {}).get("base_model_class"))
    found = kinds.get(saved.config.task_type) or next((t for end, t in _CLASSES.items() if sat_on.endswith(end)), None)
    if found is None:
        raise RecipeError(
            f"{saved.folder / CONFIG}: task_type {saved.config.task_type!r} does not tell what kind of model the "
            f"base is; known are {', '.join(kinds)}."
        )
    return found


def class_names(saved: SavedAdapter, recipe: Recipe) -> list[str] | None:
    """The class names that its own run tested, else the base's own where they are as many as the saved head has rows,
    else numbers; None where it brings no head (the base's is used)."""
    try:
        run = json.loads((saved.folder / "run.json").read_text(encoding="utf-8"))
        if run.get("per_class"):
            return [row["label"] for row in run["per_class"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    if recipe.dataset.labels:
        return list(recipe.dataset.labels)
    rows = [t.shape[0] for name, t in saved.tensors.items() if name.endswith(_HEADS)]
    if not rows:
        return None
    from peft_recipes.models import bases

    own = list((bases.load_config(recipe).id2label or {}).values())
    named = len(own) == rows[-1] and not all(str(name).startswith("LABEL_") for name in own)
    return [str(name) for name in own] if named else [str(i) for i in range(rows[-1])]


def base_config(saved: SavedAdapter, task: Task) -> Any:
    """The configuration of the adapter's base, with as many classes as the adapter has."""
    from peft_recipes.data.prepared import Prepared
    from peft_recipes.models import bases

    prepared = Prepared({}, {}, "", labels=class_names(saved, task.recipe))
    return bases.load_config(task.recipe, **task.base_options(prepared))


def _adapter_only(saved: SavedAdapter) -> Finding:
    from peft_recipes.guards.checks import folder_is_adapter_only

    try:
        folder_is_adapter_only(path.name for path in saved.folder.iterdir())
    except RuntimeError as error:
        return Finding("adapter-only", False, str(error))
    return Finding("adapter-only", True, "the base is not in it")


def _finite(saved: SavedAdapter) -> Finding:
    wrong = [name for name, t in saved.tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if not _rank_pattern(saved):  # AdaLoRA may leave a layer without any rank
        wrong += [name for name, t in saved.tensors.items() if t.numel() == 0]
    if wrong:
        return Finding("finite", False, f"{len(wrong)} tensors are empty or hold NaN or infinity, first {wrong[0]}")
    return Finding("finite", True, f"{len(saved.tensors)} tensors")


def _rank_pattern(saved: SavedAdapter) -> bool:
    """Whether its layers have ranks of their own, by AdaLoRA's budget."""
    return saved.config.peft_type == "ADALORA" and bool(saved.config.rank_pattern)


def _learnt(saved: SavedAdapter) -> Finding:
    """LoRA's B begins as zeros: where all of them still are, nothing was learnt."""
    begins_at_zero = [t for name, t in saved.tensors.items() if "lora_B" in name or "lora_embedding_B" in name]
    if not begins_at_zero:
        return Finding("learning", None, "can't be told of this type")
    learnt = sum(bool(t.any()) for t in begins_at_zero)
    if not learnt:
        return Finding("learning", False, "every lora_B is zero: the adapter changes nothing")
    return Finding("learning", True, f"{learnt} of {len(begins_at_zero)} lora_B are no longer zero")


def _why(error: Exception) -> str:
    """What does not fit, in one line: the first of several problems alike, and how many more there are."""
    if not isinstance(error, RecipeError):
        return textwrap.shorten(str(error), 300, placeholder=" ...")
    first, *more = error.problems
    return first.removeprefix("arm 'adapter': ") + (f" ({len(more)} more targets like it)" if more else "")


def fit(saved: SavedAdapter, task: Task, config: Any) -> Finding:
    """Its tensors are those that its configuration makes on this base, by name and shape, without any weights."""
    import copy

    from peft import get_peft_model, get_peft_model_state_dict

    from peft_recipes.guards.checks import targets_hit_modules

    made_for = saved.config.base_model_name_or_path
    between = f"made for '{made_for}', held against '{task.recipe.model}'"
    model = meta_model(task.recipe, config)
    settings = copy.deepcopy(saved.config)
    settings.inference_mode = False
    if isinstance(getattr(settings, "init_lora_weights", None), str):
        settings.init_lora_weights = True  # PiSSA and OLoRA decompose weights, and there are none here
    if patterned := _rank_pattern(saved):
        settings.rank_pattern = None  # PEFT would cut weights by it, and there are none here
    try:
        targets_hit_modules(model, settings, "adapter")
        adapted = get_peft_model(model, settings)
    except (RecipeError, *REFUSALS) as error:
        # Whatever PEFT says of a configuration made elsewhere is why it does not fit.
        return Finding("fits", False, f"{between}: {_why(error)}")
    if settings.is_prompt_learning:  # stored as what its encoder computes, which there are no weights for yet
        there = "prompt_embeddings" in saved.tensors
        return Finding("fits", there, "" if there else f"{between}: there are no prompt_embeddings")
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    missing, stray = sorted(set(wanted) - set(saved.tensors)), sorted(set(saved.tensors) - set(wanted))
    shapes = [n for n in sorted(set(wanted) & set(saved.tensors)) if wanted[n].shape != saved.tensors[n].shape]
    shapes = [] if patterned else shapes
    if missing or stray or shapes:
        first = (missing or stray or shapes)[0]
        return Finding(
            "fits", False,
            f"{between}: {len(missing)} tensors missing, {len(stray)} not of this model, {len(shapes)} of another "
            f"shape; the first is {first}",
        )  # fmt: skip
    return Finding("fits", True, f"{len(wanted)} tensors, on {task.recipe.model}")


def _outputs_and_merge(saved: SavedAdapter, task: Task, merge: bool) -> list[Finding]:
    """The stored outputs come back in this process, and merging changes nothing."""
    import torch
    from peft import PeftModel

    from peft_recipes.data.prepared import Prepared

    labels = class_names(saved, task.recipe)
    prepared = task.prepare() if task.recipe.pretraining else Prepared({}, {}, "", labels=labels)
    torch.manual_seed(0)
    quantise = quantisation_of(saved, task.recipe)
    load = task.load_base if prepared.processor is not None else functools.partial(_loaded, task)
    model = PeftModel.from_pretrained(load(prepared, quantise)[0].eval(), saved.folder).eval()
    base = model.get_base_model()
    stored = stored_outputs(saved.folder)
    if stored is None:
        found = [Finding("reload", None, f"there is no {OUTPUTS} to hold its outputs against")]
        inputs = some_inputs(task, prepared, base)
        if not inputs:
            return [*found, Finding("merge", None, "there are no inputs to try it on")]
        before = [answers(model, given) for given in inputs]
    else:
        inputs, before = stored
        found = [_same("reload", before, [answers(model, given) for given in inputs])]
    if not merge:
        return found
    if quantise:  # merging goes into the weights that the quantised ones stand for
        torch.manual_seed(0)
        whole = dequantised(load(prepared, quantise)[0]).eval()
        model = PeftModel.from_pretrained(whole, saved.folder).eval()
        before = [answers(model, given) for given in inputs]
    try:
        whole = merged(model)
    except RuntimeError as error:
        return [*found, Finding("merge", False, str(error))]
    if whole is None:
        return [*found, Finding("merge", None, f"{saved.config.peft_type.value} can't be merged")]
    return [*found, _same("merge", before, [answers(whole, given) for given in inputs])]


def quantisation_of(saved: SavedAdapter, recipe: Recipe) -> str | None:
    """How the base was quantised that the adapter learnt on, by its own run; None where that is not known."""
    try:
        run = json.loads((saved.folder / "run.json").read_text(encoding="utf-8"))
        return recipe.arms[run["arm"]].quantise
    except (OSError, ValueError, KeyError, TypeError):
        return None


def some_inputs(task: Task, prepared: Any, base: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Test examples where the data is at hand, else a few tokens; none for images without data."""
    import torch

    if prepared.splits:
        return task.inputs(prepared, 2)
    words = getattr(base.config.get_text_config(), "vocab_size", None)
    return [{"input_ids": torch.arange(3, 19)[None] % words}] if words else []


def _loaded(task: Task, prepared: Any, quantise: str | None = None) -> tuple[nn.Module, list[str]]:
    """The base without its tokenizer: its padding token is the configuration's own, or the end-of-text token."""
    from peft_recipes.tasks.base import Task as Plain

    base, new = Plain.load_base(task, prepared, quantise)
    if getattr(base.config, "pad_token_id", None) is None:
        base.config.pad_token_id = getattr(base.config, "eos_token_id", None)
    return base, new


def _same(name: str, first: list[torch.Tensor], second: list[torch.Tensor]) -> Finding:
    from peft_recipes.guards.checks import same_outputs

    try:
        gap = max(same_outputs(a, b, "stored and loaded") for a, b in zip(first, second, strict=True))
    except RuntimeError as error:
        return Finding(name, False, str(error))
    return Finding(name, True, f"largest difference {gap:.1e} of the outputs' size")
