"""The promises of a comparison on any architecture and method: the steps' examples, the losses, what is saved.

`make test` tries each decoder on `sft` or `dpo` and each classifier, with one method, another for each;
PEFT_RECIPES_EVERY=1 tries all.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from architectures import CLASSIFIERS, DECODERS, ENCODERS, save_tiny_base
from small import FILLER, sentences

from peft_recipes import Dataset, Recipe
from peft_recipes.arms.apply import apply_arm
from peft_recipes.arms.merge import merged
from peft_recipes.arms.selection import choose_arms
from peft_recipes.recipe.arm import Arm
from peft_recipes.training.resolve import Resolved, resolve
from peft_recipes.training.save import restore, save
from peft_recipes.training.verify import compute_logits

# trl's fused LM head leaves out the layer between this model's backbone and its vocabulary projection.
OTHER_HEAD = "modernbert-decoder"
METHODS = ("full", "lora", "dora", "ia3", "prompt-tuning", "adalora")
TASKS = ("sft", "dpo", "text-classification")
STEPS, BATCH = 3, 4
REFUSED = {  # by PEFT, before training: DoRA on experts that are stacked parameters
    *((kind, task, "dora") for kind in ("gpt_oss", "qwen3_next") for task in TASKS),
}


def cases() -> list[tuple[str, str, str]]:
    pairs = [(kind, task) for kind in DECODERS for task in TASKS[:2]] + [(kind, TASKS[2]) for kind in CLASSIFIERS]
    if os.environ.get("PEFT_RECIPES_EVERY"):
        return [(*pair, method) for pair in pairs for method in METHODS if (*pair, method) not in REFUSED]
    numbers = {kind: number for number, kind in enumerate((*DECODERS, *ENCODERS))}
    # In turns of seven, so that each task meets each method.
    pairs = [pair for pair in pairs if pair[1] == TASKS[2] or pair[1] == TASKS[numbers[pair[0]] // 7 % 2]]
    chosen = [(kind, task, METHODS[(numbers[kind] + 2 * TASKS.index(task)) % len(METHODS)]) for kind, task in pairs]
    return [case if case not in REFUSED else (*case[:2], "lora") for case in chosen]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """bases(kind) -> the folder of a tiny random base, written once."""
    made: dict[str, Path] = {}

    def base(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_tiny_base(kind, tmp_path_factory.mktemp(kind.replace("/", "-")))
        return made[kind]

    return base


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 24 examples of unequal length for each task."""
    folder, files = tmp_path_factory.mktemp("data"), {}
    texts = [(f"{text} {' we saw' * (i % 4)}".strip(), label) for i, (text, label) in enumerate(sentences(48, seed=3))]
    good = [text for text, label in texts if label == "good"]
    bad = [text for text, label in texts if label == "bad"]
    rows = {
        "text-classification": [{"text": text, "label": label} for text, label in texts[:24]],
        "sft": [{"prompt": f"say {FILLER[i % 7]} in a film", "completion": good[i]} for i in range(24)],
        "dpo": [
            {"prompt": f"say {FILLER[i % 7]} in {FILLER[i % 3]}", "chosen": good[i], "rejected": bad[i]}
            for i in range(24)
        ],
    }
    for task, examples in rows.items():
        files[task] = folder / f"{task}.jsonl"
        files[task].write_text("\n".join(map(json.dumps, examples)) + "\n")
    return files


def recipe_of(base: Path, task: str, file: Path, method: str, **training) -> Recipe:
    options = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "use_cpu": True, "bf16": False,
               "eval_strategy": "no", "max_grad_norm": 0.0, "logging_steps": 1, **training}  # fmt: skip
    recipe = Recipe(name="any", task=task, model=str(base), dataset=Dataset(str(file), train=16, validation=4, test=4),
                    max_length=64, training=options, arms={"full": Arm(learning_rate=1e-3)})  # fmt: skip
    return choose_arms(recipe, [method]).recipe


def untrained(resolved: Resolved, method: str) -> tuple[torch.nn.Module, list[str]]:
    """The base with the arm applied, and the names of its new weights."""
    transformers.set_seed(0)
    base, new = resolved.task.load_base(resolved.prepared)
    resolved.task.use_base(base, resolved.prepared)
    model, _ = apply_arm(base, resolved.recipe.arms[method], resolved.recipe.task, new, method)
    return model, new


