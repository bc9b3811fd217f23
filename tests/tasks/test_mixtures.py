"""Several datasets in one recipe: each read in its own format, mixed by weight, the same for every arm and seed."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from peft import LoraConfig
from small import FILLER, sentences

from peft_recipes import Arm, Dataset, Recipe, RecipeError, plan, train
from peft_recipes.catalog.changes import apply_changes
from peft_recipes.data.mixing import shares
from peft_recipes.tasks.registry import task_of


def jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def alpaca(path, count, seed):
    lines = [f"say {FILLER[i % 9]},a {FILLER[i % 7]},{text} good" for i, (text, _) in enumerate(sentences(count, seed))]
    path.write_text("\n".join(["instruction,input,output", *lines]) + "\n")
    return str(path)


def chats(path, count, seed):
    rows = [
        {"messages": [{"role": "user", "content": f"say in {FILLER[i % 9]}"}, {"content": text, "role": "assistant"}]}
        for i, (text, _) in enumerate(sentences(count, seed))
    ]
    return jsonl(path, rows)


def pairs(path, count, seed, chat=False):
    def turn(text):
        return [{"role": "assistant", "content": text}] if chat else text

    rows = [{"prompt": f"say {FILLER[i % 9]}", "chosen": turn(text), "rejected": turn(f"{text} bitter")}
            for i, (text, _) in enumerate(sentences(count, seed))]  # fmt: skip
    for row in rows if chat else ():
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    return jsonl(path, rows)


def mixture(model, datasets, task="sft", **changes):
    options = {
        "name": "mixture",
        "task": task,
        "model": str(model),
        "datasets": datasets,
        "max_length": 48,
        "training": {"num_train_epochs": 1, "per_device_train_batch_size": 8, "use_cpu": True},
        "arms": {"full": Arm(learning_rate=1e-3),
                 "lora": Arm(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), 1e-2)},
    }  # fmt: skip
    return Recipe(**{**options, **changes})


@pytest.fixture
def two(tmp_path, tiny):
    """An Alpaca csv of 60 examples and a jsonl of 40 chats, both of which give 3 of 4 to training."""
    sizes = {"train": 0.75, "validation": 0.125, "test": 0.125}
    return mixture(tiny("llama"), [
        Dataset(alpaca(tmp_path / "a.csv", 80, 1), weight=3, **sizes),
        {"path": chats(tmp_path / "b.jsonl", 40, 2), "weight": 1, **sizes},
    ])  # fmt: skip


def sources_of(ids):
    return Counter(one.partition(":")[0] for one in ids)


def test_an_alpaca_csv_and_a_jsonl_of_chats_are_mixed_by_weight(two, tmp_path):
    prepared = task_of(two).prepare()
    assert sources_of(prepared.ids["train"]) == {"0": 60, "1": 20}
    assert sources_of(prepared.ids["test"]) == {"0": 10, "1": 5}
    assert all(len(set(ids)) == len(ids) for ids in prepared.ids.values())
    note = f"mixed: {tmp_path}/a.csv 60 (75 %), {tmp_path}/b.jsonl 20 (25 %, of 30)."
    assert note in prepared.notes
    decoded = prepared.processor.decode(prepared.splits["train"][0]["input_ids"])
    assert decoded.startswith("<|user|> say") and decoded.endswith("<|end|>")


def test_the_mixture_is_the_same_again_and_follows_from_the_first_seed(two):
    first, again = (task_of(two).prepare() for _ in range(2))
    assert first.ids == again.ids and first.fingerprint == again.fingerprint
    other = task_of(apply_changes(two, ["datasets.1.weight=1.5"])).prepare()
    assert sources_of(other.ids["train"]) == {"0": 60, "1": 30}
    assert other.fingerprint != first.fingerprint
    assert task_of(apply_changes(two, ["datasets.0.seed=1"])).prepare().ids["train"] != first.ids["train"]


def test_a_smaller_dataset_is_repeated_with_all_exhausted(two):
    changes = ["stopping_strategy=all_exhausted", "datasets.0.weight=1"]
    prepared = task_of(apply_changes(two, changes)).prepare()
    counts = Counter(prepared.ids["train"])
    assert sources_of(prepared.ids["train"]) == {"0": 60, "1": 60}
    assert {count for one, count in counts.items() if one.startswith("0")} == {1}
    assert {count for one, count in counts.items() if one.startswith("1")} == {2}
    assert any("b.jsonl 60 (50 %, 30 of them repeatedly)" in note for note in prepared.notes)


@pytest.mark.parametrize(
    "counts, weights, strategy, expected",
    [
        ([300, 700], [None, None], "first_exhausted", [300, 700]),
        ([300, 700], [3, 1], "first_exhausted", [300, 100]),
        ([300, 700], [2, None], "first_exhausted", [300, 150]),
        ([100, 1000], [0.1, 0.9], "first_exhausted", [100, 900]),
        ([300, 100, 50], [1, 1, 2], "first_exhausted", [25, 25, 50]),
        ([300, 100], [1, 1], "all_exhausted", [300, 300]),
        ([10, 100], [3, 1], "all_exhausted", [300, 100]),
    ],
)
def test_each_dataset_gives_exactly_its_share(counts, weights, strategy, expected):
    assert shares(counts, weights, strategy) == expected


def test_an_example_in_the_train_split_of_one_and_the_test_split_of_another_is_left_out(two, tmp_path):
    entries = [{**vars(entry), "weight": None} for entry in two.datasets]
    copied = [{**entries[0], "seed": 7}, {**entries[0], "seed": 8}, entries[1]]
    prepared = task_of(mixture(two.model, copied)).prepare()
    texts = {name: {json.dumps(row["input_ids"]) for row in rows} for name, rows in prepared.splits.items()}
    assert not texts["train"] & texts["test"] and not texts["validation"] & texts["test"]
    assert any("also occur in a later split" in note for note in prepared.notes)


def test_a_recipe_keeps_its_datasets_through_yaml_and_set(two, tmp_path):
    two.to_yaml(tmp_path / "r.yaml")
    again = Recipe.from_yaml(tmp_path / "r.yaml")
    assert again == two and "\ndataset:" not in two.to_yaml()
    assert apply_changes(two, ["datasets.0.weight=2"]).datasets[0].weight == 2
    assert apply_changes(two, ["datasets.1=c.jsonl"]).datasets[1] == Dataset("c.jsonl")
    one = apply_changes(two, ["datasets=null", "dataset=c.jsonl"])
    assert one.datasets is None and one.dataset.path == "c.jsonl"


def test_plan_train_and_the_files_of_a_run_know_all_datasets(two, tmp_path):
    planned = plan(two)
    assert planned["dataset"] == f"{two.datasets[0].path} + {two.datasets[1].path}"
    assert planned["rows"]["train"] == 80 and planned["arms"]["lora"]["steps"] == 10
    run = train(two, "lora", output=tmp_path / "runs")
    assert run.data["rows"]["train"] == 80 and run.data["dataset"] == planned["dataset"]
    assert any(note.startswith("mixed: ") for note in run.data["notes"])
    assert Recipe.from_yaml(run.folder / "recipe.yaml").datasets == two.datasets
    assert "a.csv" in (run.folder / "README.md").read_text()


def test_answers_of_a_mixture_are_scored_against_the_columns_of_their_own_dataset(two):
    recipe = apply_changes(two, ["metric=exact_match"])
    prompts = task_of(recipe).prepare().prompts["test"]
    columns = {one["id"].partition(":")[0]: sorted(one["row"]) for one in prompts}
    assert columns == {"0": ["id", "input", "instruction", "output"], "1": ["id", "messages"]}


@pytest.mark.parametrize("task", ["dpo", "reward", "kto"])
def test_preference_tasks_mix_texts_and_chats(task, tmp_path, tiny):
    datasets = [pairs(tmp_path / "a.jsonl", 40, 1), pairs(tmp_path / "b.jsonl", 40, 2, chat=True)]
    prepared = task_of(mixture(tiny("llama"), datasets, task)).prepare()
    counts = sources_of(prepared.ids["train"])
    assert set(counts) == {"0", "1"} and counts["0"] == counts["1"] == (56 if task == "kto" else 28)


def test_seq2seq_and_language_modeling_mix_their_columns(tmp_path, tiny):
    texts = [text for text, _ in sentences(80)]
    a = jsonl(tmp_path / "a.jsonl", [{"input": text, "target": "good"} for text in texts[:40]])
    b = jsonl(tmp_path / "b.jsonl", [{"question": text, "reply": "bad"} for text in texts[40:]])
    datasets = [a, {"path": b, "prompt": "question", "completion": "reply"}]
    assert sources_of(task_of(mixture(tiny("t5"), datasets, "seq2seq")).prepare().ids["train"]) == {"0": 28, "1": 28}
    datasets = [{"path": a, "text": "input"}, {"path": b, "text": "question", "train": 7}]
    prepared = task_of(mixture(tiny("gpt2"), datasets, "language-modeling")).prepare()
    assert sources_of(prepared.ids["train"]) == {"0": 28, "1": 7}


def labelled(path, count, seed, names=("bad", "good"), header="text,label"):
    rows = [f"{text},{names[label == 'good']}" for text, label in sentences(count, seed)]
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def test_classifiers_mix_datasets_with_equal_labels_and_refuse_others(tmp_path, tiny):
    a = labelled(tmp_path / "a.csv", 40, 1)
    b = labelled(tmp_path / "b.csv", 40, 2, header="body,mood")
    c = labelled(tmp_path / "c.csv", 40, 3, names=("ham", "spam"))
    arms = {"full": Arm(learning_rate=1e-3)}
    made = mixture(
        tiny("distilbert"), [a, {"path": b, "text": "body", "label": "mood"}], "text-classification", arms=arms
    )
    prepared = task_of(made).prepare()
    assert prepared.labels == ["bad", "good"] and sources_of(prepared.ids["train"]) == {"0": 28, "1": 28}
    made = mixture(tiny("distilbert"), [a, c], "text-classification", arms=arms)
    with pytest.raises(RecipeError, match=r"labels of .*a\.csv' are bad, good, those of .*c\.csv' ham, spam"):
        task_of(made).prepare()


def test_examples_of_different_kinds_are_not_mixed(two, tmp_path):
    plain = jsonl(tmp_path / "plain.jsonl", [{"text": text} for text, _ in sentences(40)])
    with pytest.raises(RecipeError, match=r"examples of completion and prompt, '.*plain\.jsonl' of text"):
        task_of(mixture(two.model, [two.datasets[0], plain])).prepare()


def test_datasets_with_tools_and_weights_are_mixed_with_others(two, tmp_path):
    chat = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "good", "weight": 0},
            {"role": "user", "content": "say"}, {"role": "assistant", "content": "sweet"}]  # fmt: skip
    rows = [{"messages": [*chat[:3], {**chat[3], "content": text}]} for text, _ in sentences(40, 9)]
    weighted = jsonl(tmp_path / "weighted.jsonl", rows)
    task = task_of(mixture(two.model, [two.datasets[0].path, weighted, two.datasets[1].path]))
    prepared = task.prepare()
    assert sources_of(prepared.ids["train"]) == {"0": 56, "1": 28, "2": 28}
    for number in range(3):
        index = next(i for i, one in enumerate(prepared.ids["train"]) if one.startswith(f"{number}:"))
        row = prepared.splits["train"][index]
        labelled = prepared.processor.decode([one for one in row["labels"] if one != -100])
        assert labelled.endswith("<|end|>") and "<|user|>" not in labelled and len(labelled.split()) > 3


def test_rows_that_cannot_be_used_are_counted_for_each_dataset(two, tmp_path):
    for path, name in ((two.datasets[0].path, "a.csv"), (two.datasets[1].path, "b.jsonl")):
        bad = {"messages": [{"role": "user", "content": "say"}]}
        line = "say,a film," if name == "a.csv" else json.dumps(bad)
        with open(path, "a") as file:
            file.write(line + "\n")
    prepared = task_of(mixture(two.model, [two.datasets[0].path, two.datasets[1].path])).prepare()
    notes = [note for note in prepared.notes if "left out" in note]
    assert any(f"{tmp_path}/a.csv: 1 " in note and "an empty answer (0:train-80)" in note for note in notes)
    assert any(f"{tmp_path}/b.jsonl: 1 " in note and "(1:train-40)" in note for note in notes)


def test_a_further_evaluation_set_follows_from_the_dataset_of_its_path_or_the_first(two, tmp_path):
    other = alpaca(tmp_path / "other.csv", 20, 9)
    sets = {"own": {"path": two.datasets[1].path, "seed": 42}, "other": {"path": other, "test": 12}}
    task = task_of(mixture(two.model, two.datasets, evaluate_also=sets))
    prepared = task.prepare()
    assert prepared.rows["own"] == 5 and prepared.rows["other"] == 12
    assert sources_of(prepared.ids["train"]) == {"0": 60, "1": 20}


def test_embedded_replaces_all_datasets(two):
    stood_in = mixture(two.model, two.datasets, embedded={"dataset": {"path": "embedded:docstring-questions"}})
    changed = stood_in.with_changes(stood_in.embedded)
    assert changed.datasets is None and changed.dataset.path == "embedded:docstring-questions"
    assert changed.uses_stand_ins and not stood_in.uses_stand_ins


def test_a_mixture_with_local_data_counts_as_local_where_it_is_published(two):
    from peft_recipes.cards.redaction import is_local_path, portable

    assert is_local_path(two.data_name) and is_local_path(f"org/data + {two.datasets[1].path}")
    assert not is_local_path("org/data + embedded:docstring-names")
    assert portable({"dataset": f"org/data + {two.datasets[1].path}"}) == {"dataset": "org/data + ./b.jsonl"}
    paths = [entry["path"] for entry in portable(two.to_dict())["datasets"]]
    assert paths == ["./a.csv", "./b.jsonl"]


def test_a_wrong_column_names_the_dataset_and_its_option(two):
    recipe = apply_changes(two, ["datasets.1.prompt=questions"])
    with pytest.raises(RecipeError, match=r"datasets\.1: .* --set datasets\.1\.prompt=COLUMN"):
        task_of(recipe).prepare()


@pytest.mark.parametrize(
    "datasets, message",
    [
        ([], "datasets: an empty list"),
        ("a.csv", "datasets: expected a list of datasets, got str"),
        ([{"path": "a.csv", "wieght": 2}], "Unknown key 'wieght' in datasets.0. Did you mean 'weight'"),
        ([{"path": "a.csv", "weight": 0}], "datasets.0.weight: expected a number above 0, got 0."),
        (["a.csv", {"path": "b.csv", "weight": -1}], "datasets.1.weight: expected a number above 0"),
        (["a.csv", {"path": "b.csv", "weight": "much"}], "datasets.1.weight: expected a number or null"),
        (["a.csv", {"weight": 1}], "Missing key 'path' in datasets.1"),
        (["a.csv", 3], "datasets.1: expected a mapping, got int"),
        (["a.csv", {"path": "b.csv", "pretrain": 5}], "datasets.1.pretrain: for a recipe with one dataset"),
    ],
)
def test_a_wrong_entry_is_one_line(datasets, message):
    with pytest.raises(RecipeError) as raised:
        mixture("org/model", datasets)
    assert len(raised.value.problems) == 1 and message in str(raised.value)
    plain = {**mixture("org/model", ["a.csv"]).to_dict(), "datasets": datasets}
    with pytest.raises(RecipeError) as raised:
        Recipe.from_dict(plain)
    assert len(raised.value.problems) == 1 and message in str(raised.value)


def test_dataset_and_datasets_together_are_refused():
    with pytest.raises(RecipeError, match="dataset and datasets: a recipe has one of them"):
        mixture("org/model", ["a.csv"], dataset=Dataset("b.csv"))
    with pytest.raises(RecipeError, match="dataset and datasets: a recipe has one of them"):
        apply_changes(mixture("org/model", ["a.csv"]), ["dataset=b.csv"])
    with pytest.raises(RecipeError, match=r"dataset\.weight: the share of a dataset among several"):
        mixture("org/model", None, dataset=Dataset("b.csv", weight=2))
    with pytest.raises(RecipeError, match="Unknown position '2' in datasets"):
        apply_changes(mixture("org/model", ["a.csv"]), ["datasets.2.weight=1"])
    with pytest.raises(RecipeError, match=r"datasets\.1\.chat_template: 'chatml', and datasets\.0 has None"):
        mixture("org/model", ["a.csv", {"path": "b.csv", "chat_template": "chatml"}])
    with pytest.raises(RecipeError, match=r"Unknown stopping_strategy 'all_exhaust'\. Did you mean 'all_exhausted'"):
        mixture("org/model", ["a.csv"], stopping_strategy="all_exhaust")
