"""What holds for the trainer of every task: its steps do not wait for a GPU, its batches can be made in a worker."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import transformers
from few_steps import trainer_of
from pictures import pictures
from small import sentences
from tagged import tag_recipe, tagged, written
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from waiting import watched_steps

from peft_recipes import Arm, Dataset, Recipe
from peft_recipes.data.packing import COUNTS
from peft_recipes.tasks import trl_metrics

_TRAINING = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "use_cpu": True, "bf16": False}
TASKS = ("sft", "language-modeling", "dpo", "kto", "reward", "grpo", "text-classification", "token-classification",
         "image-classification", "seq2seq")  # fmt: skip
# The most waiting operations that are left for each batch of a step, and why.
_MASK = "transformers asks whether a padded batch's mask hides anything, before the model's first product"
_CAUSAL = f"{_MASK}: twice for a causal mask"
LEFT = {
    "sft padded": (2, _CAUSAL),
    "dpo padded": (2, _CAUSAL),
    "kto": (4, f"{_CAUSAL}, and again for the KL term's answers"),
    "reward": (2, _CAUSAL),
    "text-classification": (1, _MASK),
    "token-classification": (1, _MASK),
    "seq2seq": (3, f"{_MASK}, for the encoder, the decoder and the attention between them"),
}


@pytest.fixture(scope="module")
def recipe_of(instruct, prefer, classify, translate, tiny, tmp_path_factory):
    """recipe_of("kto") -> a small recipe of the task; "sft padded" pads its batches."""

    def texts():
        path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text, _ in sentences(48)))
        return Dataset(str(path), train=32, validation=8, test=8)

    def grpo():
        path = tmp_path_factory.mktemp("grpo") / "prompts.jsonl"
        rows = ({"prompt": f"say good in {text}", "completion": "good"} for text, _ in sentences(48))
        path.write_text("\n".join(map(json.dumps, rows)))
        training = {**_TRAINING, "num_generations": 4, "max_completion_length": 4}
        return prefer(task="grpo", dataset=Dataset(str(path), train=32, validation=8, test=8), max_length=24,
                      training=training, metric="exact_match")  # fmt: skip

    def images():
        folder = tmp_path_factory.mktemp("vit")
        transformers.set_seed(0)
        config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                                        intermediate_size=32, patch_size=8)  # fmt: skip
        transformers.ViTModel(config).save_pretrained(folder)
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        data = pictures(tmp_path_factory.mktemp("pictures"), train=16, test=4)
        return Recipe(name="pictures", task="image-classification", model=str(folder), training=_TRAINING,
                      dataset=Dataset(str(data), image="image", label="label", validation=4, test=8,
                                      test_split="test"), arms={"full": Arm(learning_rate=1e-3)})  # fmt: skip

    def tags():
        data = written(tmp_path_factory.mktemp("tagged") / "sentences.jsonl", tagged(160))
        return tag_recipe(tiny("distilbert"), data)

    make = {
        "sft": instruct,
        "language-modeling": lambda: instruct(task="language-modeling", dataset=texts()),
        "dpo": prefer,
        "kto": lambda: prefer(task="kto", training=_TRAINING),
        "reward": lambda: prefer(task="reward", training=_TRAINING, prompts=[]),
        "grpo": grpo,
        "text-classification": classify,
        "token-classification": tags,
        "image-classification": images,
        "seq2seq": translate,
    }
    made: dict[str, Recipe] = {}

    def recipe(name: str) -> Recipe:
        task, _, padded = name.partition(" ")
        if name not in made:
            made[name] = make[task](**({"batches": "padded"} if padded else {}))
        return made[name]

    return recipe


@pytest.mark.parametrize("name", [*(task for task in TASKS if task != "grpo"), "sft padded", "dpo padded"])
def test_a_step_does_not_wait_for_a_gpu(recipe_of, name, tmp_path, monkeypatch):
    """grpo waits: it generates answers token by token, and their end decides when it stops."""
    trainer = trainer_of(recipe_of(name), tmp_path, gradient_accumulation_steps=2)
    with watched_steps(monkeypatch) as steps:
        trainer.train()
    most, _ = LEFT.get(name, (0, ""))
    assert len(steps) == 3 and all(len(step) <= 2 * most for step in steps), steps


@pytest.mark.parametrize("name", TASKS)
def test_a_worker_can_have_the_collator_and_the_examples_of_a_task(recipe_of, name, tmp_path):
    trainer = trainer_of(recipe_of(name), tmp_path)
    size = len(pickle.dumps(trainer.data_collator))
    collate, rows = pickle.loads(pickle.dumps((trainer.data_collator, trainer.train_dataset)))
    assert size < 200_000, "a collator should hold no model"
    for start in (0, 8):
        ours, theirs = (
            collator([data[i] for i in range(start, start + 8)])
            for collator, data in ((trainer.data_collator, trainer.train_dataset), (collate, rows))
        )
        if name == "grpo":
            assert ours == theirs
            continue
        assert ours.keys() == theirs.keys() and ours.get(COUNTS) == theirs.get(COUNTS)
        for key, values in ours.items():
            if isinstance(values, torch.Tensor):
                assert torch.equal(values, theirs[key]), key


def logs_of(trainer, every=1):
    """What is logged of a training's steps, without times."""
    trainer.args.logging_steps = every
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{k: v for k, v in entry.items() if not k.startswith(("epoch", "step", "learning_rate"))} for entry in logs]