def our_trainer(resolved: Resolved, model: torch.nn.Module, method: str, folder: Path):
    arguments = resolved.task.arguments(resolved.recipe.arms[method], 0, resolved.hardware, folder, True)
    return resolved.task.trainer(model, resolved.prepared, arguments, [])


def plain_trainer(resolved: Resolved, model: torch.nn.Module, method: str, folder: Path):
    """transformers' or TRL's own trainer, with its own collator, on the same examples."""
    from trl import DPOTrainer, SFTTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    arguments = resolved.task.arguments(resolved.recipe.arms[method], 0, resolved.hardware, folder, True)
    rows, words = resolved.prepared.splits["train"], resolved.prepared.processor
    if resolved.recipe.task == "sft":
        return SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=words)
    if resolved.recipe.task == "dpo":
        arguments.precompute_ref_log_probs = False
        rows = rows.remove_columns([name for name in rows.column_names if name.startswith("ref_")])
        reference = {} if hasattr(model, "peft_config") else {"ref_model": copy.deepcopy(model)}
        return Tokenised(model=model, args=arguments, train_dataset=rows, processing_class=words, **reference)
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows,
                                data_collator=transformers.DataCollatorWithPadding(words))  # fmt: skip


class AllocatesRanks(transformers.TrainerCallback):
    """What PEFT's documentation asks of a training loop for AdaLoRA."""

    def on_optimizer_step(self, args, state, control, model=None, **_):
        model.base_model.update_and_allocate(state.global_step)


def losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("kind", "task", "method"), cases())
def test_losses_are_the_plain_trainers_and_what_is_saved_comes_back(kind, task, method, bases, data, tmp_path):
    found = {}
    for batches in ("shared-prefix", "padded") if kind in DECODERS and task != TASKS[2] else ("padded",):
        recipe = recipe_of(bases(kind), task, data[task], method, train_sampling_strategy="sequential")
        resolved = resolve(recipe.with_changes({"batches": batches}), [method])
        model, new = untrained(resolved, method)
        # trl's reference is the base with the initial prompt; it leaves out AdaLoRA's penalty, and refuses it in dpo.
        no_peer = (task, method) == ("dpo", "prompt-tuning") or (method == "adalora" and task in TASKS[:2])
        no_peer = no_peer or (kind == OTHER_HEAD and task in TASKS[:2])
        if not (found or no_peer):
            plain = plain_trainer(resolved, copy.deepcopy(model), method, tmp_path)
            if method == "adalora":
                plain.add_callback(AllocatesRanks())
            found["plain"] = losses(plain)
        trainer = our_trainer(resolved, model, method, tmp_path)
        found[f"{batches} ({trainer.batches})"] = losses(trainer)
    first = next(iter(found.values()))
    assert all(ours == pytest.approx(first, rel=1e-5, abs=1e-6) for ours in found.values()), found

    trained, arm = trainer.accelerator.unwrap_model(trainer.model), resolved.recipe.arms[method]
    inputs = resolved.task.inputs(resolved.prepared, 2)
    expected = compute_logits(trained, inputs, resolved.hardware)
    save(trained, arm, resolved.recipe, tmp_path, resolved.prepared.processor)
    transformers.set_seed(1)
    base, new = resolved.task.load_base(resolved.prepared)
    reloaded = restore(base, new, arm, resolved.recipe, tmp_path)
    for one, two in zip(expected, compute_logits(reloaded, inputs, resolved.hardware), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
    if arm.peft is not None and (single := merged(reloaded)) is not None:
        for one, two in zip(expected, compute_logits(single, inputs, resolved.hardware), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "task", "method"), [("llama", "sft", "full"), ("bert", "text-classification", "head")]
)
def test_neftune_is_the_plain_trainers(kind, task, method, bases, data, tmp_path):
    """Its noise depends on a row's length, and makes the frozen backbone's features others in each step."""
    recipe = recipe_of(bases(kind), task, data[task], "full", train_sampling_strategy="sequential",
                       neftune_noise_alpha=5.0)  # fmt: skip
    if method == "head":
        recipe.arms["head"] = Arm("head", learning_rate=1e-3)
    resolved = resolve(recipe, [method])
    model, _ = untrained(resolved, method)
    found = []
    for make, own in ((plain_trainer, copy.deepcopy(model)), (our_trainer, model)):
        trainer = make(resolved, own, method, tmp_path)
        transformers.set_seed(7)
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
