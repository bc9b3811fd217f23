"""Comparisons on a real Ray cluster of two nodes on this machine, one with a disk of its own; one of them dies.

A worker process imports the libraries for six seconds, so there is one comparison, in which everything happens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal

import psutil
import pytest
from small import compared_here
from tracker_stores import from_mlflow
from worker_processes import all_ended

from peft_recipes import compare
from peft_recipes.cluster.work import Needed, Work
from peft_recipes.runs.folder import read_run

pytest.importorskip("ray")

QUICK = {  # a dead node is noticed within a second
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 200, "health_check_failure_threshold": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster of two nodes: the head works in a folder of its own, the other one in this test's folders."""
    from ray.cluster_utils import Cluster

    options = {"object_store_memory": 80_000_000, "num_cpus": 1, "include_log_monitor": False}
    own = tmp_path_factory.mktemp("own")
    head = {**options, "include_dashboard": False, "_system_config": QUICK}
    head["env_vars"] = {"PEFT_RECIPES_NODE_DIR": str(own)}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.shared, made.own_folder = made.add_node(**options), own
    yield made
    made.shutdown()


def daemon(node):
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def arm_on(node):
    """The arm of the run that a node is training."""
    module = "peft_recipes.comparison.worker"
    for process in daemon(node).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if module in (words := process.cmdline()):
                return words[words.index(module) + 2]
    return None


def die(node):
    """End a node as a power cut does: its daemon, its Ray workers and their processes at once."""
    for process in [daemon(node), *daemon(node).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


WAITS = """
import pathlib, signal, sys
folder = pathlib.Path(sys.argv[1])
(folder / "trainer" / "checkpoint-1").mkdir(parents=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
try:
    (folder / "log.jsonl").write_text('{"step": 1}\\n')
    signal.pause()
except SystemExit:
    (folder / "trainer" / "checkpoint-2").mkdir()
"""


def test_an_interruption_ends_the_processes_and_keeps_their_last_checkpoints(cluster, tmp_path, monkeypatch):
    from peft_recipes.cluster.nodes import RayNodes
    from peft_recipes.cluster.pool import Pool

    (tmp_path / "waits.py").write_text(WAITS)
    monkeypatch.chdir(tmp_path)
    started = set()

    def work(name):
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        needed = (Needed(tmp_path / "waits.py", "waits.py"),)
        return Work(name, "waits", (folder,), tmp_path / "out", folder, needed=needed)

    def interrupt_once_both_wait(name, kind):
        before = len(started)
        started.update({name} if kind == "line" else ())
        if before == 1 and len(started) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), RayNodes(cluster.address) as nodes, Pool(nodes) as pool:
        for name in "ab":  # one on each node
            pool.submit(work(name), lambda kind, _, name=name: interrupt_once_both_wait(name, kind))
        list(all_ended(pool))
    assert [(tmp_path / "out" / name / "trainer" / "checkpoint-2").is_dir() for name in "ab"] == [True, True]
    assert not list((tmp_path / "out").glob(".driver*"))


def test_a_node_that_dies_changes_no_figure_and_nothing_counts_twice(cluster, classify, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")  # which the nodes do not have
    training = {**classify().training, "max_steps": 80}
    recipe = classify(training=training, checkpoint_seconds=0, skip_checks=["fresh-process"])
    arms, ended, notes, dead = ["full", "lora"], [], [], []
    options = {"output": tmp_path / "ray", "on": "ray", "address": cluster.address}

    def follow(progress):
        notes.append(progress.note)
        if progress.state != "running":
            ended.append((*progress.job, progress.state))
        elif progress.step >= 2 and not dead and progress.job[0] == arm_on(cluster.shared):
            dead.append(progress.job[0])
            die(cluster.shared)

    tracked = dataclasses.replace(recipe, training={**training, "report_to": ["mlflow"]})
    made = compare(tracked, arms, on_progress=follow, **options)
    here = compared_here(recipe, arms, [0], tmp_path / "here")
    assert made.failed == [] and sorted(ended) == [(arm, 0, "ok") for arm in ("base", "full", "lora")]
    for arm in arms:
        assert made.data["arms"][arm]["metrics"] == here.data["arms"][arm]["metrics"]
        assert made.data["arms"][arm]["seeds"] == [0]
    assert made.data["base"]["metrics"] == here.data["base"]["metrics"]
    assert made.data["differences"] == here.data["differences"]

    (arm,) = dead
    assert any("started again: its node died" in note for note in notes)
    assert any(f"Arm '{arm}', seed 0 was started again: its node died" in note for note in made.data["notes"])
    run = json.loads((made.folder / arm / "seed-0" / "run.json").read_text())
    assert run["training"]["resumed_at_steps"][0] >= 1  # from a checkpoint on this disk, sent to the other node
    assert not list(cluster.own_folder.rglob("run.json")) and not list(made.folder.glob(".driver*"))
    reported = from_mlflow(tmp_path, read_run(made.folder / arm / "seed-0"))
    assert [*reported["losses"]] == [*range(1, 81)] and reported["texts"]["comparison/verdict"]
    assert not [note for note in made.data["notes"] if "mlflow" in note]

    kept = []
    compare(recipe, arms, on_progress=lambda progress: kept.append(progress.state), **options)
    assert kept == ["kept"] * 3
