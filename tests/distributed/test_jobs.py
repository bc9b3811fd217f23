"""Several runs at a time: the GPU and the threads that each gets, how many fit by their plans; devices are faked."""

from __future__ import annotations

import types

import pytest

from peft_recipes import RecipeError
from peft_recipes.distributed.jobs import AUTO, job_environments, read_jobs
from peft_recipes.planning.together import CUDA_CONTEXT, Room, check_together, jobs_for

GB = 10**9


@pytest.fixture
def machine(monkeypatch):
    """machine(gpus, memory, cores): of a machine that this one seems to be."""
    import torch

    def seem(gpus=0, memory=80 * GB, cores=4):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        properties = types.SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(total=memory))

    return seem


def test_jobs_share_the_threads_of_a_cpu(machine):
    machine()
    assert job_environments(1) == [{}]
    assert job_environments(2) == [{"PEFT_RECIPES_JOBS": "2", "OMP_NUM_THREADS": "2"}] * 2


def test_jobs_get_a_gpu_each_where_there_are_enough(machine, monkeypatch):
    machine(gpus=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert job_environments(2) == [{"PEFT_RECIPES_JOBS": "2", "CUDA_VISIBLE_DEVICES": name} for name in "57"]
    assert "CUDA_VISIBLE_DEVICES" not in job_environments(2, "cpu")[0]  # a recipe with use_cpu


def test_more_jobs_than_gpus_share_them_evenly_and_say_so(machine):
    machine(gpus=2, cores=6)
    slots = job_environments(3)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0", "1", "0"]
    assert {(slot["PEFT_RECIPES_JOBS"], slot["PEFT_RECIPES_DEVICE_JOBS"]) for slot in slots} == {("3", "2")}
    assert {slot["OMP_NUM_THREADS"] for slot in slots} == {"2"}


@pytest.mark.parametrize(("text", "jobs"), [("3", 3), (" auto", AUTO), ("Auto", AUTO)])
def test_jobs_are_a_number_or_auto(text, jobs):
    assert read_jobs(text) == jobs


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "all", ""])
def test_anything_else_is_an_error(text):
    with pytest.raises(RecipeError, match="expected a whole number of 1 or more, or auto"):
        read_jobs(text)


def test_as_many_runs_fit_as_the_largest_of_them_with_a_context_each(machine):
    machine(gpus=1, memory=30 * GB, cores=16)
    needs = [8 * GB, 8 * GB, 8 * GB, 2 * GB, 2 * GB]
    assert Room("cuda").taken([8 * GB]) == int(8.8 * GB) + CUDA_CONTEXT
    assert Room("cuda").most(needs) == 3 and jobs_for(AUTO, needs, "cuda") == 3
    machine(gpus=2, memory=30 * GB, cores=16)
    assert Room("cuda").most(needs) == 5  # three on each, but there are five
    machine(gpus=1, memory=300 * GB, cores=2)
    assert jobs_for(AUTO, needs, "cuda") == 2 and jobs_for(4, needs, "cuda") == 4
    machine(memory=30 * GB)
    assert Room("cpu").most([20 * GB, 20 * GB, 9 * GB]) == 1 and Room("cpu").most([9 * GB] * 3) == 3


def test_too_many_at_a_time_are_an_error_that_names_how_many_fit(machine):
    machine(gpus=1, memory=30 * GB)
    check_together(3, [8 * GB] * 5, "cuda")
    with pytest.raises(
        RecipeError, match=r"--jobs 4: 4 runs at a time need up to 37.6 GB of one GPU.* 30.0 GB.*--jobs 3"
    ):
        check_together(4, [8 * GB] * 5, "cuda")
    check_together(4, [40 * GB], "cuda")  # one alone: its own plan has refused it, or was told not to


def test_a_run_on_a_shared_gpu_says_so_and_what_helps_where_memory_runs_out(monkeypatch):
    from peft_recipes.hardware.device import Hardware
    from peft_recipes.runs.facts import _notes, failure

    monkeypatch.setenv("PEFT_RECIPES_JOBS", "4")
    error = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "--jobs" not in failure(error)["error"]  # a GPU each
    monkeypatch.setenv("PEFT_RECIPES_DEVICE_JOBS", "2")
    assert failure(error)["status"] == "out-of-memory"
    assert failure(error)["error"].endswith(
        "(up to 2 runs at a time shared the memory; with --jobs 1 each has all of it)"
    )
    assert "--jobs" not in failure(ValueError("wrong"))["error"]
    (note,) = _notes(Hardware("cuda", "H100", "bf16", 4))
    assert "4 runs at a time shared this machine (up to 2 a GPU, each with memory of its own)" in note
    assert "`--measure` takes them again" in note
