"""`compare --until-decided`: seeds by a stored plan until each arm has a verdict, or the plan or the time ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner
from workspace import ThisProcess

import peft_recipes.comparison.compare as comparing
from peft_recipes import Arm, RecipeError, compare, read_comparison
from peft_recipes.cli.app import app
from peft_recipes.comparison import until_decided
from peft_recipes.comparison.until_decided import Until, add_seeds, check_plan, make_design
from peft_recipes.recipe.metrics import margin_for
from peft_recipes.reporting import below_table
from peft_recipes.reporting.advice import next_steps
from peft_recipes.runs.folder import Run
from peft_recipes.statistics.differences import differences
from peft_recipes.statistics.sequential import SequentialPlan

ARMS = ["full", "head", "lora"]


@pytest.fixture(scope="module")
def in_this_process():
    """Every run in this process instead of one of its own, which would take seconds to start."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "executor_of", ThisProcess)
        yield


@pytest.fixture(scope="module")
def recipe(classify):
    """Full and lora learn the task, and nothing is within the margin; the head is trained at no rate to speak of."""
    arms = {**classify().arms, "head": Arm("head", learning_rate=1e-9)}
    return classify(arms=arms, skip_checks=["fresh-process", "reload", "merge", "learning"], margin=0.0001)


@pytest.fixture(scope="module")
def decided(in_this_process, recipe, tmp_path_factory):
    """Full, head and lora with at most four seeds; tests that change it work on a copy."""
    output = tmp_path_factory.mktemp("until")
    recipe.to_yaml(output / "mine.yaml")
    return compare(recipe, ARMS, [0], output=output, until=Until(max_seeds=4))


@pytest.fixture
def call(decided, tmp_path, in_this_process):
    """call(words) runs `compare` on a copy of the decided comparison."""
    output = tmp_path / "copy"
    shutil.copytree(decided.folder.parent, output)
    words = ["compare", output / "mine.yaml", "--arms", ",".join(ARMS), "--output", output]
    return lambda *more: CliRunner().invoke(app, [str(word) for word in (*words, *more)])


def message(result) -> str:
    return " ".join(result.stderr.split())


def test_a_decided_arm_gets_no_more_seeds_and_an_open_one_all_that_were_planned(decided):
    design, arms = decided.data["design"], decided.data["arms"]
    assert design["decided"]["head"] == {"seeds": 3, "verdict": "worse"} and "lora" not in design["decided"]
    assert arms["head"]["seeds"] == [0, 1, 2] and arms["lora"]["seeds"] == arms["full"]["seeds"] == [0, 1, 2, 3]
    assert all(arm["failures"] == [] for arm in arms.values()) and decided.failed == []
    assert not (decided.folder / "head" / "seed-3").exists()
    assert design["ended"] == "max-seeds" and [look["seeds"] for look in design["looks"]] == [3, 4]
    assert design["finished_before"] == [] and design["seeds"] == [0, 1, 2, 3] == decided.data["seeds"]


def test_its_intervals_are_those_of_the_look_that_decided(decided):
    plan = SequentialPlan.from_dict(decided.data["design"])
    for arm, seeds in (("head", 3), ("lora", 4)):
        entry = decided.data["differences"][arm]
        assert entry["seeds"] == seeds and entry["look_confidence"] == plan.confidence(seeds) > 0.95
        (low, high), (lowest, highest) = entry["ci95"], entry["ci95_simultaneous"]
        assert lowest <= low and high <= highest


def test_the_sentences_say_after_how_many_seeds_and_why_it_ended(decided):
    assert "worse than full fine-tuning" in decided.verdict("head")
    assert "95 % interval" in decided.verdict("head") and "decided after 3 seeds" in decided.verdict("head")
    assert "decided after" not in decided.verdict("lora") and "is not shown" in decided.verdict("lora")
    (planned,) = below_table.planned(decided.data)
    assert "at most 4 seeds, and a look after each from number 3" in planned
    assert "after 4 seeds: the most planned; LoRA r=4 is open. An arm that is decided gets no more seeds." in planned
    for page in ("comparison.md", "comparison.html"):
        assert "a look after each from number 3" in (decided.folder / page).read_text(encoding="utf-8"), page
    assert "`--power`" in " ".join(next_steps(decided.data)) and "--seeds" not in " ".join(next_steps(decided.data))


