"""Where the runs of a comparison are trained, as the comparison sees it; no Ray, and no process is started."""

from __future__ import annotations

import dataclasses
import json
import types

import pytest
from fake_nodes import Nodes
from worker_processes import all_ended

from peft_recipes import Dataset
from peft_recipes.cluster.pool import Pool
from peft_recipes.comparison import on_ray, pool
from peft_recipes.comparison.needed_files import needed_files
from peft_recipes.comparison.on_ray import RayPool
from peft_recipes.comparison.orders import Order
from peft_recipes.comparison.pool import LocalPool
from peft_recipes.trackers.choice import LATER


class Sized(Nodes):
    """Nodes of two CPUs and 8 GB."""

    memory = 8 * 10**9

    def resources(self, threads, gpu):
        return {"cpus": min(threads, 2), "gpus": 0}


@pytest.fixture
def ordered(classify, tmp_path):
    """ordered(arm, memory) -> an order of a comparison, and what was reported of it."""
    reports = []

    def make(arm, **changes):
        recipe = classify(threads=4)
        yaml = tmp_path / "out" / "tiny" / "recipe.yaml"
        yaml.parent.mkdir(parents=True, exist_ok=True)
        recipe.to_yaml(yaml)
        return Order(tmp_path / "out", recipe, (arm, 0), yaml, on_progress=reports.append, **changes)

    make.reports = reports
    return make


def on(nodes):
    """A RayPool on nodes that run nothing."""
    executor = RayPool(None)
    executor._nodes, executor._pool = nodes, Pool(nodes)
    return executor


def test_a_run_asks_for_its_threads_and_the_memory_of_its_plan(ordered):
    executor = on(Sized(**{"tiny lora seed 0": [{"code": 0}]}))
    work = executor._work(ordered("lora", memory_bytes=3 * 10**9))
    assert (work.cpus, work.gpus, work.memory) == (2, 0, 3 * 10**9)
    assert work.environment == {"OMP_NUM_THREADS": "2", LATER: "1"}
    with pytest.raises(on_ray.RecipeError, match=r"Arm 'lora' needs 9.0 GB by the plan, and no node .* 8.0 GB"):
        executor._work(ordered("lora", memory_bytes=9 * 10**9))


class Worker:
    """In place of a worker process: it ends after so many looks as its seed says."""

    def __init__(self, order, slot, start_process):
        self.order, self.slot, self.looks = order, slot, order.job[1]
        self.process = types.SimpleNamespace(returncode=0)

    def has_ended(self):
        self.looks -= 1
        return self.looks <= 0

    def close(self):
        pass


