"""`peft-recipes new`: what is chosen for people's own files, and that each recipe plans and trains."""

from __future__ import annotations

import json

import pytest
import transformers
from few_steps import logged
from own_files import FILES
from small import sentences
from tagged import tagged, written
from typer.testing import CliRunner

from peft_recipes import load_recipe
from peft_recipes.cli.app import app
from peft_recipes.planning import memory as planned
from peft_recipes.recipe.script_header import extras, script_header


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A tiny image model with its processor."""
    folder = tmp_path_factory.mktemp("tiny-vit")
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                                    image_size=32, patch_size=8)  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def base(tiny, vit, tmp_path, monkeypatch):
    """base(kind) -> its path from the current folder, an empty one."""
    monkeypatch.chdir(tmp_path)

    def linked(kind: str) -> str:
        if not (tmp_path / f"tiny-{kind}").exists():
            (tmp_path / f"tiny-{kind}").symlink_to(vit if kind == "vit" else tiny(kind))
        return f"./tiny-{kind}"

    return linked


def run(*words: str):
    shown = CliRunner().invoke(app, list(words), terminal_width=200)
    if shown.exception is not None and not isinstance(shown.exception, SystemExit):
        raise shown.exception
    return shown


@pytest.mark.parametrize("name", FILES)
def test_each_file_gets_a_recipe_that_plans_and_trains(name, base, tmp_path, monkeypatch):
    kind, write, task, flags = FILES[name]
    data = write(tmp_path).relative_to(tmp_path)
    shown = run("new", "--model", base(kind), "--dataset", str(data), "--output", "mine.py", *flags)
    assert shown.exit_code == 0, shown.output + shown.stderr
    recipe = load_recipe("mine.py")
    assert (tmp_path / "mine.py").read_text("utf-8").startswith(script_header(extras(recipe)))
    assert recipe.task == task and "full" in recipe.arms and "lora" in recipe.arms
    if name != "prompts":  # the others take the bound on a step's memory, which is faster than its simulation
        monkeypatch.setattr(planned, "arm_step_memory", lambda *args: 1 / 0)
    planned_recipe = run("plan", "mine.py")
    assert planned_recipe.exit_code == 0 and "lora trains" in planned_recipe.output
    losses = logged(recipe.with_changes({"training": {"use_cpu": True, "bf16": False}}), tmp_path / "out")
    assert len(losses) == 3


def rows_of(path, *rows: dict):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def drafted(kind: str, data: str, base, *flags: str):
    shown = run("new", "--model", base(kind), "--dataset", data, "--output", "mine.py", *flags)
    assert shown.exit_code == 0, shown.output + shown.stderr
    return load_recipe("mine.py"), shown.output


def refused(kind: str, data: str, base, *flags: str) -> str:
    shown = run("new", "--model", base(kind), "--dataset", data, "--output", "mine.py", *flags)
    assert shown.exit_code == 2, shown.output
    assert shown.stderr.count("\n") == 1 and shown.stderr.startswith("Error: ")
    return shown.stderr


def test_decimals_are_a_regression_and_lists_several_labels(base, tmp_path):
    texts = [text for text, _ in sentences(40)]
    data = rows_of(tmp_path / "a.jsonl", *({"text": text, "score": i / 7} for i, text in enumerate(texts)))
    recipe, _ = drafted("distilbert", data, base)
    assert recipe.dataset.problem_type == "regression" and recipe.metric == "pearson"
    lists = rows_of(
        tmp_path / "b.jsonl", *({"text": t, "tags": ["a", "b", "c"][: i % 3 + 1]} for i, t in enumerate(texts))
    )
    shown = run("new", "--model", "./tiny-distilbert", "--dataset", lists, "--label", "tags", "--output", "b.py")
    assert shown.exit_code == 0, shown.stderr
    assert load_recipe("b.py").dataset.problem_type == "multi_label_classification"


def test_one_class_that_is_most_rows_is_compared_by_macro_f1(base, tmp_path):
    data = rows_of(tmp_path / "a.jsonl", *({"sms": t, "label": "spam" if i % 8 == 0 else "ham"}
                                           for i, (t, _) in enumerate(sentences(80))))  # fmt: skip
    recipe, output = drafted("distilbert", data, base)
    assert recipe.metric == "macro_f1" and "88 % of the rows are of one class" in output


def test_tags_pairs_of_texts_and_verdicts_find_their_tasks(base, tmp_path):
    data = written(tmp_path / "a.jsonl", tagged(40)).name
    recipe, _ = drafted("distilbert", data, base)
    assert (recipe.task, recipe.dataset.label) == ("token-classification", "ner_tags")
    rows = [{"prompt": f"say {i}", "completion": t, "label": i % 2 == 0} for i, (t, _) in enumerate(sentences(40))]
    kto = rows_of(tmp_path / "k.jsonl", *rows)
    assert drafted("llama", kto, base, "--overwrite")[0].task == "kto"
    summaries = rows_of(tmp_path / "s.jsonl", *({"text": t, "summary": t[:9]} for t, _ in sentences(40)))
    recipe, _ = drafted("t5", summaries, base, "--overwrite")
    assert (recipe.task, recipe.dataset.prompt, recipe.dataset.completion) == ("seq2seq", "text", "summary")


def test_flags_overrule_and_other_settings_are_written(base, tmp_path):
    data = FILES["prompts"][1](tmp_path).name
    recipe, _ = drafted("llama", data, base, "--max-length", "32", "--batch-size", "2", "--ranks", "4,8",
                        "--set", "training.num_train_epochs=5", "--set", "threads=1")  # fmt: skip
    assert (recipe.max_length, recipe.threads, recipe.training["num_train_epochs"]) == (32, 1, 5)
    assert recipe.training["per_device_train_batch_size"] == 2
    assert [arm.peft.r for name, arm in recipe.arms.items() if name != "full"] == [4, 8]


def test_what_the_data_needs_can_be_set(base, tmp_path):
    turns = [{"role": role, "content": "a film"} for role in ("user", "assistant", "user", "assistant")]
    data = rows_of(tmp_path / "a.jsonl", *({"messages": [*turns[:3], {"role": "assistant", "content": f"{i} {t}"}]}
                                           for i, (t, _) in enumerate(sentences(40))))  # fmt: skip
    assert "--set dataset.chat_template=chatml" in refused("gpt2", data, base)
    recipe, _ = drafted("gpt2", data, base, "--set", "dataset.chat_template=chatml")
    assert recipe.dataset.chat_template == "chatml" and "# as asked" in (tmp_path / "mine.py").read_text()


def test_max_length_is_the_95th_percentile_rounded_up_and_at_most_the_positions(base, tmp_path):
    texts = [" ".join(["film"] * (10 if i else 50)) + f" {i}" for i in range(60)]
    data = rows_of(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    recipe, output = drafted("gpt2", data, base)
    assert (recipe.max_length == 16 and "1 of 43 examples are longer" in output) or "no example is longer" in output
    long = rows_of(tmp_path / "b.jsonl", *({"text": f"{'film ' * 200}{i}"} for i in range(40)))
    recipe, output = drafted("gpt2", long, base, "--overwrite")
    assert recipe.max_length == 64 and "all positions of the base" in output


def test_what_cannot_be_decided_names_the_flag(base, tmp_path):
    texts = [text for text, _ in sentences(40)]
    two = rows_of(tmp_path / "a.jsonl", *({"alpha": t, "beta": t[::-1], "label": i % 2} for i, t in enumerate(texts)))
    assert "--text COLUMN, or two for a pair: --text alpha,beta" in refused("distilbert", two, base)
    both = rows_of(
        tmp_path / "b.jsonl", *({"question": f"{t}?", "answer": t, "label": i % 3} for i, t in enumerate(texts))
    )
    assert "--task sft for the answers, --task text-classification for the labels" in refused("llama", both, base)
    odd = rows_of(tmp_path / "c.jsonl", *({"alpha": t, "beta": t[::-1]} for t in texts))
    assert "--task sft --prompt COLUMN --completion COLUMN" in run(
        "new", "--model", "./tiny-llama", "--dataset", odd).stderr  # fmt: skip
    few = rows_of(tmp_path / "d.jsonl", {"text": "a film"}, {"text": "a day"})
    assert "has 2 rows: 4 are the fewest" in run("new", "--model", "./tiny-llama", "--dataset", few).stderr


def test_a_base_that_cannot_learn_the_data_is_refused(base, tmp_path):
    pairs = FILES["preferences"][1](tmp_path).name
    assert "dpo needs a base that is a causal language model" in refused("distilbert", pairs, base)
    text = FILES["plain"][1](tmp_path).name
    assert "is an image model, and dataset" in refused("vit", text, base)
    FILES["images"][1](tmp_path)
    assert "image-classification needs a base that is an image model" in refused("gpt2", "photos", base)


def test_typos_name_the_nearest_and_files_are_kept(base, tmp_path):
    data = FILES["reviews"][1](tmp_path).name
    assert "Did you mean 'review'?" in refused("distilbert", data, base, "--text", "reviw")
    model = ["new", "--model", "./tiny-distilbert", "--dataset", data]
    assert "Did you mean 'text-classification'?" in run(*model, "--task", "text-clasification").stderr
    assert run(*model, "--output", "mine.py").exit_code == 0
    before = (tmp_path / "mine.py").read_text()
    again = run(*model, "--output", "mine.py")
    assert again.exit_code == 2 and "--overwrite" in again.stderr and (tmp_path / "mine.py").read_text() == before
    assert run("new", "--model", "./tiny-distilbert").stderr.startswith("Error: Name --dataset")
    assert "ends with .py" in run(*model, "--output", "mine.yaml").stderr
    assert not [path.name for path in tmp_path.glob(".*")]


def test_stand_ins_are_added_for_embedded_runs(base, tmp_path):
    data = FILES["reviews"][1](tmp_path).name
    recipe, _ = drafted("distilbert", data, base, "--embedded")
    stood_in = load_recipe("mine.py", embedded=True)
    assert stood_in.dataset.path == "embedded:docstring-topics" and stood_in.dataset.text == "text"
    assert recipe.dataset.text == "review" and stood_in.uses_stand_ins and not recipe.uses_stand_ins


def test_an_arm_that_does_not_fit_is_left_out_with_the_reason(base, tmp_path, monkeypatch):
    from peft_recipes.hardware import environment
    from peft_recipes.planning import step_memory

    data = FILES["prompts"][1](tmp_path).name
    monkeypatch.setattr(step_memory, "loaded_libraries_bytes", lambda: 0)
    monkeypatch.setattr(environment, "device_memory_bytes", lambda device: 330_000)
    recipe, output = drafted("llama", data, base, "--batch-size", "2")
    assert list(recipe.arms) == ["lora"] and "no arm full: it needs about" in output
    monkeypatch.setattr(environment, "device_memory_bytes", lambda device: 10_000)
    assert "does not fit: even LoRA on a base in 4 bits" in run(
        "new", "--model", "./tiny-llama", "--dataset", data, "--output", "small.py").stderr  # fmt: skip


def test_json_is_the_recipe_with_its_reasons(base, tmp_path):
    data = FILES["plain"][1](tmp_path).name
    shown = run("new", "--model", base("gpt2"), "--dataset", data, "--json")
    made = json.loads(shown.stdout)
    assert made["path"] == "tiny_gpt2_plain.py" and made["recipe"]["task"] == "language-modeling"
    assert made["next"][0] == "peft-recipes data tiny_gpt2_plain.py" and "max_length" in made["why"]
