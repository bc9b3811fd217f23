"""A run's times carry a verdict: quiet, or disturbed by what else ran on the machine."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from peft_recipes.measuring import disturbance
from peft_recipes.measuring.disturbance import Disturbance, busy_since, judged, read_counters
from peft_recipes.training.run import train

QUIET = {"seconds": 10.0, "own": 20.0, "machine": 20.1, "stolen": 0.0, "waited": 0.08, "pressure": 0.05, "switches": 90}


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(disturbance, "_cores", lambda: 2)
    monkeypatch.setattr(disturbance, "_threads", lambda: 2)
    monkeypatch.setattr(disturbance, "_waiting_is_known", lambda: True)


@pytest.mark.parametrize(
    ("changed", "device", "gpu", "why"),
    [
        ({}, "cpu", None, None),
        ({"machine": 29.5, "own": 10.0}, "cpu", None, None),  # a core of its own for each
        ({"waited": 7.0, "machine": 30.0}, "cpu", None, "its threads waited 26 % of their time for a CPU core"),
        ({"waited": 0.4}, "cpu", None, "its threads waited 2 % of their time for"),
        ({"stolen": 3.0}, "cpu", None, "the virtual machine's host gave 0.28 of its CPU cores to others"),
        ({}, "cuda", 0, None),
        ({}, "cuda", 1, "1 other process used the GPU"),
    ],
)
def test_the_verdict_follows_from_what_changed_during_the_steps(changed, device, gpu, why):
    total = QUIET | changed
    found = judged(total, total["own"], 100, device, gpu)
    assert found["verdict"] == ("disturbed" if why else "quiet")
    assert (found["why"] or "").startswith(why or "")


def test_more_threads_than_cores_wait_for_each_other(monkeypatch):
    monkeypatch.setattr(disturbance, "_threads", lambda: 8)
    assert judged(QUIET | {"waited": 60.0}, 20.0, 100, "cpu")["verdict"] == "quiet"


def test_without_waiting_times_the_cores_that_others_took_decide(monkeypatch):
    monkeypatch.setattr(disturbance, "_waiting_is_known", lambda: False)
    assert judged(QUIET, 20.0, 100, "cpu")["verdict"] == "quiet"
    assert judged(QUIET | {"own": 10.0}, 10.0, 100, "cpu")["verdict"] == "quiet"  # the other core was free
    taken = judged(QUIET | {"own": 14.0}, 14.0, 100, "cpu")
    assert taken["verdict"] == "quiet"  # 0.6 cores beside 1.4
    assert judged(QUIET | {"own": 14.0, "machine": 22.0}, 14.0, 100, "cpu")["why"].startswith("other processes used")


def test_runs_that_share_the_processor_by_design_say_so(monkeypatch):
    monkeypatch.setenv("PEFT_RECIPES_JOBS", "3")
    assert judged(QUIET, 20.0, 100, "cpu")["why"] == "3 runs at a time shared the processor"
    assert judged(QUIET, 20.0, 100, "cuda", 0)["why"] is None  # a GPU each
    assert judged(QUIET, 20.0, 100, "mps")["why"] == "3 runs at a time shared the GPU"
    monkeypatch.setenv("PEFT_RECIPES_DEVICE_JOBS", "2")
    assert judged(QUIET, 20.0, 100, "cuda")["why"] == "2 runs at a time shared the GPU"


def test_counters_grow_and_the_sums_continue_from_a_checkpoint():
    meter = Disturbance()
    for warmup in (True, False):
        meter.begin()
        sum(range(200_000))
        meter.end(warmup)
    assert meter.warmup["own"] > 0 and meter.rest["seconds"] > 0
    again = Disturbance()
    again.restore(meter.state())
    assert (again.steps, again.rest) == (2, meter.rest)


def test_a_system_without_proc_still_has_the_machines_time(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    monkeypatch.setattr("psutil.cpu_times", lambda: SimpleNamespace(user=5.0, system=1.0))
    monkeypatch.setattr(disturbance.Path, "open", missing)
    monkeypatch.setattr(disturbance.os, "scandir", missing)
    counters = read_counters()
    assert counters["machine"] == 6.0 and counters["own"] > 0 and counters["waited"] == counters["pressure"] == 0


def test_a_busy_machine_is_said_at_the_start():
    before = read_counters()
    assert busy_since(before | {"machine": before["machine"] + 1e6}) is None
    assert "other processes used" in busy_since(before | {"machine": before["machine"] - 10})


def test_a_run_records_its_verdict_and_warns_on_a_loaded_machine(classify, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("peft_recipes.training.run.busy_since", lambda _: "The machine was busy at the start.")
    with caplog.at_level(logging.WARNING, "peft_recipes"):
        run = train(classify(), "lora", output=tmp_path)
    assert run.data["training"]["disturbance"]["verdict"] in ("quiet", "disturbed")
    assert "The machine was busy at the start." in run.data["notes"] and "busy at the start" in caplog.text
