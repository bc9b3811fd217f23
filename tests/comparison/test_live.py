"""The table of a comparison while its runs are trained: any state is a valid file, and says what it is."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
from typer.testing import CliRunner
from workspace import ThisProcess

import peft_recipes.comparison.compare as comparing
from peft_recipes import RecipeError, compare, read_comparison
from peft_recipes.cards.write import comparison_of
from peft_recipes.cli.app import app
from peft_recipes.comparison import provisional
from peft_recipes.comparison.collecting import add_context
from peft_recipes.comparison.live import Live
from peft_recipes.comparison.orders import Progress
from peft_recipes.comparison.provisional import Allowance, Provisional
from peft_recipes.comparison.until_decided import Design
from peft_recipes.publishing.push import publish_all
from peft_recipes.runs.files import write_json
from peft_recipes.runs.folder import read_comparison_file, read_run
from peft_recipes.statistics.sequential import SequentialPlan

ARMS, BASE = ["full", "lora"], ("base", 0)
QUICK = ["fresh-process", "reload", "merge", "learning"]


def interrupted(progress):
    """Ctrl-C once the first run of LoRA is under way."""
    if progress.job == ("lora", 0) and progress.state == "running":
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def here():
    """Every run in this process, and a table after each, however short the runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "executor_of", ThisProcess)
        patch.setattr(provisional, "SHARE", 1000.0)
        yield


@pytest.fixture(scope="module")
def recipe(classify):
    return classify(skip_checks=QUICK)


@pytest.fixture(scope="module")
def trained(here, recipe, tmp_path_factory):
    """A comparison of two seeds, its progress reports, and comparison.json and .html as each run started."""
    output, tables, reports = tmp_path_factory.mktemp("live"), [], []

    def record(progress):
        reports.append(progress)
        folder = output / "tiny"
        if progress.state == "running" and not progress.step and (folder / "comparison.json").is_file():
            page = (folder / "comparison.html").read_text("utf-8")
            tables.append((read_comparison_file(folder), page, (folder / "comparison.md").read_text("utf-8")))

    return compare(recipe, ARMS, [0, 1], output=output, on_progress=record), reports, tables


def test_after_every_run_there_is_a_provisional_table(trained):
    _, _, tables = trained
    assert [table["provisional"]["finished"] for table, _, _ in tables] == [1, 2, 3, 4]
    for table, page, text in tables:
        assert table["schema"] == 1 and table["provisional"]["of"] == 5 and list(table["arms"]) == ARMS
        assert f"Provisional: {table['provisional']['finished']} of 5 runs finished" in page
        assert "Provisional: " in text and "plots/" not in text
    after_base, after_full, after_lora, _ = (table for table, _, _ in tables)
    assert after_base["base"]["metrics"]["test"] and after_base["arms"]["full"]["status"] == "pending"
    assert after_base["arms"]["full"]["metric"] is None and after_base["arms"]["full"]["error"] is None
    assert after_full["arms"]["full"]["seeds"] == [0] and after_full["differences"] == {}
    assert after_lora["differences"]["lora"]["seeds"] == 1
    assert "So far: " in tables[2][1] and "no result yet: not begun" in tables[1][1]


def test_the_final_table_has_no_trace_of_it(trained):
    comparison, _, _ = trained
    assert not comparison.provisional and "provisional" not in comparison.data
    for arm in comparison.data["arms"].values():
        assert not {"progress", "unfinished"} & set(arm)
    page = (comparison.folder / "comparison.html").read_text("utf-8")
    assert not any(word in page for word in ("Provisional", "So far", "<script", "refresh"))


def test_a_report_of_a_finished_run_carries_its_metric(trained):
    comparison, reports, _ = trained
    ended = [report for report in reports if report.state == "ok"]
    metrics = {("lora", 0): read_run(comparison.folder / "lora" / "seed-0").metrics}
    assert [report.job for report in ended] == [BASE, ("full", 0), ("lora", 0), ("full", 1), ("lora", 1)]
    assert (ended[2].metric, ended[2].test) == ("accuracy", metrics["lora", 0]["test"]["accuracy"])
    assert ended[2].validation == metrics["lora", 0]["validation"]["accuracy"]


