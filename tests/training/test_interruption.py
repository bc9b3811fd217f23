"""Signals at awkward moments."""

from __future__ import annotations

import os
import signal
import sys
import weakref

import pytest

from peft_recipes.training.interruption import interruptible


class Thing:
    pass


class Interrupting:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)


def of_a_weak_value():
    """A dictionary whose entry goes when its value does, while a signal arrives."""

    class Key:
        def __hash__(self):
            return 1

        def __eq__(self, other):
            os.kill(os.getpid(), signal.SIGINT)
            return self is other

    entries, key, other = weakref.WeakKeyDictionary(), Key(), Key()
    entries[key] = entries[other] = 1
    del key


@pytest.mark.parametrize("interrupted", [lambda: Interrupting() and None, of_a_weak_value], ids=["__del__", "weakref"])
def test_an_interrupt_while_an_object_is_finalised_is_not_lost(interrupted, monkeypatch):
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    with pytest.raises(KeyboardInterrupt), interruptible():
        interrupted()
        signal.sigtimedwait([], 5)  # until the signal comes
    assert lost == []
