"""Win rates: the arms' answers compared with full's by a judge behind an endpoint and by a local one."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pandas
import pytest
import workspace
from judge_server import JudgeServer, later
from typer.testing import CliRunner

import peft_recipes.comparison.compare as comparing
from peft_recipes import RecipeError, compare, plan, train
from peft_recipes.cli.app import app
from peft_recipes.comparison import adapter_checks
from peft_recipes.comparison.judging import judge_runs
from peft_recipes.errors import JudgeError
from peft_recipes.recipe.judge import Judge
from peft_recipes.runs.folder import Run
from peft_recipes.scoring import judges

ANSWERS = {  # of each run; the judge prefers the longer answer
    ("full", 0): ["film", "film", "film", "film"],
    ("full", 1): ["film", "film", "film", "film"],
    ("lora", 0): ["a longer film", "day", "film", "saw"],  # won, lost, equal, lost
    ("lora", 1): ["a longer film", "a day", "week", "saw"],  # won, won, tie, lost
    ("base", 0): ["", "", "", ""],
}
WIN_RATES = {("lora", 0): 1.5 / 4, ("lora", 1): 2.5 / 4, ("base", 0): 0.0, ("full", 0): 0.5, ("full", 1): 0.5}


@pytest.fixture
def server():
    with JudgeServer() as running:
        yield running


@pytest.fixture
def judged(instruct, server):
    """A recipe whose answers the server judges."""
    return instruct(metric="preference", judge=Judge("a-judge", server.url))


@pytest.fixture
def answered(tmp_path):
    """Finished runs with ANSWERS to four prompts; a fifth test example was not answered."""
    runs = {}
    for (arm, seed), answers in ANSWERS.items():
        folder = tmp_path / arm / f"seed-{seed}"
        folder.mkdir(parents=True)
        table = {"split": "test", "id": range(10, 15), "prompt": [*(f"say {i}" for i in range(4)), None],
                 "answer": [*answers, None], "loss": 1.0}  # fmt: skip
        pandas.DataFrame(table).to_parquet(folder / "predictions.parquet")
        runs[arm, seed] = Run(folder, {"status": "ok", "arm": arm, "seed": seed, "metrics": {"test": {"loss": 1.0}}})
    return runs


def without_base(runs):
    return {job: run for job, run in runs.items() if job[0] != "base"}


def test_each_arm_and_the_base_are_compared_with_full_of_the_same_seed(judged, answered, server, tmp_path):
    found = judge_runs(judged, without_base(answered), answered["base", 0], tmp_path)
    for job, run in answered.items():
        assert run.metrics["test"]["preference"] == WIN_RATES[job], job
        assert json.loads((run.folder / "run.json").read_text())["metrics"] == run.metrics
        table = pandas.read_parquet(run.folder / "preferences.parquet")
        assert list(table["id"]) == [10, 11, 12, 13] and table["preference"].mean() == WIN_RATES[job]
    lora = found["arms"]["lora"]
    assert (lora["wins"], lora["ties"], lora["losses"], lora["identical"], lora["pairs"]) == (3, 2, 3, 1, 8)
    assert found["arms"]["base"]["losses"] == 4 and found["first_position_share"] == 0.5
    asked = {question for question in server.questions if "a longer film" in question}
    assert len(asked) == 2 == len(set(server.questions) & asked)  # both orders, though two seeds gave that answer


def test_a_judge_that_prefers_a_position_contradicts_itself(judged, answered, server, tmp_path):
    server.rule = lambda first, second: "A"
    found = judge_runs(judged, without_base(answered), answered["base", 0], tmp_path)
    assert found["first_position_share"] == 1.0 and found["total"]["contradictions"] == found["total"]["pairs"] - 1
    assert answered["lora", 0].metrics["test"]["preference"] == answered["base", 0].metrics["test"]["preference"] == 0.5


def test_replies_that_are_no_decision_are_counted_as_ties(judged, answered, server, tmp_path):
    server.rule = lambda first, second: "It depends."
    found = judge_runs(judged, without_base(answered), answered["base", 0], tmp_path)
    assert found["first_position_share"] is None
    assert found["total"]["invalid"] == 2 * found["total"]["unreadable"] == 2 * (found["total"]["pairs"] - 1)


def test_a_second_call_asks_only_what_is_new(judged, answered, server, tmp_path):
    runs, base = without_base(answered), answered["base", 0]
    first = judge_runs(judged, runs, base, tmp_path)
    asked = len(server.questions)
    assert judge_runs(judged, runs, base, tmp_path) == first and len(server.questions) == asked
    own = replace(judged, judge=replace(judged.judge, template="{prompt}? {first} or {second}"))
    judge_runs(own, runs, base, tmp_path)
    assert len(server.questions) == 2 * asked and server.questions[-1].startswith("say ")


def test_a_judge_that_fails_midway_leaves_its_replies(judged, answered, server, tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "RETRIES", 0)
    judged = replace(judged, judge=replace(judged.judge, concurrency=1))
    runs, base = without_base(answered), answered["base", 0]
    reply, given = JudgeServer.reply, []

    def three_replies(self, request):
        if len(given) == 3:
            self.failures = [503]
        given.append(reply(self, request))
        return given[-1]

    monkeypatch.setattr(JudgeServer, "reply", three_replies)
    words = r"503.*The runs are kept, and (\d) of 18 replies: call again to ask the others"
    with pytest.raises(JudgeError, match=words) as raised:
        judge_runs(judged, runs, base, tmp_path)
    kept = int(re.search(words, str(raised.value))[1])
    server.questions.clear()
    assert kept >= 3
    assert judge_runs(judged, runs, base, tmp_path)["total"]["pairs"] == 12 and len(server.questions) == 18 - kept


def test_without_full_of_its_seed_a_run_has_no_win_rate(judged, answered, tmp_path):
    answered["full", 1].data["status"] = "failed"
    answered["lora", 1].data["metrics"]["test"]["preference"] = 0.9  # of an earlier comparison
    found = judge_runs(judged, without_base(answered), answered["base", 0], tmp_path)
    assert found["arms"]["lora"]["pairs"] == 4
    assert "preference" not in answered["lora", 1].metrics["test"]
    assert not (answered["lora", 1].folder / "preferences.parquet").exists()


def test_a_recipe_without_a_judge_asks_nobody(instruct, answered, tmp_path):
    assert judge_runs(instruct(), without_base(answered), answered["base", 0], tmp_path) is None
    assert not (tmp_path / "judgements.jsonl").exists()


# --- whole comparisons ------------------------------------------------------------------------------------------------

KEY = "a-key-that-no-file-holds"


@pytest.fixture(scope="module")
def here():
    """Comparisons train their runs in this process: tests/comparison/test_comparison.py has real ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "executor_of", workspace.ThisProcess)
        patch.setattr(adapter_checks, "check_in_fresh_process", lambda runs, trust_remote_code: None)
        patch.setenv("JUDGE_KEY", KEY)
        yield patch