# trl's trainers, and what makes each compute metrics with its own LM head, whose outputs it has more metrics of.
TRL = {
    "dpo": ({}, {}),
    "dpo padded": ({}, {}),
    "dpo padded, trl's LM head": ({}, {"logits_bytes": 0}),
    "dpo, its sft loss": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, {}),
    "kto": ({}, {}),
    "reward": ({"center_rewards_coefficient": 0.1}, {}),
    "sft, smoothed labels": ({"label_smoothing_factor": 0.1}, {}),
    "sft, loss_type dft": ({"loss_type": "dft"}, {}),
}


@pytest.mark.parametrize("name", TRL)
def test_metrics_that_are_read_once_are_those_that_trl_reads_in_each_step(recipe_of, name, tmp_path, monkeypatch):
    """With the operations that trl itself would use, the same is logged, of one step and of the mean of several."""
    training, options = TRL[name]
    if "logits_bytes" in options:
        monkeypatch.setattr("peft_recipes.tasks.causal_trainer.LOGITS_BYTES", options["logits_bytes"])
    recipe = recipe_of(name.partition(",")[0])

    def logs(every):
        return logs_of(trainer_of(recipe, tmp_path, max_steps=4, **training), every)

    once = {every: logs(every) for every in (1, 2)}
    with monkeypatch.context() as patch:
        patch.setattr(trl_metrics._Unread, "__torch_function__", _as_trl)
        for every in (1, 2):
            trls = logs(every)
            assert len(trls) == 4 // every and len(trls[0]) > 3
            for ours, theirs in zip(once[every], trls, strict=True):
                assert all(type(value) in (int, float) for value in ours.values())
                assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", ["dpo", "kto", "reward"])
def test_what_is_logged_is_what_a_plain_trl_script_logs(recipe_of, name, tmp_path):
    order = {} if name == "kto" else {"train_sampling_strategy": "sequential"}
    trainer = trainer_of(recipe_of(name), tmp_path, **order)
    rows = trainer.train_dataset.remove_columns(
        [column for column in trainer.train_dataset.column_names if column.startswith("ref_") or column == "length"]
    )

    class Plain({"dpo": DPOTrainer, "kto": KTOTrainer, "reward": RewardTrainer}[name]):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # tokenised already

    args = copy.deepcopy(trainer.args)
    plain = Plain(copy.deepcopy(trainer.model), args=args, train_dataset=rows,
                  processing_class=trainer.processing_class)  # fmt: skip
    for ours, theirs in zip(logs_of(trainer), logs_of(plain), strict=True):
        assert len(ours) > 4 and ours == pytest.approx({key: theirs[key] for key in ours}, rel=2e-4, abs=1e-5)


def _as_trl(self, function, types, args=(), kwargs=None):
    return function(*args, **(kwargs or {}))


def test_a_batch_of_one_label_alone_has_trls_metrics(recipe_of, tmp_path):
    trainer = trainer_of(recipe_of("kto"), tmp_path, max_steps=1)
    rows = trainer.train_dataset
    trainer.train_dataset = rows.select([i for i, wanted in enumerate(rows["label"]) if wanted][:8])
    (entry,) = logs_of(trainer)
    assert "rewards/chosen" in entry and not {"rewards/rejected", "rewards/margins", "logps/rejected"} & set(entry)


def test_numbers_of_several_dtypes_and_plain_ones_are_read_together():
    lists = [[torch.tensor(2), 0.5], [torch.tensor(0.25, dtype=torch.bfloat16)], []]
    assert trl_metrics.as_numbers(lists) == [[2.0, 0.5], [0.25], []]
