"""Streamed data: never more rows than needed, the same order for every arm, resumed exactly, refused by name."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import signal

import datasets
import pandas
import pytest
from peft import LoraConfig
from safetensors.torch import load_file
from small import FILLER, sentences

from peft_recipes import Arm, Dataset, Recipe, RecipeError, plan, train
from peft_recipes.data import streaming
from peft_recipes.tasks.registry import task_of
from peft_recipes.training import stages

COUNTS = {"streaming": True, "validation": 8, "test": 8, "shuffle_buffer": 16}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A jsonl of 80 conversations, three of which can't be used."""
    path = tmp_path_factory.mktemp("stream") / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"say {FILLER[i % 9]}"}, {"role": "assistant", "content": text}]}
        for i, (text, _) in enumerate(sentences(80))
    ]
    for number in (40, 41, 79):
        rows[number]["messages"].pop()
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


@pytest.fixture
def streamed(tiny, chats):
    """streamed(task, dataset) -> a recipe that streams its data."""

    def make(task="sft", dataset=None, kind="llama", **changes):
        names = {"llama": ["q_proj", "v_proj"], "distilbert": ["q_lin", "v_lin"]}[kind]
        lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=names)
        options = {
            "name": "stream",
            "task": task,
            "model": str(tiny(kind)),
            "dataset": dataset or Dataset(chats, skip_rows=0.1, **COUNTS),
            "max_length": 48,
            "training": {"max_steps": 6, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False},
            "arms": {"full": Arm(learning_rate=1e-3), "lora": Arm(lora, 1e-2)},
            "checkpoint_seconds": 0,
        }
        return Recipe(**{**options, **changes})

    return make


def first(prepared, seed, count):
    return [tuple(row["input_ids"]) for row in itertools.islice(prepared.train_rows(seed), count)]


def test_a_pass_has_the_examples_of_the_whole_file_in_the_order_of_its_seed(streamed, chats):
    prepared = task_of(streamed()).prepare()
    assert prepared.rows == {"validation": 8, "test": 8}
    rows = first(prepared, 0, 2 * 61)
    assert first(prepared, 0, 61) == rows[:61] != first(prepared, 1, 61)
    whole = Dataset(chats, train=64, validation=8, test=8, skip_rows=0.1)
    loaded = task_of(streamed(dataset=whole)).prepare()
    usable = {tuple(row["input_ids"]) for split in loaded.splits.values() for row in split}
    held_out = {tuple(row["input_ids"]) for name in ("validation", "test") for row in prepared.splits[name]}
    assert set(rows[:61]) == set(rows[61:]) == usable - held_out
    assert rows[:61] != rows[61:]  # another order in the second pass


def test_rows_that_cannot_be_used_count_in_the_first_rows(streamed, chats):
    with pytest.raises(RecipeError, match=r"3 of 64 rows of 'train' can't be used: .* dataset\.skip_rows=0\.05"):
        task_of(streamed(dataset=Dataset(chats, **COUNTS))).prepare()


def test_labels_of_a_stream_are_those_of_the_same_rows_in_memory(streamed):
    prepared = task_of(streamed()).prepare()
    known = {tuple(row["input_ids"]): row["labels"] for row in prepared.splits["train"]}
    for row in itertools.islice(prepared.train_rows(0), 20):
        assert row["labels"] == known[tuple(row["input_ids"])]


