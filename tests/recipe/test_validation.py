"""Wrong values in recipes and data raise RecipeError with a one-line message before anything runs."""

from __future__ import annotations

import json

import pytest
from peft import LoraConfig

from peft_recipes import Arm, Dataset, Recipe, RecipeError, train
from peft_recipes.catalog.changes import changed
from peft_recipes.catalog.recipes import load_recipe
from peft_recipes.data import formats, sources
from peft_recipes.recipe.serialization import from_yaml, to_yaml


@pytest.mark.parametrize(
    ("change", "message"),
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
        ("threads=0", "threads: expected 1 or more"),
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
def test_a_wrong_value_has_a_one_line_message(instruct, change, message):
    with pytest.raises(RecipeError) as raised:
        changed(instruct(), False, [change])
    assert message in str(raised.value), str(raised.value)


@pytest.mark.parametrize("change", ["batch_size=abc", "num_train_epochs=-1", "learning_rate=0"])
def test_pretraining_options_are_validated(change):
    with pytest.raises(RecipeError, match=f"pretraining.{change.partition('=')[0]}"):
        load_recipe("mnist-shift", changes=[f"pretraining.{change}"])


@pytest.mark.parametrize(
    "wrong", [{"arms": {"lora": LoraConfig()}}, {"arms": [Arm()]}, {"dataset": "a.csv"}, {"arms": {"full": Arm("fll")}}]
)
def test_a_field_of_the_wrong_class_is_named(wrong):
    valid = {"name": "a", "task": "sft", "model": "m", "dataset": Dataset("a.csv"), "arms": {"full": Arm()}}
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        Recipe(**{**valid, **wrong})


def test_options_that_the_trainer_rejects_fail_before_anything_is_written(instruct, tmp_path):
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


def test_yaml_reads_what_only_looks_like_a_number_as_text():
    read = ["011", "12:30", "2024-05-01", "1:30.5"]
    assert from_yaml("[011, 12:30, 2024-05-01, 1:30.5, 0, -5, 1_000, 0x1f]") == [*read, 0, -5, 1000, 31]
    assert to_yaml(read) == "- '011'\n- '12:30'\n- '2024-05-01'\n- '1:30.5'\n"


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("reviews # 2.csv", "reviews # 2.csv"),
        ("#1.csv", "#1.csv"),
        ("'a # b'", "a # b"),
        ("a#b", "a#b"),
        ("> quoted", "> quoted"),
        ("&x", "&x"),
        ("011.csv", "011.csv"),
    ],
)
def test_a_value_of_set_is_not_cut(classify, given, read):
    assert changed(classify(), False, [f"dataset.path={given}"]).dataset.path == read


def test_a_comment_behind_a_list_is_refused(classify):
    with pytest.raises(RecipeError, match="a # behind a space begins a comment"):
        changed(classify(), False, ["dataset.labels=[good, bad] # two"])
    assert changed(classify(), False, ["dataset.labels=[good, 'b # d']"]).dataset.labels == ["good", "b # d"]


def test_a_key_given_twice_is_named_with_its_lines(classify, tmp_path):
    path = tmp_path / "mine.yaml"
    classify().to_yaml(path)
    last = len(path.read_text().splitlines()) + 1
    path.write_text(path.read_text() + "max_length: 8\n")
    with pytest.raises(RecipeError, match=rf"the key 'max_length' is given twice \(lines \d+ and {last}\)"):
        Recipe.from_yaml(path)
    with pytest.raises(RecipeError, match=r"the key 'a' is given twice \(line 1\)"):
        changed(classify(), False, ["training={a: 1, a: 2}"])


def test_a_seed_out_of_range_is_a_user_error(classify, tmp_path):
    with pytest.raises(RecipeError, match="seed"):
        train(classify(), "lora", seed=2**32, output=tmp_path)