@pytest.fixture(scope="module")
def compared(here, instruct, tmp_path_factory):
    """A judged comparison, the server that judged it, its recipe and its output folder."""
    output = tmp_path_factory.mktemp("compared")
    with JudgeServer(later, KEY) as server:
        judge = Judge("a-judge", server.url, api_key_env="JUDGE_KEY")
        recipe = apart(instruct(metric="preference", judge=judge))
        yield compare(recipe, ["full", "lora"], output=output), server, recipe, output


def apart(recipe):
    """The recipe with a learning rate at which full fine-tuning's answers become others than LoRA's."""
    return recipe.with_changes({"arms": {"full": {"learning_rate": 5e-2}}})


def answers(folder):
    table = pandas.read_parquet(folder / "predictions.parquet")
    return table[table["split"] == "test"]["answer"].tolist()


def test_a_comparison_is_decided_by_the_win_rate(compared):
    made, _, _, _ = compared
    data = made.data
    pairs = list(zip(answers(made.folder / "lora/seed-0"), answers(made.folder / "full/seed-0"), strict=True))
    scores = [0.5 + 0.5 * ((own > full) - (own < full)) for own, full in pairs]
    win_rate = sum(scores) / len(scores)
    assert data["metric"] == "preference" and data["higher_is_better"] and data["margin"] == 0.01
    assert data["arms"]["full"]["metric"]["mean"] == 0.5
    assert data["arms"]["lora"]["metric"]["mean"] == pytest.approx(win_rate)
    difference = data["differences"]["lora"]
    low, high = difference["ci95"]
    assert difference["estimate"] == pytest.approx(win_rate - 0.5) and -0.5 <= low <= win_rate - 0.5 <= high <= 0.5
    assert data["arms"]["lora"]["metrics"]["test"]["loss"] > 0  # stays next to it
    assert 0 <= data["base"]["metrics"]["test"]["preference"] <= 1