def seen(trained, recipe, folder, states, failed=None, jobs=None, **options):
    """The table of a comparison of which these runs are known, in a copy. failed: a run that is out of memory there."""
    shutil.copytree(trained[0].folder, folder / "tiny")
    if failed:
        data = {"status": "out-of-memory", "error": "killed", "arm": failed[0], "seed": failed[1]}
        write_json(folder / "tiny" / failed[0] / f"seed-{failed[1]}" / "run.json", data)
    jobs = jobs or [BASE, *((arm, seed) for seed in (0, 1) for arm in ARMS)]
    live = Live(recipe, folder, lambda: jobs)
    for job, state in states.items():
        live.see(
            Progress(job, 1, len(jobs), **state) if isinstance(state, dict) else Progress(job, 1, len(jobs), state)
        )
    table = Provisional(live, recipe, ARMS, folder / "tiny", lambda: jobs, **options)
    table.ended(object())
    return read_comparison(folder / "tiny"), table


def test_what_an_earlier_call_left_is_not_a_finished_run_of_this_one(trained, recipe, tmp_path):
    found, _ = seen(trained, recipe, tmp_path, {BASE: "kept", ("lora", 0): "kept"})
    assert found.provisional and found.data["provisional"]["finished"] == 2
    assert found.data["arms"]["full"]["status"] == "pending" and found.data["arms"]["lora"]["seeds"] == [0]
    assert found.data["differences"] == {} and found.failed == []
    assert "full fine-tuning has no result yet" in found.verdict("lora")


def test_an_arm_with_fewer_seeds_is_compared_on_those_it_shares_with_full(trained, recipe, tmp_path):
    states = dict.fromkeys([("full", 0), ("full", 1), ("lora", 1)], "kept")
    found, _ = seen(trained, recipe, tmp_path, {**states, ("lora", 0): "out-of-memory"}, failed=("lora", 0))
    assert found.data["differences"]["lora"]["seeds"] == 1
    assert found.data["arms"]["full"]["metric"]["values"] == trained[0].data["arms"]["full"]["metric"]["values"]


def test_paused_arms_show_their_validation_curves_side_by_side(trained, recipe, tmp_path):
    for number, arm in enumerate(ARMS):
        points = [{"step": step, "accuracy": value + number / 8} for step, value in ((3, 0.5), (6, 0.625))]
        folder = trained[0].folder / arm / "seed-0"
        write_json(folder / "progress.json", {"schema": 1, "step": 6, "of": 12, "validation": points})
    paused = {"state": "paused", "step": 6, "steps": 12}
    found, table = seen(trained, recipe, tmp_path, {BASE: "kept", ("full", 0): paused, ("lora", 0): paused})
    progress = found.data["arms"]["lora"]["progress"]
    assert progress == {"state": "paused", "step": 6, "of": 12, "validation": [[3, 0.625], [6, 0.75]]}
    runs = {(run["arm"], run["seed"]): run for run in found.data["provisional"]["runs"]}
    assert runs["lora", 0]["validation"] == {"accuracy": 0.75} and runs["lora", 1]["state"] == "pending"
    page = table.page().decode()
    assert 'id="figure-validation"' in page and "paused, step 6 of 12, validation accuracy 75.0" in page


