"""Comparisons with real worker processes: finished runs kept, failures as rows, intervals from the predictions."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pandas
import pytest
from small import compared_here
from worker_processes import workers

from peft_recipes import Arm, RecipeError, compare, plan, read_comparison, train
from peft_recipes.comparison.collecting import collect
from peft_recipes.statistics.bootstrap import paired_difference


def last_states(states):
    """A callback that records the last state of each job."""
    return lambda progress: states.update({progress.job: progress.state})


@pytest.fixture(scope="module")
def comparison(classify, tmp_path_factory):
    """Full and LoRA with two seeds, trained once; tests that change it work on a copy."""
    return compare(classify(), ["full", "lora"], [0, 1], output=tmp_path_factory.mktemp("comparison"))


def test_every_arm_has_its_evidence(comparison):
    data = json.loads((comparison.folder / "comparison.json").read_text())
    assert data["schema"] == 1 and list(data["arms"]) == ["full", "lora"] and data["seeds"] == [0, 1]
    for arm in data["arms"].values():
        assert arm["status"] == "ok" and arm["seeds"] == [0, 1] and len(arm["metric"]["values"]) == 2
        assert arm["metric"]["mean"] == pytest.approx(np.mean(arm["metric"]["values"]))
        assert arm["metric"]["sd"] == pytest.approx(np.std(arm["metric"]["values"], ddof=1))
        assert arm["peak_memory_bytes"] > 0 and arm["training_seconds"] > 0 and arm["latency_ms"]["base"] > 0
    assert data["base"]["metrics"]["test"]["accuracy"] <= 1
    assert data["arms"]["lora"]["checkpoint_bytes"] < data["arms"]["full"]["checkpoint_bytes"]


def test_the_difference_is_paired_by_test_example(comparison):
    def correct(arm):
        tables = [pandas.read_parquet(comparison.folder / arm / f"seed-{s}" / "predictions.parquet") for s in (0, 1)]
        assert list(tables[0]["id"]) == list(tables[1]["id"])
        return np.stack([(t["label"] == t["prediction"]).to_numpy(float) for t in tables])

    difference = comparison.data["differences"]["lora"]
    expected = paired_difference(correct("lora"), correct("full"))
    assert difference["estimate"] == pytest.approx(expected.estimate)
    assert difference["ci95"] == pytest.approx(list(expected.ci95))
    assert difference["verdict"] in ("equivalent", "better", "worse", "not shown") and difference["margin"] == 0.01


def test_one_example_to_evaluate_on_is_refused_before_anything_runs(classify, instruct, tmp_path):
    few = replace(classify().dataset, test=1)
    with pytest.raises(RecipeError, match=r"'test' has 1 example.*at least two.*dataset\.test"):
        compare(classify(dataset=few), ["full"], output=tmp_path / "o")
    row = {"instruction": "say it", "input": "", "output": "a film"}
    (tmp_path / "other.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "input": "again"}) + "\n")
    also = instruct(evaluate_also={"other": {"path": str(tmp_path / "other.jsonl"), "test": 1}})
    with pytest.raises(RecipeError, match=r"'other' has 1 example.*evaluate_also\.other\.test"):
        compare(also, ["lora"], output=tmp_path / "o")
    assert not (tmp_path / "o").exists()
    assert any("'test' has 1 example" in note for note in plan(classify(dataset=few), ["full"])["notes"])
    assert train(classify(dataset=few), "head", output=tmp_path / "o").ok


def test_several_arms_have_intervals_that_hold_together(classify, tmp_path):
    """Also where the arms finished different seeds."""
    recipe = classify(training={**classify().training, "max_steps": 2})
    made = compared_here(recipe, ["full", "head", "lora"], [0, 1], tmp_path)
    shutil.rmtree(made.folder / "lora" / "seed-1")
    for data in (made.data, collect(recipe, ["full", "head", "lora"], [0, 1], tmp_path).data):
        for entry in data["differences"].values():
            (low, high), (lowest, highest) = entry["ci95"], entry["ci95_simultaneous"]
            assert lowest <= low and high <= highest and highest - lowest > high - low
            assert entry["verdict_simultaneous"] in ("equivalent", "better", "worse", "not shown")
    assert data["differences"]["lora"]["seeds"] == 1 and data["differences"]["head"]["seeds"] == 2
    alone = collect(recipe, ["full", "head"], [0, 1], tmp_path)
    assert "ci95_simultaneous" not in alone.data["differences"]["head"]


def test_results_as_a_sentence_a_table_a_dataframe_and_html(comparison):
    assert "95 %" in comparison.verdict("lora") and "stand-in" not in comparison.verdict("lora")
    assert comparison.table().count("\n| ") >= 3 and "LoRA" in comparison.table()
    frame = comparison.to_pandas().set_index("arm")
    assert frame.loc["lora", "trainable_parameters"] == comparison.data["arms"]["lora"]["trainable_parameters"]
    shown = comparison._repr_html_()
    assert shown.startswith("<iframe srcdoc=") and "&lt;html" in shown  # isolated from the notebook's style
    with pytest.raises(RecipeError, match="Did you mean 'lora'"):
        comparison.verdict("loar")


def test_the_report_is_written_and_can_be_read(comparison):
    assert {"comparison.json", "comparison.md", "comparison.html"} <= {p.name for p in comparison.folder.iterdir()}
    assert read_comparison(comparison.folder).data == json.loads((comparison.folder / "comparison.json").read_text())


def test_finished_runs_are_kept_and_new_ones_added(comparison, classify, tmp_path):
    shutil.copytree(comparison.folder, tmp_path / "tiny")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "tiny").rglob("run.json")}
    states = []
    more = compare(classify(), ["full", "lora", "head"], [0, 1], output=tmp_path, on_progress=states.append)
    ended = {progress.job: progress.state for progress in states if progress.state != "running"}
    assert ended == {("base", 0): "kept", ("full", 0): "kept", ("lora", 0): "kept", ("head", 0): "ok",
                     ("full", 1): "kept", ("lora", 1): "kept", ("head", 1): "ok"}  # fmt: skip
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert list(more.data["arms"]) == ["full", "lora", "head"]


def test_a_changed_learning_rate_retrains_that_arm_alone(comparison, classify, tmp_path):
    shutil.copytree(comparison.folder, tmp_path / "tiny")
    arms = {**classify().arms, "lora": Arm(classify().arms["lora"].method, learning_rate=1e-3)}
    ended = {}
    compare(classify(arms=arms), ["full", "lora"], [0], output=tmp_path, on_progress=last_states(ended))
    assert ended == {("base", 0): "kept", ("full", 0): "kept", ("lora", 0): "ok"}


def test_a_failed_arm_is_a_row_and_the_others_are_kept(comparison, classify, tmp_path):
    shutil.copytree(comparison.folder, tmp_path / "tiny")  # base and lora are there already
    arms = {"full": Arm(learning_rate=1e30), "lora": classify().arms["lora"]}
    ended = {}
    made = compare(classify(arms=arms), output=tmp_path, on_progress=last_states(ended))
    assert made.failed == ["full"] and ended == {("base", 0): "kept", ("full", 0): "failed", ("lora", 0): "kept"}
    assert made.data["arms"]["full"]["status"] == "failed"
    assert "The loss is" in made.data["arms"]["full"]["error"]
    assert made.data["arms"]["lora"]["status"] == "ok" and made.data["differences"] == {}


def test_a_run_killed_by_the_system_is_out_of_memory_and_is_rerun_by_the_next_call(comparison, classify, tmp_path):
    shutil.copytree(comparison.folder, tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "full")
    recipe = classify(arms={name: classify().arms[name] for name in ("full", "lora")})
    states = []

    def kill_the_worker():
        while not (found := workers()):
            threading.Event().wait(0.01)
        found[0].send_signal(signal.SIGKILL)

    def kill(news):
        state = (*news.job, news.state)
        if state == ("full", 0, "running") and state not in states:  # announced before its process is started
            threading.Thread(target=kill_the_worker).start()
        states.append(state)

    made = compare(recipe, output=tmp_path, on_progress=kill)
    assert ("lora", 0, "kept") in states and ("full", 0, "running") in states
    assert made.data["arms"]["full"]["status"] == "out-of-memory"
    assert "signal 9" in made.data["arms"]["full"]["error"]
    assert made.data["arms"]["lora"]["status"] == "ok"
    again = compare(recipe, output=tmp_path)
    assert again.failed == [] and again.data["differences"]["lora"]["against"] == "full"


def test_an_arm_beyond_the_memory_limit_is_out_of_memory_and_the_others_continue(comparison, classify, tmp_path):
    """The limit is set by the shell that starts the comparison, so it holds for its workers."""
    shutil.copytree(comparison.folder / "base", tmp_path / "tiny" / "base")
    arms = {"huge": copy.deepcopy(classify().arms["lora"]), "lora": classify().arms["lora"]}
    arms["huge"].method.r = 40_000_000  # its first matrix alone takes 5 GB
    classify(arms=arms, skip_checks=["memory"]).to_yaml(tmp_path / "mine.yaml")
    call = f"ulimit -d 4000000 && exec {sys.executable} -m peft_recipes compare mine.yaml --output . --json"
    ended = subprocess.run(["bash", "-c", call], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    states = {name: arm["status"] for name, arm in json.loads(ended.stdout)["arms"].items()}
    assert states == {"huge": "out-of-memory", "lora": "ok"}


def test_an_adapter_that_differs_in_a_fresh_process_has_a_failed_check(comparison, classify, tmp_path):
    from malformed import change_tensors

    from peft_recipes.comparison.adapter_checks import check_adapters

    shutil.copytree(comparison.folder, tmp_path / "tiny")
    assert comparison.data["arms"]["lora"]["checks"]["fresh-process"] is True
    folder = tmp_path / "tiny" / "lora" / "seed-1"
    change_tensors(folder, "other")
    run = json.loads((folder / "run.json").read_text())
    del run["checks"]["fresh-process"]
    (folder / "run.json").write_text(json.dumps(run))
    check_adapters(tmp_path, classify(), [("base", 0), ("full", 0), ("lora", 0), ("lora", 1)])
    made = collect(classify(), ["full", "lora"], [0, 1], tmp_path)
    arm = made.data["arms"]["lora"]
    assert made.failed == [] and made.failed_checks == ["lora"] and arm["seeds"] == [0, 1]
    failed = arm["failed_checks"]
    assert [(one["seed"], one["check"]) for one in failed] == [(1, "fresh-process")]
    assert "reload: stored and loaded" in failed[0]["error"]


def test_a_killed_checking_process_leaves_the_runs_as_they_are(comparison, tmp_path, monkeypatch):
    from peft_recipes.comparison import adapter_checks
    from peft_recipes.runs.folder import read_run

    shutil.copytree(comparison.folder / "lora", tmp_path / "lora")
    run = read_run(tmp_path / "lora" / "seed-0")
    monkeypatch.setattr(adapter_checks.sys, "executable", "/bin/false")
    adapter_checks.check_in_fresh_process([run], False)
    again = read_run(run.folder)
    assert again.ok and again.failed_checks == {} and again.metrics["test"]
    assert again.data["checks"]["fresh-process"].startswith("not run: the checking process ended early")
    assert not adapter_checks._checked_in_fresh_process(again)  # the next call checks it


def test_a_worker_killed_in_the_verification_leaves_the_figures(comparison, tmp_path):
    """run.json is there, and says which checks the process did not come to; the comparison adds why."""
    from peft_recipes.comparison.run_folders import explain_missing_checks
    from peft_recipes.runs.folder import read_run

    run = read_run(comparison.folder / "lora" / "seed-0")
    run.data["checks"] |= {"reload": "not run: the run ended before it", "merge": 1e-7}
    assert explain_missing_checks(run, "The system killed the process (signal 9).")
    assert run.failed_checks == {"reload": "not run: The system killed the process (signal 9)."}
    assert not explain_missing_checks(run, "again")


def test_a_run_finished_while_a_worker_waited_is_kept(comparison, classify, tmp_path):
    from functools import partial

    from peft_recipes.comparison.orders import Order
    from peft_recipes.comparison.run_folders import clear_folder
    from peft_recipes.comparison.schedule import _can_be_kept
    from peft_recipes.runs.folder import signature

    shutil.copytree(comparison.folder, tmp_path / "tiny")
    recipe, job = classify(), ("lora", 0)
    path = tmp_path / "tiny" / "lora" / "seed-0" / "run.json"
    run = json.loads(path.read_text())
    order = Order(tmp_path, recipe, job, tmp_path / "r.yaml")
    for same in (True, False):
        fingerprint = run["environment"]["dataset_fingerprint"] if same else "another"
        asked = dataclasses.replace(order, signature=signature(recipe, *job, fingerprint))
        clear_folder(dataclasses.replace(asked, finished=partial(_can_be_kept, asked)))
        assert path.is_file() == same


def test_a_worker_records_a_mistake_under_the_folders_lock(classify, tmp_path, monkeypatch):
    from peft_recipes.comparison import worker
    from peft_recipes.runs.lock import LOCK_FILES

    recipe = classify()
    recipe.to_yaml(tmp_path / "r.yaml")
    folder, held = tmp_path / "tiny" / "lora" / "seed-0", []

    def write(path, data):
        held.append([(folder / name).exists() for name in LOCK_FILES])
        path.write_text(json.dumps(data))

    monkeypatch.setattr("peft_recipes.runs.files.write_json", write)
    monkeypatch.setattr(worker, "end_with_parent", lambda: None)

    def refuse(*_, **__):
        raise RecipeError("a mistake")

    monkeypatch.setattr("peft_recipes.training.run.train", refuse)
    assert worker.work(str(tmp_path / "r.yaml"), "lora", 0, str(tmp_path)) == 2 and held == [[True, True]]
    assert json.loads((folder / "run.json").read_text())["error"] == "a mistake"
    (folder / "run.json").write_text('{"status": "ok"}')  # finished by another process meanwhile
    assert worker.work(str(tmp_path / "r.yaml"), "lora", 0, str(tmp_path)) == 2
    assert json.loads((folder / "run.json").read_text()) == {"status": "ok"}


def test_an_interrupted_comparison_leaves_no_worker_and_can_be_resumed(comparison, classify, tmp_path):
    shutil.copytree(comparison.folder / "base", tmp_path / "tiny" / "base")
    # Long enough that a step is seen before the last one: a forked worker trains the usual twelve in no time.
    recipe = classify(arms={"full": classify().arms["full"]}, training={**classify().training, "num_train_epochs": 40})

    def interrupt(progress):
        if progress.job[0] == "full" and progress.state == "running" and progress.step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(recipe, output=tmp_path, on_progress=interrupt)
    assert workers() == []
    ended = {}
    compare(recipe, output=tmp_path, on_progress=last_states(ended))
    assert ended[("full", 0)] == "ok"


@pytest.mark.parametrize(
    ("arms", "seeds", "message"),
    [(["loar"], [0], "Did you mean 'lora'"), ([], [0], "No arm"), (["lora"], [], "seeds"), (["lora"], [-1], "seeds")],
)
def test_a_wrong_arm_or_seed_writes_nothing(classify, tmp_path, arms, seeds, message):
    with pytest.raises(RecipeError) as raised:
        compare(classify(), arms, seeds, output=tmp_path / "o")
    assert message in str(raised.value) and not (tmp_path / "o").exists()


def test_a_folder_without_a_comparison_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match=r"no comparison\.json"):
        read_comparison(tmp_path)


def test_two_comparisons_never_write_to_one_folder(classify, tmp_path):
    from peft_recipes.runs.lock import locked

    (tmp_path / "tiny").mkdir()
    with locked(tmp_path / "tiny"), pytest.raises(RecipeError, match="being written by another process"):
        compare(classify(), ["lora"], output=tmp_path)
    assert list((tmp_path / "tiny").iterdir()) == []