def test_the_same_command_goes_on_with_the_same_plan(call, decided):
    result = call("--until-decided", "--max-seeds", 4, "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == 0 and "done" not in result.stderr
    assert data["design"] == decided.data["design"] and data["differences"] == decided.data["differences"]


def test_the_report_is_drawn_again_with_the_same_intervals(decided, tmp_path):
    shutil.copytree(decided.folder, tmp_path / "tiny")
    before = (tmp_path / "tiny" / "comparison.md").read_text()
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "tiny")])
    assert shown.exit_code == 0 and (tmp_path / "tiny" / "comparison.md").read_text() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-seeds", 5], "at most 4 seeds became 5"),
        (["--max-seeds", 4, "--set", "margin=0.02"], "margin 0.0001 became 0.02"),
        (["--max-seeds", 4, "--arms", "full,lora"], "arms full, head, lora became full, lora"),
        (["--max-seeds", 4, "--seeds", "3"], "seeds 0, 1, 2, 3 became 3, 0, 1, 2"),
    ],
)
def test_a_plan_that_changes_after_a_look_is_refused(call, decided, words, said):
    result = call("--until-decided", *words)
    assert result.exit_code == 2 and said in message(result) and "more false claims" in message(result)
    assert "looked at twice already" in message(result)


def test_a_fixed_number_of_seeds_in_its_folder_says_that_looks_are_not_counted(call, decided):
    result = call("--seeds", "0,1,2", "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == 0 and "design" not in data and data["seeds"] == [0, 1, 2]
    assert any("don't count the looks" in note for note in data["notes"])
    assert "look_confidence" not in data["differences"]["head"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "2h"], "--budget 2h limits how many seeds --until-decided adds"),
        (["--max-seeds", 4], "add --until-decided"),
        (["--until-decided", "--budget", "2 hours"], "expected a duration above 0"),
        (["--until-decided", "--budget", "0m"], "expected a duration above 0"),
        (["--until-decided", "--max-seeds", 2], "the first look is at 3 seeds"),
        (["--until-decided", "--max-seeds", 3, "--seeds", "0,1,2,3"], "4 seeds are given, which are more"),
        (["--until-decided", "--arms", "head,lora"], "add 'full' to --arms"),
        (["--until-decided", "--arms", "full"], "name another arm"),
    ],
)
def test_what_can_not_be_planned_is_one_message_and_writes_nothing(classify, tmp_path, words, said):
    classify().to_yaml(tmp_path / "mine.yaml")
    arguments = ["compare", tmp_path / "mine.yaml", "--output", tmp_path / "o", *words]
    result = CliRunner().invoke(app, [str(word) for word in arguments])
    assert result.exit_code == 2 and said in message(result) and not (tmp_path / "o").exists()


# --- plan --power, from the same runs ---------------------------------------------------------------------------------