def test_between_two_looks_the_verdicts_are_those_of_the_last_one(trained, recipe, tmp_path):
    def table(folder, given, **data):
        plan = SequentialPlan((0, 1), 1, 1)
        stored = {**plan.to_dict(), "arms": ARMS, "looks": [], "decided": {}, "given_up": [], "ended": None, **data}
        design = Design(tmp_path, stored | {"seeds_of": given}, plan, given)
        states = dict.fromkeys([BASE, ("full", 0), ("lora", 0), ("full", 1)], "kept")
        return seen(trained, recipe, tmp_path / folder, states, design=design)[0]

    before = table("before", {"full": [], "lora": []})
    plan = SequentialPlan((0, 1), 1, 1)
    new = Design(tmp_path, {**plan.to_dict(), "arms": ARMS, "looks": []}, plan)  # as it is before its first run
    complete = partial(add_context, estimates=None, asked=None, looked=None, design=new)
    _, made = seen(trained, recipe, tmp_path / "new", {}, complete=complete, design=new)
    assert "Provisional: 0 of 5 runs at most finished" in made.page().decode()
    assert before.data["differences"] == {} and before.data["arms"]["lora"]["metric"]["values"]
    halted = {"state": "stopped", "reason": "too slow", "step": 3, "of": 12, "validation": []}
    jobs = [BASE, ("full", 0), ("full", 1)]  # nothing more is planned of an arm that was stopped
    states, options = dict.fromkeys(jobs, "kept"), {"design": new, "halted": lambda jobs: dict.fromkeys(jobs, halted)}
    stopped, _ = seen(trained, recipe, tmp_path / "stopped", states, jobs=jobs, **options)
    arm = stopped.data["arms"]["lora"]
    assert (arm["status"], arm["progress"]["reason"], arm["progress"]["step"]) == ("stopped", "too slow", 3)
    between = table("between", {"full": [0], "lora": [0]})
    assert between.data["arms"]["full"]["seeds"] == [0, 1] and between.data["differences"]["lora"]["seeds"] == 1
    assert between.data["differences"]["lora"]["verdict"] == "not shown"
    verdict = between.data["differences"]["lora"]
    made = {"lora": {"seeds": 1, "verdict": verdict["verdict"]}}
    decided = table("decided", {"full": [0], "lora": [0]}, decided=made)
    assert not decided.verdict("lora").startswith("So far") and between.verdict("lora").startswith("So far")


def test_a_provisional_comparison_is_no_evidence(trained, recipe, tmp_path):
    found, _ = seen(trained, recipe, tmp_path, {BASE: "kept", ("full", 0): "kept", ("lora", 0): "kept"})
    with pytest.raises(RecipeError, match=r"is provisional: 3 of 5 runs are finished"):
        publish_all(found, "me/it", dry_run=True)
    assert comparison_of(read_run(found.folder / "lora" / "seed-0")) is None
    result = CliRunner().invoke(app, ["gallery", str(tmp_path), "--output", str(tmp_path / "site"), "--json"])
    made = json.loads(result.stdout)
    assert made["comparisons"] == 0 and any("provisional" in str(one) for one in made["left_out"])


