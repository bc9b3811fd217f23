"""A mistake is told before anything runs, whatever its type: one line, never another exception than RecipeError."""

from __future__ import annotations

import json

import pytest
from peft import LoraConfig

from peft_recipes import Arm, Dataset, Recipe, RecipeError, train
from peft_recipes.catalog.changes import changed
from peft_recipes.catalog.recipes import load_recipe
from peft_recipes.data import columns, sources
from peft_recipes.recipe.serialization import from_yaml, to_yaml


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("training.per_device_train_batch_size=0", "expected 1 or more"),
        ("training.max_steps=null", "training.max_steps: expected"),
        ("training.num_train_epochs=-3", "above 0"),
        ("training.packing=true", "`batches` of the recipe"),
        ("dataset.transform=5", "dataset.transform: expected a mapping"),
        ("dataset.transform={rotation: abc}", "a mapping of names to a number"),
        ("dataset.labels=[1,2,3]", "dataset.labels: expected a list of text"),
        ("dataset.labels=no,yes", "dataset.labels: expected a list of text"),
        ("dataset.labels=[a,a]", "no name twice"),
        ("dataset.seed=1.5", "dataset.seed: expected a whole number"),
        ("evaluate_also.clean=5", "evaluate_also: expected a mapping"),
        ("prompts=5", "prompts: expected a list"),
        ("skip_checks=[memry]", "Did you mean 'memory'"),
        ("threads=0", "threads: expected a whole number of 1 or more"),
        ("attention=sdp", "Did you mean 'sdpa'"),
        ("batches=packed", "batches"),
        ("arms.lora.method=head", "both 'method' and 'peft'"),
        ("arms.full.method=head", "its method is 'full'"),
        ("embedded.modell=x", "Did you mean 'model'"),
        ("max_length=1", "2 or more"),
        ("margin=.nan", "margin: expected a number"),
        ("title=7", "title: expected text"),
    ],
)
def test_a_wrong_value_is_told_in_one_line(instruct, change, words):
    with pytest.raises(RecipeError) as refused:
        changed(instruct(), False, [change])
    assert words in str(refused.value), str(refused.value)


@pytest.mark.parametrize("part", ["batch_size=abc", "num_train_epochs=-1", "learning_rate=0"])
def test_pretraining_is_checked_as_well(part):
    with pytest.raises(RecipeError, match=f"pretraining.{part.partition('=')[0]}"):
        load_recipe("mnist-shift", changes=[f"pretraining.{part}"])


@pytest.mark.parametrize(
    "wrong", [{"arms": {"lora": LoraConfig()}}, {"arms": [Arm()]}, {"dataset": "a.csv"}, {"arms": {"full": Arm("fll")}}]
)
def test_a_recipe_made_of_wrong_parts_says_which(wrong):
    right = {"name": "a", "task": "sft", "model": "m", "dataset": Dataset("a.csv"), "arms": {"full": Arm()}}
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        Recipe(**{**right, **wrong})