def test_plan_says_how_many_seeds_and_examples_a_verdict_takes(decided, tmp_path):
    output = decided.folder.parent
    words = [str(word) for word in ("plan", output / "mine.yaml", "--arms", "full,lora", "--output", output)]
    result = CliRunner().invoke(app, [*words, "--power", "20", "--json"])
    made = json.loads(result.stdout)["power"]
    arm = made["arms"]["lora"]
    assert made["margin"] == 20 and made["unit"] == "points" and made["power"] == 0.8
    assert arm["pilot"] == {"seeds": [0, 1, 2, 3], "examples": 40} and arm["seconds_per_seed"] > 0
    for claim in ("equivalent", "different"):
        seeds, examples = arm["seeds"][claim], [arm["examples"][count][claim]["likely"] for count in ("3", "5", "10")]
        examples = [1e9 if count is None else count for count in examples]  # no number is enough
        assert 3 <= (seeds["likely"] or 101) <= (seeds["safe"] or 101)
        reached = arm["margin_of_10_seeds"][claim]
        assert 0 < reached["likely"] <= reached["safe"] and (reached["likely"] > 20 or (seeds["likely"] or 101) <= 10)
        assert examples == sorted(examples, reverse=True)  # more seeds need fewer examples
    text = " ".join(CliRunner().invoke(app, [*words, "--power", "20"]).stdout.split())
    assert "What a verdict within 20 points (accuracy) takes, with 80 % power:" in text
    assert "what the pilot runs (4 seeds) show" in text and "lora: with 10 seeds and these examples" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output", "nowhere"], "--arms full,lora --seeds 0,1"),
        (["--arms", "lora"], "--arms full,lora --seeds 0,1"),
        (["--arms", "full"], "name another arm"),
        (["--power", "0"], "expected a margin above 0"),
        (["--power", "nan"], "expected a margin above 0"),
    ],
)
def test_without_pilot_runs_it_says_what_to_run_first(classify, tmp_path, words, said):
    classify().to_yaml(tmp_path / "mine.yaml")
    given = ["plan", tmp_path / "mine.yaml", "--arms", "full,lora", "--output", tmp_path, "--power", 1, *words]
    result = CliRunner().invoke(app, [str(word) for word in given])
    assert result.exit_code == 2 and said in message(result)


# --- the loop alone, with runs that are made up -----------------------------------------------------------------------


class Runs:
    """Runs that end at once: `verdicts` by arm and number of seeds, `failing` jobs, the seconds each takes."""

    def __init__(self, folder: Path, recipe, arms, most=6, failing=(), verdicts=None, seconds=10.0):
        self.failing, self.verdicts, self.seconds, self.trained, self.now = failing, verdicts or {}, seconds, [], 0.0
        self.design = make_design(folder, recipe, arms, check_plan(arms, [0], Until(most)), "data", overwrite=False)

    def read(self, job):
        status = "failed" if job in self.failing else "ok"
        return Run(Path(), {"status": status if job in self.trained else "missing", "seconds": {"total": self.seconds}})

    def missing(self, jobs):
        return [job for job in jobs if job not in self.trained]

    def train(self, jobs):
        wanted = self.missing(jobs)
        self.trained += wanted
        self.now += 1.5 * self.seconds * len(wanted)  # processes take time to start

    def look(self, design):
        shared = {
            arm: sum(self.read((arm, s)).ok and self.read(("full", s)).ok for s in seeds)
            for arm, seeds in design.given.items()
        }
        return {
            arm: {"seeds": n, "verdict": self.verdicts.get((arm, n), "not shown")}
            for arm, n in shared.items()
            if n >= design.plan.first
        }

    def add(self, monkeypatch, budget=None):
        monkeypatch.setattr(until_decided.time, "monotonic", lambda: self.now)
        add_seeds(self.design, Until(6, budget), self.missing, self.train, self.read, self.look)
        return {arm: len(seeds) for arm, seeds in self.design.given.items()}, self.design.data["ended"]


@pytest.fixture
def runs(recipe, tmp_path):
    return lambda *arms, **options: Runs(tmp_path, recipe, ["full", *arms], **options)


def test_full_gets_every_seed_that_an_open_arm_gets(runs, monkeypatch):
    made = runs("head", "lora", verdicts={("head", 3): "worse", ("lora", 5): "equivalent"})
    assert made.add(monkeypatch) == ({"full": 5, "head": 3, "lora": 5}, "decided")
    assert made.design.data["decided"]["lora"] == {"seeds": 5, "verdict": "equivalent"}