def test_an_interruption_leaves_a_valid_table_that_the_next_call_finishes(here, recipe, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compare(recipe, ARMS, output=tmp_path, on_progress=interrupted)
    left = read_comparison(tmp_path / "tiny")
    assert left.data["provisional"]["interrupted"] and left.data["provisional"]["finished"] == 2
    assert left.data["arms"]["full"]["status"] == "ok" and left.data["provisional"]["expected_seconds"] is None
    cards = list(tmp_path.glob("tiny/*/*/README.md"))
    result = CliRunner().invoke(app, ["report", str(tmp_path / "tiny")])
    assert result.exit_code == 0 and "interrupted with 2 of 3 runs finished" in " ".join(result.stdout.split())
    assert list(tmp_path.glob("tiny/*/*/README.md")) == cards
    assert not compare(recipe, ARMS, output=tmp_path).provisional


def test_an_older_table_stays_until_a_run_of_this_call_has_ended(trained, recipe, here, tmp_path):
    shutil.copytree(trained[0].folder, tmp_path / "tiny")

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(recipe, ARMS, [0, 1, 2], output=tmp_path, on_progress=stop)
    assert not read_comparison(tmp_path / "tiny").provisional


def test_a_table_that_can_not_be_made_ends_nothing(here, recipe, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("peft_recipes.comparison.provisional.Provisional._collect", lambda self: 1 / 0)
    assert compare(recipe, ["full"], output=tmp_path).data["arms"]["full"]["status"] == "ok"
    assert caplog.text.count("The provisional table can't be written (ZeroDivisionError") == 1


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_it_takes_a_tenth_of_the_time_at_most_after_the_first_table():
    clock = Clock()
    allowance = Allowance(0.1, 0.0, clock)

    def spend(seconds):
        with allowance.spending("table"):
            clock.now += seconds

    assert allowance.allows("table")
    spend(2.0)
    clock.now = 39.0
    assert not allowance.allows("table") and allowance.allows("page")  # 2 s are spent, and 2 more would be 4 of 39
    clock.now = 40.0
    assert allowance.allows("table")


def test_the_time_left_is_that_of_finished_runs_of_the_arm_or_of_the_others(recipe, tmp_path):
    clock, jobs = Clock(), [BASE, *((arm, seed) for seed in (0, 1) for arm in ("full", "lora"))]
    live = Live(recipe, tmp_path, lambda: jobs, clock=clock)

    def report(arm, seed, state, at, **details):
        clock.now = at
        live.see(Progress((arm, seed), 1, 5, state, **details))

    assert live.expected_seconds() is None
    report("base", 0, "running", 0.0)
    report("base", 0, "ok", 2.0)
    assert live.expected_seconds() is None  # the base is not trained, so it says nothing of the arms
    report("full", 0, "running", 2.0)
    report("full", 0, "running", 7.0, step=10, steps=40)
    assert live.expected_seconds() == pytest.approx(15 + 3 * 20)  # by its steps, and the others like it
    report("full", 0, "ok", 12.0)
    report("lora", 0, "running", 12.0)
    report("lora", 0, "ok", 16.0)
    report("full", 1, "running", 16.0)
    report("full", 1, "running", 19.0, step=30, steps=40, stage="answer")  # answers, not steps
    assert live.expected_seconds() == pytest.approx(7 + 4)
    report("full", 1, "ok", 30.0)
    report("lora", 1, "ok", 34.0)
    assert live.expected_seconds() == 0.0


def test_the_time_left_of_a_run_that_goes_on_is_that_of_its_other_steps(recipe, tmp_path):
    clock, jobs = Clock(), [("full", 0), ("lora", 0)]
    live = Live(recipe, tmp_path, lambda: jobs, clock=clock)
    live.see(Progress(("full", 0), 1, 2, "paused", step=20, steps=40))
    live.see(Progress(("lora", 0), 2, 2, "running"))
    assert live.expected_seconds() is None  # no step was trained in this call
    clock.now = 20.0
    live.see(Progress(("lora", 0), 2, 2, "paused", step=20, steps=40))
    clock.now = 300.0  # the other arm's turn
    assert live.expected_seconds() == pytest.approx(20 + 20)


def test_the_end_of_a_run_says_its_test_metric(trained, capsys):
    from peft_recipes.cli.output.progress import Standings, progress_bars

    with progress_bars() as on_progress:
        for report in trained[1]:
            on_progress(report)
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 5 and all(
        f"{n}/5" in line and ": done, test accuracy " in line for n, line in enumerate(lines, 1)
    )
    standings = Standings()
    for report in trained[1]:
        standings.see(report)
    assert list(standings.arms) == ["base", "full", "lora"] and len(standings.arms["lora"]["test"]) == 2
    assert [column.header for column in standings.table().columns][2:] == ["test accuracy", "validation accuracy"]


def test_a_table_of_a_running_comparison_is_not_called_interrupted(trained, recipe, tmp_path):
    from peft_recipes.runs.lock import is_locked, locked

    found, _ = seen(trained, recipe, tmp_path, {BASE: "kept"})
    assert not is_locked(found.folder)
    with locked(found.folder):
        assert is_locked(found.folder)
        result = CliRunner().invoke(app, ["report", str(found.folder), "--json"])
    assert result.exit_code == 0 and "interrupted" not in json.loads(result.stdout)["provisional"]


def test_a_final_table_is_not_replaced_by_an_interruption(classify, tmp_path):
    class Begun:
        begun = True

    provisional = Provisional(Begun(), classify(), ["full"], tmp_path, list)
    provisional.finish()
    with pytest.raises(KeyboardInterrupt), provisional:
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
