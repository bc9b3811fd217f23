"""What happens on a node, without Ray: a process in the driver's folder or in the node's own, and what it sends."""

from __future__ import annotations

import _thread
import dataclasses
import sys

import pytest

from peft_recipes.cluster import node
from peft_recipes.cluster.node import Driver, Sent
from peft_recipes.cluster.packing import digest, pack, receive
from peft_recipes.cluster.work import Needed, Work
from peft_recipes.hardware.environment import code_version

# Reads its inputs, writes two checkpoints and its result; the second argument is a file of the user.
PROCESS = """
import os, pathlib, sys, time
folder, data, mine = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
for step in (1, 2):
    written = folder / "trainer" / f"checkpoint-{step}"
    written.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"step": %d}\\n' % step)
    time.sleep(0.5)
text = pathlib.Path(data).read_text() + pathlib.Path(mine).read_text() + os.environ["PEFT_RECIPES_JOBS"]
(folder / "run.json").write_text(text)
"""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A driver's folder with a process to run, and its description."""
    (tmp_path / "driver" / "out").mkdir(parents=True)
    for path, text in {"process.py": PROCESS, "out/data": "data ", "mine.txt": "mine "}.items():
        (tmp_path / "driver" / path).write_text(text)
    mark = tmp_path / "driver" / "out" / ".mark"
    mark.write_text("123")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "driver"))
    return Driver(mark, "123", str(tmp_path / "driver"), code_version(), node.versions())


@pytest.fixture
def work(tmp_path):
    base = tmp_path / "driver" / "out"
    return Work(
        "a", "process", (base / "a", base / "data", "mine.txt"), base, base / "a", inputs=(base / "data",),
        needed=(Needed(tmp_path / "driver" / "mine.txt", "mine.txt"),),
    )  # fmt: skip


def start(work, sent, driver, **options):
    """Run the work here; return the result and its events."""
    events = []
    tell = lambda kind, content: events.append((kind, content))  # noqa: E731
    return node.run(work, sent, driver, tell, lambda piece: piece, lambda piece: piece, options.get("jobs", 2)), events


def sent(work, **changes):
    stored = lambda path: list(pack(path.parent, [path.name]))  # noqa: E731
    needed = {one.place: (digest(one.path), stored(one.path)) for one in work.needed}
    return Sent(**{"inputs": tuple(map(stored, work.inputs)), "needed": needed} | changes)


def test_on_a_shared_disk_the_process_writes_to_the_drivers_folder(work, driver):
    result, events = start(work, None, driver)
    assert result == {"code": 0} and (work.folder / "run.json").read_text() == "data mine 2"
    assert events[0] == ("started", {"shared": True, "versions": {}})
    assert ("line", b'{"step": 2}') in events and "checkpoint" not in dict(events)


def test_elsewhere_it_works_in_the_nodes_folder_and_everything_comes_back(work, driver, tmp_path, monkeypatch):
    monkeypatch.setenv(node.NODE_DIR, str(tmp_path / "node"))
    assert start(work, None, driver)[0] == {"send": ["mine.txt"]}
    result, events = start(work, sent(work), driver)
    assert result["code"] == 0 and not work.folder.exists()
    kinds = [kind for kind, _ in events]
    assert kinds[0] == "started" and "checkpoint" in kinds and "line" in kinds
    receive(result["pieces"], work.folder, last="run.json")
    assert (work.folder / "run.json").read_text() == "data mine 2" and (work.folder / "log.txt").exists()
    assert not list((tmp_path / "node").rglob("run.json"))  # the node keeps no copy


def test_it_goes_on_from_the_checkpoints_that_the_driver_has(work, driver, tmp_path, monkeypatch):
    monkeypatch.setenv(node.NODE_DIR, str(tmp_path / "node"))
    earlier = tmp_path / "earlier"
    (earlier / "trainer" / "checkpoint-0").mkdir(parents=True)
    (earlier / "trainer" / "checkpoint-0" / "state").write_text("of the driver")
    result, _ = start(work, sent(work, own=list(pack(earlier))), driver)
    receive(result["pieces"], work.folder)
    assert (work.folder / "trainer" / "checkpoint-0" / "state").read_text() == "of the driver"


def test_a_file_that_differs_or_can_not_be_copied_is_refused_in_one_line(work, driver, tmp_path, monkeypatch):
    monkeypatch.setenv(node.NODE_DIR, str(tmp_path / "node"))
    absolute = dataclasses.replace(work, needed=(Needed(work.needed[0].path, str(tmp_path / "there.txt")),))
    (tmp_path / "there.txt").write_text("another")
    refused = start(absolute, sent(absolute), driver)[0]["refused"]
    assert "is not the same as on this machine" in refused and "\n" not in refused
    impossible = dataclasses.replace(work, needed=(Needed(work.needed[0].path, "/proc/none/mine.txt"),))
    refused = start(impossible, sent(impossible), driver)[0]["refused"]
    assert "A node has no /proc/none/mine.txt, and it can't be copied there" in refused and "\n" not in refused


def test_other_code_is_refused_and_other_versions_are_named(work, driver):
    refused = start(work, None, dataclasses.replace(driver, code="0.0.9+abc"))[0]["refused"]
    assert code_version() in refused and "0.0.9+abc" in refused
    _, events = start(work, None, dataclasses.replace(driver, versions={**driver.versions, "torch": "1.0"}))
    assert list(events[0][1]["versions"]) == ["torch"]


ENDS = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def end(*_):
    time.sleep(0.3)
    (folder / "trainer" / "checkpoint-1").mkdir(parents=True)
    sys.exit()
signal.signal(signal.SIGTERM, end)
(folder / "log.jsonl").write_text('{"step": 1}\\n')
signal.pause()
"""


def test_a_process_ends_with_its_task_and_its_last_checkpoint_is_sent(work, driver, tmp_path, monkeypatch):
    """Ray raises KeyboardInterrupt in a task that is cancelled, again and again until it has ended."""
    monkeypatch.setenv(node.NODE_DIR, str(tmp_path / "node"))
    (tmp_path / "driver" / "process.py").write_text(ENDS)
    sent_here, interrupt = [], node.interrupt

    def tell(kind, content):
        sent_here.append(kind)
        if sent_here.count("line") == 1 and kind == "line":
            raise KeyboardInterrupt

    def interrupted_again(*arguments):
        _thread.interrupt_main()
        interrupt(*arguments)

    monkeypatch.setattr(node, "interrupt", interrupted_again)
    with pytest.raises(KeyboardInterrupt):
        node.run(work, sent(work), driver, tell, lambda piece: piece, lambda piece: piece, 1)
    assert sent_here == ["started", "line", "line", "checkpoint"]
    assert list((tmp_path / "node").rglob("checkpoint-1")) and not list((tmp_path / "node").rglob("run.json"))


def test_the_module_is_light():
    import subprocess

    code = "import peft_recipes.cluster.nodes, sys; print({'torch', 'transformers', 'peft', 'ray'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