def test_the_design_is_stored_before_the_first_run(runs, monkeypatch, tmp_path):
    made = runs("lora")

    def killed(jobs):
        raise KeyboardInterrupt

    made.train = killed
    with pytest.raises(KeyboardInterrupt):
        made.add(monkeypatch)
    stored = json.loads((tmp_path / "design.json").read_text())
    assert stored["seeds"] == [0, 1, 2, 3, 4, 5] and stored["looks"] == [] and stored["finished_before"] == []
    assert runs("lora", most=5).design.data["looks"] == []  # nobody looked: the plan may still change


def test_no_seed_is_started_that_would_not_end_in_time(runs, monkeypatch):
    """A seed of two runs takes 30 s: 10 s each by run.json, and half as much again to start."""
    for budget, seeds in ((20, 1), (59, 1), (60, 2), (100, 3)):
        made = runs("lora")
        assert made.add(monkeypatch, budget) == ({"full": seeds, "lora": seeds}, "budget"), budget


def test_a_later_call_goes_on_and_needs_no_time_for_what_is_there(runs, monkeypatch, tmp_path):
    first = runs("lora", verdicts={("lora", 5): "better"})
    first.add(monkeypatch, 100)
    again = runs("lora", verdicts=first.verdicts)
    again.trained = list(first.trained)
    assert again.add(monkeypatch, 60) == ({"full": 5, "lora": 5}, "decided")
    assert [look["seeds"] for look in again.design.data["looks"]] == [3, 4, 5]
    assert again.design.data["finished_before"] == []


def test_seeds_that_were_there_before_the_plan_are_named(runs, monkeypatch):
    made = runs("lora")
    made.trained = [("full", 0), ("lora", 0), ("full", 1)]
    made.add(monkeypatch)
    assert made.design.data["finished_before"] == [0]


def test_an_arm_that_failed_twice_gets_no_more_seeds(runs, monkeypatch):
    made = runs("head", "lora", failing=[("head", 0), ("head", 2), ("lora", 1)], verdicts={("lora", 4): "worse"})
    assert made.add(monkeypatch) == ({"full": 5, "head": 3, "lora": 5}, "failed")  # lora has 4 of its 5 seeds
    assert made.design.data["given_up"] == ["head"] and [*made.design.data["decided"]] == ["lora"]


def test_without_full_it_ends(runs, monkeypatch):
    made = runs("lora", failing=[("full", 0), ("full", 1)])
    assert made.add(monkeypatch) == ({"full": 3, "lora": 3}, "failed")


def test_other_runs_start_a_new_plan_and_a_broken_file_is_an_error(runs, recipe, monkeypatch, tmp_path):
    runs("lora").add(monkeypatch)
    plan = check_plan(["full", "lora"], [0], Until(5))
    fresh = make_design(tmp_path, recipe, ["full", "lora"], plan, "other data", overwrite=False)
    assert fresh.data["looks"] == [] and fresh.data["earlier_looks"] == 0
    anew = make_design(tmp_path, recipe, ["full", "lora"], plan, "data", overwrite=True)
    assert anew.data["looks"] == [] and anew.data["earlier_looks"] == 4
    for text in ("{", "[]", '{"seeds": [0], "first": 3, "comparisons": 1}'):
        (tmp_path / "design.json").write_text(text)
        with pytest.raises(RecipeError, match=r"design\.json can't be read as a plan of seeds"):
            make_design(tmp_path, recipe, ["full", "lora"], plan, "data", overwrite=False)


def test_before_the_first_look_there_is_no_interval(decided, recipe):
    runs = {
        (arm, seed): Run(folder, json.loads((folder / "run.json").read_text()))
        for arm in ("full", "lora")
        for seed in (0, 1, 2)
        for folder in [decided.folder / arm / f"seed-{seed}"]
    }
    plan = SequentialPlan((0, 1, 2, 3), 3, 1)
    assert differences(recipe, runs, ["full", "lora"], [0, 1], plan=plan) == {}
    assert differences(recipe, runs, ["full", "lora"], [0, 1, 2], plan=plan)["lora"]["seeds"] == 3
    assert margin_for("accuracy", 0.5) == 0.01 and read_comparison(decided.folder).data["margin"] == 0.0001