def trained_at_a_time(executor, orders):
    """The memory of the runs that were trained at the same time, at each look."""
    seen = []
    with executor:
        for order in orders:
            executor.submit(order)
        for _ in executor.finished():
            seen.append(sorted(worker.order.memory_bytes // 10**9 for worker in executor._working))
    return seen


@pytest.fixture
def gpu(monkeypatch):
    """This machine seems to have one GPU of 30 GB; workers run nothing."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(total_memory=30 * 10**9))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(pool, "_Worker", Worker)
    monkeypatch.setattr(pool, "conclude", lambda order, code: None)
    monkeypatch.setattr(pool.time, "sleep", lambda seconds: None)


def sized(ordered, *sizes):
    """Orders of so many GB each, on the GPU; the first takes longest."""
    orders = [ordered("lora", memory_bytes=size * 10**9) for size in sizes]
    looks = range(2 * len(sizes), 0, -2)
    recipe = dataclasses.replace(orders[0].recipe, training={})
    return [dataclasses.replace(order, job=("lora", n), recipe=recipe) for order, n in zip(orders, looks, strict=True)]


def test_a_run_starts_only_where_it_fits_next_to_those_running(ordered, gpu):
    executor = LocalPool(4)
    seen = trained_at_a_time(executor, sized(ordered, 15, 20, 5, 5))
    assert seen[0] == [5, 5, 15] and [20] in seen  # the second waits, the smaller ones behind it do not
    assert not any(20 in sizes and 15 in sizes for sizes in seen) and len(executor._free) == 4


def test_auto_trains_as_many_at_a_time_as_fit_whichever_they_are(ordered, gpu):
    executor = LocalPool("auto")
    trained_at_a_time(executor, sized(ordered, 8, 8, 8, 2))
    assert [slot["PEFT_RECIPES_DEVICE_JOBS"] for slot in executor._free] == ["3"] * 3


def test_one_run_at_a_time_is_alone_and_not_marked(ordered, gpu):
    executor = LocalPool(1)
    assert all(len(sizes) <= 1 for sizes in trained_at_a_time(executor, sized(ordered, 100, 1)))
    assert executor._free == [{}]


def test_a_run_that_is_lost_again_and_again_is_a_row_with_the_reason(ordered):
    order = ordered("lora")
    executor = on(Sized(**{"tiny lora seed 0": [{"lost": "its node died"}] * 3}))
    executor.submit(order)
    assert list(all_ended(executor)) == [order]
    run = json.loads((order.folder / "run.json").read_text())
    assert run["status"] == "failed" and (run["arm"], run["seed"]) == ("lora", 0)
    assert run["error"] == "It was started 3 times, and lost each time: its node died."
    assert [progress.state for progress in ordered.reports] == ["running", "running", "failed"]
    assert executor.notes == ["Arm 'lora', seed 0 was started again: its node died."]


def test_a_process_without_a_run_is_a_row_on_any_node(ordered):
    order = ordered("full")
    executor = on(Sized(**{"tiny full seed 0": [{"code": -9}]}))
    executor.submit(order)
    order.folder.joinpath("log.txt").write_text("")
    assert list(all_ended(executor)) == [order]
    assert json.loads((order.folder / "run.json").read_text())["status"] == "out-of-memory"


@pytest.mark.parametrize("executor", [LocalPool, lambda: on(Sized(**{"tiny lora seed 0": [{"code": 0}]}))])
def test_a_cancelled_run_is_not_trained_and_not_yielded(executor, ordered):
    order, executor = ordered("lora"), executor()
    executor.submit(order)
    executor.cancel(order)
    assert list(all_ended(executor)) == []


def test_what_a_node_may_lack_is_found_in_the_recipe(classify, tiny, reviews, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (tmp_path / "data" / f"{name}.csv").write_bytes(reviews.read_bytes())
    recipe = classify(dataset=Dataset("data/*.csv", train=96, validation=24, test=40))
    model = str(tiny("distilbert"))
    assert {one.place for one in needed_files(recipe, with_data=False)} == {model}
    found = {one.place: one.path for one in needed_files(recipe, with_data=True)}
    assert found == {
        model: tiny("distilbert"), "data/a.csv": tmp_path / "data" / "a.csv", "data/b.csv": tmp_path / "data" / "b.csv"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["mine.py:polite", "mine:polite", "package.mine:polite", "json:dumps"])
def test_a_function_of_the_users_is_sent_whether_its_file_or_its_module_is_named(instruct, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "package").mkdir()
    (tmp_path / "json").mkdir()  # not the installed module
    for path in ("mine.py", "package/mine.py", "package/__init__.py"):
        (tmp_path / path).write_text("def polite(prediction, row):\n    return 1.0\n")
    recipe = instruct(score=name)
    sent = {"json:dumps": set(), "package.mine:polite": {"package"}}.get(name, {"mine.py"})
    assert {one.place for one in needed_files(recipe, with_data=False)} - {recipe.model} == sent


def test_a_stand_in_is_sent_since_a_node_would_train_another(classify, tmp_path, monkeypatch):
    from peft_recipes.embedded import cache, stand_ins

    folder = cache.cache_dir() / "models" / "minilm-123"
    monkeypatch.setattr(stand_ins, "model_folder", lambda name: folder)
    (needed,) = needed_files(classify(model="embedded:minilm"), with_data=False)
    assert needed.in_cache and needed.place == "models/minilm-123" and needed.path == folder


def test_hub_ids_are_not_sent(classify):
    recipe = classify(model="distilbert/distilbert-base-uncased", dataset=Dataset("stanfordnlp/imdb"))
    assert needed_files(recipe, with_data=True) == ()


def test_a_node_gets_the_recipe_as_it_was_when_its_run_was_submitted(ordered):
    executor, order = on(Sized()), ordered("lora")
    before = executor._work(order)
    order.yaml.write_text(order.yaml.read_text() + "# an arm was added\n")
    after = executor._work(order)
    assert before.arguments[0] != after.arguments[0] and before.arguments[0] == before.inputs[0]
    assert "was added" not in before.inputs[0].read_text() and "was added" in after.inputs[0].read_text()
    executor.__exit__(None, None, None)
    assert [path.name for path in order.yaml.parent.glob(".recipe-*")] == []


def test_as_many_run_at_a_time_as_the_runs_that_wait_have_room_for(ordered, monkeypatch):
    from peft_recipes.comparison import pool as pools

    monkeypatch.setattr(pools, "jobs_for", lambda jobs, memory, device: min(len(memory), 2))
    pool, slots = LocalPool("auto"), []
    for waiting in (1, 3, 1):  # the base alone, the arms of a seed, the last of them
        pool._waiting = [ordered("lora")] * waiting
        pool._make_slots()
        slots.append(len(pool._free))
    assert slots == [1, 2, 2]
