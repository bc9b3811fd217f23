"""What the watchdog calls a hang: every rank waits, at least one of them surely in a collective."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from peft_recipes.distributed.watchdog import position, timeout, verdict
from peft_recipes.errors import RecipeError


def waits(seconds, operation="all_gather (a.py:1, in f)", sure=True):
    return {"waited": seconds, "operation": operation, "sure": sure}


BACKWARD = waits(700, "backward (b.py:2, in g)", sure=False)


@pytest.mark.parametrize(
    ("states", "silent", "hangs"),
    [
        ([waits(700), waits(601, "from_rank_zero (c.py:3, in h)")], [0, 0], True),
        ([waits(700), BACKWARD], [0, 0], True),
        ([waits(700), {}], [0, 0], False),  # rank 1 computes, loads or saves, however long
        ([waits(700), waits(599)], [0, 0], False),
        ([BACKWARD, BACKWARD], [0, 0], False),  # may be a slow step
        ([waits(700), {}], [0, 700], True),  # rank 1 is stopped, or its machine unreachable
        ([{}, waits(700)], [0, 700], False),
        ([waits(700), waits(700)], [0, 400], False),  # rank 1's last words are old: it may have gone on since
        ([waits(700), waits(700), {}, waits(700)], [0, 0, 0, 0], False),
    ],
)
def test_a_hang_is_when_no_rank_can_go_on(states, silent, hangs):
    message = verdict(states, silent, 600)
    assert (message is not None) == hangs
    for number, state in enumerate(states if hangs else []):
        assert f"process {number} for" in message or silent[number] >= 600
        assert state.get("operation", "") in message


def test_a_rank_that_computes_does_not_wait():
    assert position(sys._getframe()) is None


@pytest.mark.parametrize("text", ["0", "-1", "soon", ""])
def test_a_timeout_that_is_no_number_is_refused(monkeypatch, text):
    monkeypatch.setenv("PEFT_RECIPES_HANG_SECONDS", text)
    with pytest.raises(RecipeError, match=r"PEFT_RECIPES_HANG_SECONDS=.*number of seconds above 0; the default is 600"):
        timeout()
    monkeypatch.setenv("PEFT_RECIPES_HANG_SECONDS", "2.5")
    assert timeout() == 2.5


ENDS = """
import atexit, threading
import torch.distributed as dist
from peft_recipes.distributed.watchdog import Watchdog

atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))  # called after the watchdog's
store = dist.TCPStore("127.0.0.1", 0, is_master=True)
Watchdog(store.clone(), 0, 1, lambda: "failure").start()
while not store.check(["peft_recipes/watchdog/0"]):
    pass
"""


def test_the_watching_thread_ends_before_python_exits():
    """Within a call of the store, it aborts the process: "terminate called without an active exception"."""
    environment = os.environ | {"PEFT_RECIPES_HANG_SECONDS": "0.0001"}
    run = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stdout, run.stderr) == (0, "['MainThread']\n", "")
