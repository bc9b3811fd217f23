"""Time, memory and latency are compared only between runs of one environment on a quiet machine."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from comparison_fixture import environment, image_comparison

from peft_recipes.reporting import arm_plots, quality_plots, sentences
from peft_recipes.reporting.markdown import render_markdown
from peft_recipes.reporting.rows import table
from peft_recipes.runs.folder import Run
from peft_recipes.statistics.conditions import conditions, notes, timed, timing, why_not_comparable

BUSY = {"verdict": "disturbed", "why": "other processes used 1.0 CPU cores during the steps"}


def run(seed: int = 0, disturbance: dict | None = None, **changed) -> Run:
    data = {"seed": seed, "environment": {**environment(), "processes": 1, "jobs": 1, "distributed": None} | changed}
    return Run(Path("run"), data | {"training": {"disturbance": disturbance} if disturbance else {}})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"threads": 1}, "'full' was measured with 1 CPU thread, 'head' with 2 CPU threads"),
        ({"device_name": "H100"}, "'full' was measured on H100, 'head' on Invented CPU"),
        ({"device": "cuda"}, "'full' was measured on the device cuda, 'head' on the device cpu"),
        ({"precision": "bf16"}, "'full' was measured in bf16, 'head' in fp32"),
        ({"processes": 2}, "'full' was measured by 2 processes, 'head' by 1 process"),
        ({"distributed": "DDP"}, "'full' was measured under DDP, 'head' by one process"),
        ({"jobs": 3}, "'full' was measured with 3 runs at a time, 'head' with 1 run at a time"),
        ({"versions": {**environment()["versions"], "torch": "2.9.0"}},
         "'full' was measured with torch 2.9.0, 'head' with torch 2.13.0"),
    ],
)  # fmt: skip
def test_each_condition_makes_times_incomparable_and_is_named(changed, words):
    assert why_not_comparable("full", run(**changed).data, "head", run().data) == words


@pytest.mark.parametrize(
    "changed", [{"git_commit": "other"}, {"python": "3.13"}, {"dataset_fingerprint": "x"}, {"attention": "eager"},
                {"versions": {**environment()["versions"], "datasets": "9.0"}}],
)  # fmt: skip
def test_what_changes_no_step_keeps_times_comparable(changed):
    assert why_not_comparable("full", run(**changed).data, "head", run().data) is None


def test_an_older_run_without_the_fields_was_one_process_alone():
    older = run()
    older.data["environment"] = environment()
    assert conditions(older.data) == conditions(run().data)


def test_medians_are_over_seeds_of_the_references_commonest_environment():
    runs = {"full": [run(0), run(1), run(2, threads=1)], "head": [run(0, threads=1), run(1, threads=1), run(2)]}
    found = timing(runs, "full")
    assert found["full"] == {"comparable": True, "same_environment": True, "why": None, "seeds": [0, 1]}
    assert (found["head"]["comparable"], found["head"]["seeds"]) == (True, [2])
    assert "'full' seed 2, 'head' seed 0, 'head' seed 1" in notes(found, runs)[-1]


def test_an_arm_of_another_environment_keeps_its_figures_without_a_ratio():
    runs = {"full": [run(0)], "head": [run(0, threads=1)]}
    head = timing(runs, "full")["head"]
    assert not head["comparable"] and not head["same_environment"] and head["seeds"] == [0]
    assert "'head' was measured with 1 CPU thread, 'full' with 2" in head["why"]
    assert "--measure" in notes(timing(runs, "full"), runs)[0]


def test_disturbed_seeds_are_left_out_and_a_disturbed_arm_has_no_ratio_of_times():
    found = timing({"full": [run(0), run(1, BUSY)], "head": [run(0, BUSY)]}, "full")
    assert found["full"]["comparable"] and found["full"]["seeds"] == [0]
    assert not found["head"]["comparable"] and found["head"]["same_environment"]
    assert "busy machine (other processes used 1.0 CPU cores" in found["head"]["why"]


def test_runs_that_shared_a_gpu_have_no_ratio_of_times_but_one_of_their_own_memory():
    shared = {"verdict": "disturbed", "why": "2 runs at a time shared the GPU"}
    runs = {arm: [run(0, shared, device="cuda", jobs=2)] for arm in ("full", "lora")}
    found = timing(runs, "full")
    assert not any(arm["comparable"] for arm in found.values())
    assert all(arm["same_environment"] for arm in found.values())
    assert found["lora"]["why"] == "'lora' was timed while 2 runs at a time shared the GPU"
    (note,) = notes(found, runs)
    assert "Memory is each run's own" in note and "take them again with `--measure`" in note


def test_a_measurement_taken_again_replaces_times_memory_and_environment():
    first = run(threads=1, disturbance=BUSY)
    first.data |= {"metrics": {"test": {"accuracy": 0.9}}, "training": {**first.data["training"], "steps": 7}}
    again = {"training": {"seconds": 1.0, "disturbance": {"verdict": "quiet", "why": None}}}
    data = timed({**first.data, "measured": {**again, "environment": environment()}})
    assert data["training"] == {"seconds": 1.0, "steps": 7, "disturbance": {"verdict": "quiet", "why": None}}
    assert data["metrics"]["test"] == {"accuracy": 0.9} and data["environment"]["threads"] == 2


@pytest.mark.parametrize("arm", ["lora", "full"])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_no_report_has_a_ratio_of_times_that_cannot_be_compared(arm, elsewhere):
    comparison, why = image_comparison(), "'lora' was measured with 1 CPU thread, 'full' with 2 CPU threads"
    fair = copy.deepcopy(comparison)
    comparison["arms"][arm]["timing"] = {"comparable": False, "same_environment": not elsewhere, "why": why}
    sentence = sentences.verdict_sentence(comparison, "lora")
    assert "the speed" in sentences.verdict_sentence(fair, "lora") and "the speed" not in sentence
    assert ("of the memory" in sentence) is not elsewhere
    assert why in sentence and "checkpoint instead of" in sentence
    cells = {row.name: row.cells for row in table(comparison).rows}["lora"]
    assert cells["training_seconds"].text and not cells["training_seconds"].sub
    assert bool(cells["peak_memory_bytes"].sub) is not elsewhere
    report = render_markdown(comparison)
    assert why in report and "Merge before serving" not in (report if arm == "lora" else "")
    plots = (quality_plots.quality_by_time(comparison), arm_plots.memory_bars(comparison))
    for plot, left in zip(plots, (True, elsewhere), strict=True):
        assert plot is None if left and arm == "full" else ("Left out" in plot.caption) is left