def test_options_that_the_trainer_refuses_are_told_before_anything_is_written(instruct, tmp_path):
    recipe = instruct()
    recipe.training["optim"] = "foo"
    with pytest.raises(RecipeError, match="foo"):
        train(recipe, "lora", output=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_nested_training_option_can_be_set(classify):
    recipe = changed(classify(), False, ["training.lr_scheduler_kwargs.min_lr=1e-6"])
    assert recipe.training["lr_scheduler_kwargs"] == {"min_lr": 1e-6}


def test_yaml_reads_an_exponent_without_a_dot_as_a_number():
    assert from_yaml("{a: 1e-3, b: 1.5E+2, c: e3, d: 12}") == {"a": 1e-3, "b": 150.0, "c": "e3", "d": 12}
    kept = {"a": "1e-5", "b": "no", "c": "true", "d": 1e-5, "e": True, "f": None, "g": "12"}
    assert from_yaml(to_yaml(kept)) == kept
    assert from_yaml("[no, yes, on, off, true, False, null]") == ["no", "yes", "on", "off", True, False, None]


def test_a_seed_out_of_range_is_a_mistake_not_a_failed_run(classify, tmp_path):
    with pytest.raises(RecipeError, match="seed"):
        train(classify(), "lora", seed=2**32, output=tmp_path)


def rows_of(tmp_path, values, labels=None):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}", "label": v}) + "\n" for i, v in enumerate(values)))
    source = Dataset(str(path), labels=labels, train=0.6, validation=0.2, test=0.2)
    splits = sources.load_splits(source)
    names = columns.class_labels(splits, source)
    numbers = {}
    for rows in splits.values():
        made = columns.classification_rows(rows, source, "text", names)
        numbers |= {text: names[label] for text, label in zip(made["text"], made["label"], strict=True)}
    return names, [numbers[f"text {i}"] for i in range(len(values))]


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [
        ([1, 2, 3, 4, 5] * 4, None, ["1", "2", "3", "4", "5"] * 4),
        ([1, 2, 3, 4, 5] * 4, ["1", "2", "3", "4", "5"], ["1", "2", "3", "4", "5"] * 4),
        ([0, 1] * 10, ["neg", "pos"], ["neg", "pos"] * 10),
        (["pos", "neg"] * 10, ["neg", "pos"], ["pos", "neg"] * 10),
    ],
)
def test_a_label_is_its_own_class_by_name_or_by_place(tmp_path, values, labels, classes):
    assert rows_of(tmp_path, values, labels)[1] == classes


def test_class_names_that_contradict_the_datas_own_are_refused(tmp_path):
    import datasets

    features = datasets.Features({"id": datasets.Value("string"), "label": datasets.ClassLabel(names=["ham", "spam"])})
    rows = datasets.Dataset.from_dict({"id": ["a", "b"], "label": [0, 1]}, features=features)
    with pytest.raises(RecipeError, match="names its classes ham, spam"):
        columns.class_labels({"train": rows}, Dataset("x", labels=["spam", "ham"]))


@pytest.mark.parametrize("messages", [None, "text", [{"role": "user"}], [{"role": "user", "content": None}] * 2])
def test_messages_that_are_none_name_their_row(tmp_path, messages):
    with pytest.raises(RecipeError, match="row"):
        columns.checked_messages(messages, "messages", "7", "rows.jsonl")


def test_an_empty_answer_of_a_csv_is_left_out_and_counted(instruct, tmp_path):
    from peft_recipes.tasks.registry import task_of

    path = tmp_path / "rows.csv"
    lines = [f"say {i},,{'' if i == 3 else f'answer {i}'}" for i in range(20)]
    path.write_text("instruction,input,output\n" + "\n".join(lines) + "\n")
    prepared = task_of(instruct(dataset=Dataset(str(path), train=12, validation=4, test=4))).prepare()
    assert any("1 " in note and "empty answer" in note for note in prepared.notes)
    assert sum(prepared.rows.values()) == 19


def test_sft_text_is_read_from_the_column_that_is_named(instruct, tmp_path):
    from peft_recipes.tasks.registry import task_of

    path = tmp_path / "rows.csv"
    path.write_text("body\n" + "\n".join(f"this was a film {i}" for i in range(20)) + "\n")
    prepared = task_of(instruct(dataset=Dataset(str(path), text="body", train=12, validation=4, test=4))).prepare()
    assert len(prepared.splits["train"]) == 12


def test_a_quote_that_never_closes_is_told_where_it_opens(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\na,0\n"b,1\n' + "\n".join(f"c{i},0" for i in range(40)) + "\n")
    with pytest.raises(RecipeError, match="line 3: a quote"):
        sources.load_splits(Dataset(str(path)))


def test_a_broken_file_in_a_folder_is_a_mistake_that_is_told(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.json").write_text('{"text": ["a"')
    with pytest.raises(RecipeError, match=r"can't be read|not valid"):
        sources.load_splits(Dataset(str(tmp_path / "data")))