def test_the_reports_name_the_judge_its_bias_and_the_reasons_of_ties(compared):
    made, _, _, _ = compared
    lora = made.data["judge"]["arms"]["lora"]
    assert lora["identical"] < lora["pairs"] == 8
    for name in ("comparison.md", "comparison.html"):
        text = (made.folder / name).read_text()
        assert "judged by a-judge at an endpoint, each pair in both orders" in text.lower().replace("\\", "")
        assert f"{lora['wins']} win" in text and "no position bias" in text and "win rate against full" in text
    assert "of the comparisons with full" in made.verdict("lora")


def test_the_key_is_in_no_file(compared):
    _, server, _, output = compared
    assert all(headers["authorization"] == f"Bearer {KEY}" for headers in server.headers)
    assert not [path for path in output.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_rerun_asks_nothing_again(compared):
    made, server, recipe, output = compared
    before = len(server.requests)
    again = compare(recipe, ["full", "lora"], output=output)
    assert len(server.requests) == before and again.data["judge"] == made.data["judge"]


def test_an_endpoint_that_is_gone_ends_the_command_with_one_line_and_the_next_call_goes_on(compared, tmp_path):
    _, server, recipe, output = compared
    shutil.copytree(output, tmp_path / "out")
    (tmp_path / "out" / recipe.name / "judgements.jsonl").unlink()
    recipe.to_yaml(tmp_path / "mine.yaml")
    command = ["compare", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "out")]
    server.failures = [404]
    failed = CliRunner().invoke(app, command)
    last = failed.stderr.strip().splitlines()[-1]
    assert failed.exit_code == 1 and last.startswith("Error: The judge 'a-judge' at ") and "are kept" in last
    server.failures = []
    assert CliRunner().invoke(app, command).exit_code == 0


def test_a_local_judge_needs_no_server(here, instruct, tiny, tmp_path):
    judge = Judge(str(tiny("gpt2")), template="{prompt} {first} {second} say", max_new_tokens=2)
    made = compare(apart(instruct(metric="preference", judge=judge)), ["full", "lora"], output=tmp_path)
    total = made.data["judge"]["total"]
    asked = total["pairs"] - total["identical"]
    assert total["first"] + total["second"] + total["tie"] + total["invalid"] == 2 * asked > 0
    assert made.data["differences"]["lora"]["verdict"] in ("equivalent", "better", "worse", "not shown")


def test_full_is_needed_to_win_against_before_anything_runs(here, instruct, tmp_path):
    recipe = instruct(metric="preference", judge=Judge("m", "http://127.0.0.1:9/v1"))
    with pytest.raises(RecipeError, match="compares each arm's answers with full's: add 'full' to the arms"):
        compare(recipe, ["lora"], output=tmp_path / "out")
    with pytest.raises(RecipeError, match="the environment variable NO_SUCH_KEY is not set"):
        compare(replace(recipe, judge=replace(recipe.judge, api_key_env="NO_SUCH_KEY")), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_counts_the_questions(instruct):
    recipe = instruct(metric="preference", judge=Judge("m", "http://127.0.0.1:9/v1"))
    planned = plan(recipe, ["full", "lora"])
    assert planned["judgements"] == {"each_seed": 16, "base": 16}  # 8 test examples, both orders
    assert any("The judge 'm' is asked up to 16 questions a seed" in note for note in planned["notes"])
    assert plan(instruct(), ["full"])["judgements"] is None


def test_a_run_alone_reports_the_loss(instruct, tmp_path):
    judge = Judge("m", "http://127.0.0.1:9/v1")
    run = train(instruct(metric="preference", judge=judge), "lora", output=tmp_path)
    assert run.ok and "loss" in run.metrics["test"] and "preference" not in run.metrics["test"]
    assert len(answers(run.folder)) == 8


def test_a_misspelt_key_of_the_judge_ends_the_command_before_anything_runs(instruct, tmp_path):
    instruct().to_yaml(tmp_path / "mine.yaml")
    changes = ["metric=preference", "judge.model=m", "judge.base_ulr=http://127.0.0.1:9/v1"]
    command = ["compare", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "out")]
    failed = CliRunner().invoke(app, [*command, *(word for change in changes for word in ("--set", change))])
    assert failed.exit_code == 2 and "Unknown key 'base_ulr' in judge. Did you mean 'base_url'?" in failed.stderr
    assert not (tmp_path / "out").exists()