def test_an_endless_source_is_read_no_further_than_training_needs(streamed, monkeypatch, tmp_path):
    read = []

    def rows():
        for number in itertools.count():
            read.append(number)
            yield {"text": " ".join(FILLER[(number // 7**i) % 7] for i in range(6))}

    endless = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(streaming, "_open", lambda source: {"train": endless})
    run = train(streamed("language-modeling", Dataset("endless", **COUNTS)), "lora", output=tmp_path)
    assert run.data["training"]["steps"] == 6 and run.data["rows"] == {"validation": 8, "test": 8}
    # Of one iteration: validation, test, the sample, the buffer, and the chunks of 24 examples and one batch ahead.
    assert max(read) < 16 + max(streaming.SAMPLE, 16 + 2 * streaming.CHUNK)


def interrupted(monkeypatch, number):
    log_step, done = stages.log_step, []

    def logged(log, step, *rest):
        log_step(log, step, *rest)
        if step == number and not done:
            done.append(step)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(stages, "log_step", logged)


def test_a_resumed_run_is_the_uninterrupted_one(streamed, tmp_path, monkeypatch):
    whole = train(streamed(), "lora", output=tmp_path / "whole")
    interrupted(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        train(streamed(), "lora", output=tmp_path / "resumed")
    resumed = train(streamed(), "lora", output=tmp_path / "resumed", resume=True)
    assert resumed.data["training"]["resumed_at_steps"] == [4]
    assert resumed.data["training"]["losses"] == whole.data["training"]["losses"]
    assert resumed.data["training"]["batches"] == "shared-prefix"
    for key in ("tokens", "examples", "computed_tokens"):
        assert resumed.data["training"][key] == whole.data["training"][key]
    one, two = (load_file(run.folder / "adapter_model.safetensors") for run in (whole, resumed))
    assert all((one[name] == two[name]).all() for name in one)
    pandas.testing.assert_frame_equal(
        *(pandas.read_parquet(r.folder / "predictions.parquet") for r in (whole, resumed))
    )


def test_every_arm_sees_the_same_examples(streamed, tmp_path):
    runs = [train(streamed(), arm, output=tmp_path) for arm in ("full", "lora")]
    assert len({run.data["training"]["tokens"] for run in runs}) == 1
    assert Recipe.from_yaml(runs[0].folder / "recipe.yaml").dataset.streaming


def test_a_classifier_streams_a_csv_without_its_test_examples(streamed, tmp_path):
    rows = sentences(60)
    lines = [f"{text},{label}" for text, label in [*rows, *rows[:4]]]  # four of validation come again at the end
    path = tmp_path / "texts.csv"
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    dataset = Dataset(str(path), labels=["bad", "good"], **COUNTS)
    recipe = streamed("text-classification", dataset, "distilbert")
    prepared = task_of(recipe).prepare()
    held_out = {tuple(row["input_ids"]) for name in ("validation", "test") for row in prepared.splits[name]}
    assert len(set(first(prepared, 0, 44))) == 44 and not held_out & set(first(prepared, 0, 100))
    run = train(recipe, "lora", output=tmp_path / "runs")
    assert run.data["labels"] == ["bad", "good"] and run.data["training"]["examples"] == 24


def test_alpaca_columns_stream_beside_an_evaluation_set_of_plain_text(streamed, questions, tmp_path):
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({"text": text}) + "\n" for text, _ in sentences(20, 4)))
    sets = {"plain": {"path": str(plain), "test": 10}, "own": {"path": str(questions), "test": 12}}
    prepared = task_of(streamed(dataset=Dataset(str(questions), **COUNTS), evaluate_also=sets)).prepare()
    assert prepared.rows == {"validation": 8, "test": 8, "plain": 10, "own": 8}  # the others are trained on
    assert len(set(first(prepared, 0, 32))) == 32


def test_own_splits_of_a_folder_are_read_as_streams(streamed, tmp_path):
    for split, seed in (("train", 1), ("test", 2)):
        lines = [json.dumps({"text": text}) for text, _ in sentences(30, seed)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    dataset = Dataset(str(tmp_path), test_split="test", **COUNTS)
    prepared = task_of(streamed("language-modeling", dataset)).prepare()
    assert prepared.ids["test"][0] == "test-0" and prepared.ids["validation"][0] == "train-0"
    assert len(set(first(prepared, 0, 22))) == 22


def test_a_folders_own_splits_are_used_without_being_named(streamed, tmp_path):
    for split, seed in (("train", 1), ("test", 2), ("dev", 3)):
        lines = [json.dumps({"text": text}) for text, _ in sentences(5 if split == "dev" else 30, seed)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    prepared = task_of(streamed("language-modeling", Dataset(str(tmp_path), **COUNTS))).prepare()
    assert prepared.ids["test"][0] == "test-0" and len(prepared.ids["test"]) == 8
    assert prepared.ids["validation"][0].startswith("validation-") and len(prepared.ids["validation"]) == 5
    assert any("test split is the dataset's own split 'test'" in note for note in prepared.notes)
    cut = Dataset(str(tmp_path), test_split="train", **COUNTS)
    assert task_of(streamed("language-modeling", cut)).prepare().ids["test"][0].startswith("train-")


@pytest.mark.parametrize("name", ["rows.ndjson", "rows.jsonl.gz", "rows.csv", "*.jsonl"])
def test_a_stream_reads_the_files_that_memory_reads(name, tmp_path):
    texts = ["None", "011", "True", *(f"text {n}" for n in range(20))]
    lines = "".join(json.dumps({"text": text, "n": "1"}) + "\n" for text in texts)
    if name.endswith(".csv"):
        lines = "\ufefftext;n\r\n" + "".join(f"{text};1\r\n" for text in texts)
    path = tmp_path / name.replace("*", "train")
    path.write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
    splits, _ = streaming.streamed_splits(Dataset(str(tmp_path / name), **COUNTS))
    assert [text for rows in (splits["validation"], splits["test"], splits["train"]) for text in rows["text"]] == texts


def test_plan_knows_steps_and_memory(streamed):
    planned = plan(streamed(), ["lora"])
    assert planned["arms"]["lora"]["steps"] == 6 and planned["arms"]["lora"]["tokens"] > 0
    assert any("streamed" in note for note in task_of(streamed()).prepare().notes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"training": {}}, "training.max_steps: needed with dataset.streaming"),
        ({"task": "dpo"}, "dataset.streaming: not for task dpo, only for sft, language-modeling, text-classification"),
        ({"dataset": {"validation": 0.1}}, "dataset.validation: 0.1 is a share of rows that a stream does not count"),
        ({"dataset": {"test": None}}, "dataset.test: None is a share"),
        ({"dataset": {"train": 100}}, "dataset.train: a stream is read until training.max_steps"),
        ({"dataset": {"balance": True}}, "dataset.balance: a stream is not counted by class"),
        ({"dataset": {"pretrain": 5}}, "dataset.pretrain: not with dataset.streaming"),
        ({"dataset": {"shuffle_buffer": 0}}, "dataset.shuffle_buffer: expected a number of rows above 0"),
        ({"training": {"max_steps": 3, "train_sampling_strategy": "group_by_length"}}, "a stream has its own order"),
        ({"training": {"max_steps": 3, "dataloader_num_workers": 2}}, "a stream is read by one process"),
        ({"task": "text-classification"}, "dataset.labels: needed with dataset.streaming"),
    ],
)
def test_what_a_stream_cannot_have_is_refused_in_one_line(changes, message):
    given = {"name": "a", "task": "sft", "model": "org/m", "arms": {"full": {"learning_rate": 1e-3}},
             "training": {"max_steps": 3}, **changes}  # fmt: skip
    given["dataset"] = {"path": "a.jsonl", **COUNTS, **changes.get("dataset", {})}
    with pytest.raises(RecipeError) as raised:
        Recipe.from_dict(given)
    assert len(raised.value.problems) == 1 and message in str(raised.value)


def test_a_linear_probe_and_a_mixture_are_refused(streamed):
    labels = Dataset("a.csv", labels=["bad", "good"], **COUNTS)
    with pytest.raises(RecipeError, match=r"arms\.probe: 'head' trains on features of all examples"):
        streamed("text-classification", labels, "distilbert", arms={"probe": Arm("head", 1e-3)})
    with pytest.raises(RecipeError, match="datasets: streaming reads one dataset"):
        streamed().with_changes({"datasets": [{"path": "a.jsonl", "streaming": True}, "b.jsonl"]})


def test_too_few_rows_and_several_processes_are_refused(streamed, chats, monkeypatch):
    with pytest.raises(RecipeError, match="has too few rows for test: 100 rows"):
        task_of(streamed(dataset=Dataset(chats, **{**COUNTS, "test": 100}))).prepare()
    with pytest.raises(RecipeError, match="is not there"):
        task_of(streamed(dataset=Dataset("missing.jsonl", **COUNTS))).prepare()
    monkeypatch.setattr("peft_recipes.distributed.processes.count", lambda: 2)
    with pytest.raises(RecipeError, match=r"dataset\.streaming: reads the data in one process"):
        task_of(streamed()).prepare()
