"""The driver's pool, with nodes that are lost when a test wants it; no Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_nodes import Nodes
from worker_processes import all_ended

from peft_recipes.cluster.packing import pack
from peft_recipes.cluster.pool import Pool
from peft_recipes.cluster.work import Work
from peft_recipes.errors import RecipeError


@pytest.fixture
def work(tmp_path):
    def make(name, **changes):
        return Work(name, "module", (), tmp_path, tmp_path / name, **changes)

    return make


DIED, OK = {"lost": "its node died"}, {"code": 0}


def test_each_process_is_reported_once_as_it_ends_and_more_may_follow(work):
    with Pool(Nodes(a=[OK], b=[{"code": 1}], c=[OK])) as pool:
        pool.submit(work("a"))
        pool.submit(work("b"))
        seen = []
        for one, outcome in all_ended(pool):
            seen.append((one.name, outcome.code))
            if one.name == "b":
                pool.submit(work("c"))
    assert seen == [("a", 0), ("b", 1), ("c", 0)]


def test_a_lost_process_is_started_again_and_counted_once(work):
    nodes, events = Nodes(a=[DIED, OK], b=[OK]), []
    with Pool(nodes) as pool:
        pool.submit(work("a"), lambda *event: events.append(event))
        pool.submit(work("b"))
        ended = sorted((one.name, outcome.code, outcome.attempts) for one, outcome in all_ended(pool))
    assert ended == [("a", 0, 2), ("b", 0, 1)] and nodes.started == ["a", "b", "a"]
    assert ("lost", "its node died") in events


def test_a_process_that_is_lost_again_and_again_ends_with_the_reason(work):
    nodes = Nodes(a=[DIED, DIED, {"lost": "its node ran out of memory", "out_of_memory": True}])
    with Pool(nodes) as pool:
        pool.submit(work("a"))
        ((_, outcome),) = all_ended(pool)
    assert outcome.code is None and outcome.out_of_memory and outcome.attempts == 3
    assert outcome.lost == (
        "It was started 3 times, and lost each time: its node died; its node died; its node ran out of memory."
    )


def test_what_a_lost_start_still_sends_is_ignored(work, tmp_path):
    nodes, lines = Nodes(a=[DIED, OK]), []
    with Pool(nodes) as pool:
        pool.submit(work("a"), lambda kind, content: lines.append(content) if kind == "line" else None)
        nodes.waiting.append((1, "line", b"of the first start"))
        ended = all_ended(pool)
        start = nodes.start

        def restart(*arguments):
            nodes.waiting += [(1, "line", b"late"), (2, "line", b"of the second start")]
            return start(*arguments)

        nodes.start = restart
        assert len(list(ended)) == 1
        pool._take_events()
    assert b"late" not in lines and b"of the first start" in lines


def checkpoint(folder: Path, step: int) -> dict:
    """The event of a node that sends a checkpoint."""
    name = f"trainer/checkpoint-{step}"
    (folder / name).mkdir(parents=True)
    (folder / name / "weights").write_text(f"of step {step}")
    (folder / "log.jsonl").write_text(f'{{"step": {step}}}\n')
    return {"names": [name, "log.jsonl"], "pieces": list(pack(folder, [name, "log.jsonl"]))}


def test_without_a_shared_disk_a_lost_process_goes_on_from_the_checkpoint_that_was_sent(work, tmp_path):
    one = work("a", inputs=(tmp_path / "r.yaml",))
    (tmp_path / "r.yaml").write_text("recipe")
    sent = [("checkpoint", checkpoint(tmp_path / "node", step)) for step in (2, 4)]
    done = tmp_path / "done"
    done.mkdir()
    (done / "run.json").write_text("{}")
    nodes = Nodes(a=[{"send": []}, DIED | {"events": sent}, {"code": 0, "pieces": list(pack(done))}])
    with Pool(nodes) as pool:
        pool.submit(one)
        ((_, outcome),) = all_ended(pool)
    first, second, third = nodes.sent
    assert nodes.cleaned
    assert first is None and second.own is None and outcome.attempts == 2  # to be asked for files is no start
    from peft_recipes.cluster.packing import unpack

    unpack(third.own, tmp_path / "own")
    assert [p.name for p in (tmp_path / "own" / "trainer").iterdir()] == ["checkpoint-4"]
    assert [p.name for p in one.folder.iterdir()] == ["run.json"]


def test_a_node_that_refuses_ends_all(work):
    nodes = Nodes(a=[{"refused": "A node has another version."}], b=[OK])
    with pytest.raises(RecipeError, match="another version"), Pool(nodes) as pool:
        pool.submit(work("a"))
        pool.submit(work("b"))
        list(all_ended(pool))
    assert nodes.cancelled[:2] == [("a", False), ("b", False)]


def test_an_interruption_lets_processes_write_a_checkpoint_and_a_second_one_does_not_wait(work):
    nodes = Nodes(a=[OK], b=[OK])
    with pytest.raises(KeyboardInterrupt), Pool(nodes) as pool:
        pool.submit(work("a"))
        pool.submit(work("b"))
        nodes.wait = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        list(all_ended(pool))
    assert nodes.cancelled == [("a", False), ("b", False), ("a", True), ("b", True)]


def test_a_cancelled_process_is_not_reported(work):
    nodes = Nodes(a=[OK], b=[OK])
    with Pool(nodes) as pool:
        first = work("a")
        pool.submit(first)
        pool.submit(work("b"))
        pool.cancel(first)
        assert [one.name for one, _ in all_ended(pool)] == ["b"]
    assert nodes.cancelled == [("a", False)]


def test_a_cancelled_process_that_had_started_is_waited_for(work):
    started = {**OK, "events": [("started", {"shared": True, "versions": {}})]}
    nodes, waits = Nodes(a=[started]), []
    with Pool(nodes) as pool:
        first = work("a")
        pool.submit(first)
        pool._take_events()
        nodes.wait = lambda tasks, seconds: waits.append(len(tasks)) or ([] if len(waits) == 1 else tasks)
        pool.cancel(first, keep=True)
    assert waits == [1, 1] and nodes.cancelled == [("a", False)]


def test_processes_that_find_no_room_are_noticed_once(work, monkeypatch):
    from peft_recipes.cluster import pool as pools

    monkeypatch.setattr(pools, "_UNPLACED_SECONDS", 0)
    nodes, seen = Nodes(a=[OK]), []
    wait, waits = nodes.wait, iter([[], [], [], None])
    nodes.wait = lambda *arguments: wait(*arguments) if (ended := next(waits)) is None else ended
    with Pool(nodes) as pool:
        pool.submit(work("a"), lambda kind, _: seen.append(kind))
        assert len(list(all_ended(pool))) == 1
    assert seen == ["unplaced"]