def class_names_of(tmp_path, values, labels=None):
    """Load labels from a file; return the class names and the class name of each row."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}", "label": v}) + "\n" for i, v in enumerate(values)))
    source = Dataset(str(path), labels=labels, train=0.6, validation=0.2, test=0.2)
    splits = sources.load_splits(source)
    names = formats.class_labels(splits, source)
    class_of = {}
    for split in splits.values():
        rows = formats.classification_rows(split, source, "text", names)
        class_of |= {text: names[label] for text, label in zip(rows["text"], rows["label"], strict=True)}
    return names, [class_of[f"text {i}"] for i in range(len(values))]


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [
        ([1, 2, 3, 4, 5] * 4, None, ["1", "2", "3", "4", "5"] * 4),
        ([1, 2, 3, 4, 5] * 4, ["1", "2", "3", "4", "5"], ["1", "2", "3", "4", "5"] * 4),
        ([0, 1] * 10, ["neg", "pos"], ["neg", "pos"] * 10),
        (["pos", "neg"] * 10, ["neg", "pos"], ["pos", "neg"] * 10),
    ],
)
def test_labels_are_matched_by_class_name_or_by_index(tmp_path, values, labels, classes):
    assert class_names_of(tmp_path, values, labels)[1] == classes


def test_class_names_that_contradict_the_data_are_rejected(tmp_path):
    import datasets

    features = datasets.Features({"id": datasets.Value("string"), "label": datasets.ClassLabel(names=["ham", "spam"])})
    rows = datasets.Dataset.from_dict({"id": ["a", "b"], "label": [0, 1]}, features=features)
    with pytest.raises(RecipeError, match="names its classes ham, spam"):
        formats.class_labels({"train": rows}, Dataset("x", labels=["spam", "ham"]))


def test_an_empty_answer_in_a_csv_is_left_out_and_counted(instruct, tmp_path):
    from peft_recipes.tasks.registry import task_of

    path = tmp_path / "rows.csv"
    lines = [f"say {i},,{'' if i == 3 else f'answer {i}'}" for i in range(20)]
    path.write_text("instruction,input,output\n" + "\n".join(lines) + "\n")
    prepared = task_of(instruct(dataset=Dataset(str(path), train=12, validation=4, test=4))).prepare()
    assert any("1 " in note and "empty answer" in note for note in prepared.notes)
    assert sum(prepared.rows.values()) == 19


def test_sft_text_is_read_from_the_named_column(instruct, tmp_path):
    from peft_recipes.tasks.registry import task_of

    path = tmp_path / "rows.csv"
    path.write_text("body\n" + "\n".join(f"this was a film {i}" for i in range(20)) + "\n")
    prepared = task_of(instruct(dataset=Dataset(str(path), text="body", train=12, validation=4, test=4))).prepare()
    assert len(prepared.splits["train"]) == 12


def test_an_unclosed_quote_names_its_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\na,0\n"b,1\n' + "\n".join(f"c{i},0" for i in range(40)) + "\n")
    with pytest.raises(RecipeError, match="line 3: a quote"):
        sources.load_splits(Dataset(str(path)))


def test_a_broken_file_in_a_folder_is_a_user_error(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.json").write_text('{"text": ["a"')
    with pytest.raises(RecipeError, match=r"can't be read|not valid"):
        sources.load_splits(Dataset(str(tmp_path / "data")))


def test_a_recipe_error_is_a_value_error():
    with pytest.raises(ValueError, match="at least one arm"):
        Recipe("a", "sft", "m", Dataset("a.csv"), {})


def test_a_batch_that_does_not_divide_keeps_its_own_message(classify, monkeypatch):
    """The check of the trainer's options turns the ValueErrors of transformers into RecipeErrors, but not ours."""
    from peft_recipes.distributed import processes
    from peft_recipes.hardware.device import choose
    from peft_recipes.tasks.registry import task_of

    monkeypatch.setattr(processes, "count", lambda: 3)
    recipe = classify()
    with pytest.raises(RecipeError, match=r"^training: 16 examples"):
        task_of(recipe).check_arguments(recipe.arms["full"], choose(recipe.training))


def test_adalora_needs_a_rank_to_reduce():
    from peft import AdaLoraConfig

    from peft_recipes import Arm

    (problem,) = Arm(AdaLoraConfig(init_r=4, target_r=4, total_step=10)).problems("arms.adalora")
    assert "arms.adalora.peft.target_r" in problem and "lower" in problem


def test_null_is_none_of_a_list_or_a_mapping(classify):
    plain = {**classify().to_dict(), "evaluate_also": None, "benchmarks": None, "skip_checks": None, "generation": None}
    recipe = Recipe.from_dict(plain)
    assert (recipe.evaluate_also, recipe.benchmarks, recipe.skip_checks, recipe.generation) == ({}, [], [], {})
