"""Benchmarks: lm_eval on the model in memory equals lm_eval's own command on the saved folder, example by example."""

from __future__ import annotations

import json
import subprocess

import pandas
import pytest
from benchmark_files import choices
from small import compared_here
from typer.testing import CliRunner
from warm_python import warm

from peft_recipes import RecipeError, plan, train
from peft_recipes.cli.app import app
from peft_recipes.reporting.sentences import forgetting
from peft_recipes.scoring import benchmark_tasks, benchmarks
from peft_recipes.training import stages


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A multiple choice task of 24 questions, with its data beside it."""
    return choices(tmp_path_factory.mktemp("benchmark"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("compared")


@pytest.fixture
def comparison(instruct, words, kept):
    """Full and lora, one seed, with the benchmark; trained once."""
    return compared_here(instruct(benchmarks=[str(words)], benchmark_examples=20), ["full", "lora"], [0], kept)


def rows(folder) -> pandas.DataFrame:
    """The benchmark's rows in a run's predictions."""
    table = pandas.read_parquet(folder / "predictions.parquet")
    return table[table["split"] == "words"].reset_index(drop=True)


def test_the_values_are_those_of_lm_eval_on_the_saved_folder(comparison, words, tiny, tmp_path):
    models = {
        "full": f"pretrained={comparison.folder / 'full' / 'seed-0'}",
        "lora": f"pretrained={tiny('llama')},peft={comparison.folder / 'lora' / 'seed-0'}",
    }
    common = ["lm_eval", "--model", "hf", "--tasks", str(words), "--limit", "20", "--device", "cpu", "--log_samples"]
    asked = [[*common, "--model_args", model, "--output_path", str(tmp_path / arm)] for arm, model in models.items()]
    code = (  # without the standard error of the Brier score, from 100,000 resamples
        "import runpy, sys\nfrom lm_eval.api import metrics\nmetrics.bootstrap_stderr = lambda *_: 0.0\n"
        f"for sys.argv in {asked!r}:\n    runpy.run_module('lm_eval', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run(warm("-c", code), cwd=words.parent, capture_output=True, text=True)  # beside the data
    assert done.returncode == 0, done.stderr[-2000:]
    for arm in models:
        (samples,) = (tmp_path / arm).rglob("samples_*.jsonl")
        theirs = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        ours = rows(comparison.folder / arm / "seed-0")
        assert ours["id"].tolist() == [str(row["doc_id"]) for row in theirs]
        assert ours["acc"].tolist() == [row["acc"] for row in theirs]
        (file,) = (tmp_path / arm).rglob("results_*.json")
        total = json.loads(file.read_text())["results"]["words"]
        metrics = comparison.data["arms"][arm]["metrics"]["words"]
        for metric in ("acc", "acc_norm"):
            assert metrics[metric] == pytest.approx(total[f"{metric},none"], abs=1e-12)
        assert metrics["brier_score"] == pytest.approx(total["brier_score,none"], abs=1e-5)  # of probabilities


def test_each_run_is_compared_with_the_base_by_example(comparison):
    entry = comparison.data["forgetting"]["words"]
    assert (entry["metric"], entry["higher_is_better"], entry["margin"]) == ("acc", True, 0.01)
    base = rows(comparison.folder / "base" / "seed-0")["acc"]
    for arm, change in entry["arms"].items():
        after = rows(comparison.folder / arm / "seed-0")["acc"]
        assert change["estimate"] == pytest.approx((after - base).mean())
        assert change["ci95"][0] <= change["estimate"] <= change["ci95"][1]
        assert change["examples"] == 20
    facts = json.loads((comparison.folder / "lora" / "seed-0" / "run.json").read_text())["benchmarks"]["words"]
    assert facts["metric"] == "acc" and facts["examples"] == 20 and facts["tasks"] == ["words"]


def test_it_is_in_the_table_the_text_and_the_plot(comparison):
    assert "Words accuracy" in comparison.table()
    (line,) = forgetting(comparison.data)
    assert line.startswith("Words accuracy before tuning") and line.count("95 % interval") == 2 and "points" in line
    assert (comparison.folder / "plots" / "forgetting.png").is_file()


GENERATED = """\
task: say
dataset_path: json
dataset_kwargs: {data_files: {test: data/words.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["film"], max_gen_toks: 4}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def test_answers_are_generated_and_a_metric_that_is_no_mean_has_pseudo_values(words, tiny):
    import transformers

    folder = words.parent
    (folder / "say.yaml").write_text(GENERATED)
    (folder / "brier.yaml").write_text(
        words.read_text().replace("task: words", "task: brier").replace("- {metric: acc", "#")
    )
    tasks = benchmark_tasks.load([str(folder / "say.yaml"), str(folder / "brier.yaml")])
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("llama"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny("llama"))
    said = benchmarks.run_benchmark(model, tokenizer, tasks["say"], 5)
    assert said.facts["metric"] == "exact_match" and set(said.predictions["exact_match"]) <= {0.0, 1.0}
    brier = benchmarks.run_benchmark(model, tokenizer, tasks["brier"])
    assert brier.facts["metric"] == "brier_score" and not brier.facts["higher_is_better"] and not brier.facts["share"]
    values = brier.predictions["brier_score"]
    assert sum(values) / len(values) == pytest.approx(brier.metrics["brier_score"])


@pytest.mark.parametrize(
    ("benchmark", "message"),
    [
        ("hellaswg", "Unknown benchmark 'hellaswg'. Did you mean 'hellaswag'?"),
        ("wrods.yaml", "there is no file wrods.yaml. Did you mean 'words.yaml'?"),
        ("none.yaml", "names the data file data/gone.jsonl, which is not beside it"),
        ("prose.yaml", "prose.yaml is no lm_eval task"),
        ("words.yaml,other/words.yaml", "'words' is there 2 times"),
        ("embedded:docstring-choice", "Did you mean 'embedded:docstring-choices'"),
    ],
)
def test_a_wrong_benchmark_is_one_message_before_anything_is_written(
    instruct, words, tmp_path, monkeypatch, benchmark, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.yaml").write_text(words.read_text())
    (tmp_path / "none.yaml").write_text(words.read_text().replace("data/words", "data/gone"))
    (tmp_path / "prose.yaml").write_text("name: prose\n")
    instruct().to_yaml(tmp_path / "recipe.yaml")
    for command in (["plan"], ["compare"], ["train", "--arm", "lora"]):
        result = CliRunner().invoke(app, [*command[:1], "recipe.yaml", *command[1:], "--benchmarks", benchmark])
        assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.stderr
        assert result.stdout == "" and not (tmp_path / "adapters").exists()


def test_a_plan_says_which_benchmarks_a_run_is_evaluated_on(instruct, words):
    notes = plan(instruct(benchmarks=[str(words)]), ["lora"])["notes"]
    assert any("benchmarks: words, on at most 200 examples of each" in note for note in notes)


def test_a_benchmark_that_fails_is_a_failed_check_of_a_run_that_is_kept(instruct, words, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no values")

    monkeypatch.setattr(stages, "run_benchmark", fail)
    run = train(instruct(benchmarks=[str(words)]), "lora", output=tmp_path)
    assert run.ok and run.failed_checks == {"benchmark words": "no values"}
    assert "words" not in run.metrics and "test" in run.metrics


def test_without_lm_eval_the_message_is_the_command_that_installs_it(instruct, monkeypatch):
    monkeypatch.setattr(benchmark_tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"lm_eval is not installed.*pip install 'peft_recipes\[benchmarks\]'"):
        benchmark_tasks.check(["hellaswag"])


def test_benchmarks_are_for_causal_models(classify):
    with pytest.raises(RecipeError, match="benchmarks: they are for language models"):
        classify(benchmarks=["hellaswag"])


def test_a_group_of_local_tasks_finds_their_data_beside_them(tmp_path, monkeypatch):
    for name in ("words", "more"):
        choices(tmp_path / "tasks", name)
    (tmp_path / "tasks" / "both.yaml").write_text("group: both\ntask: [words, more]\n")
    monkeypatch.chdir(tmp_path)
    (tasks,) = benchmark_tasks.load(["tasks/both.yaml"]).values()
    assert sorted(len(task.eval_docs) for task in tasks) == [24, 24]


def test_an_edited_file_that_a_task_includes_is_another_benchmark(tmp_path):
    file = choices(tmp_path)
    (tmp_path / "base.yaml").write_text("doc_to_text: A\n")
    before = benchmark_tasks.fingerprint([str(file)])
    (tmp_path / "base.yaml").write_text("doc_to_text: B\n")
    assert benchmark_tasks.fingerprint([str(file)]) != before


@pytest.mark.parametrize("files", ["5", "{test: [5]}"])
def test_data_files_that_are_no_names_are_an_error(tmp_path, files):
    file = choices(tmp_path)
    file.write_text(file.read_text().replace("{test: data/words.jsonl}", files))
    with pytest.raises(RecipeError, match="data_files must be names of files"):
        benchmark_tasks.load([str(file)])
