"""Signals at awkward moments."""

from __future__ import annotations

import os
import signal
import sys
import weakref

import pytest

from peft_recipes.training.interruption import interruptible


class Interrupting:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)


class InterruptingData(dict):
    def __delitem__(self, key):
        os.kill(os.getpid(), signal.SIGINT)
        super().__delitem__(key)


class Key:
    pass


def finalise_an_object():
    Interrupting()


def drop_a_weak_key():
    entries, key = weakref.WeakKeyDictionary(), Key()
    entries.data = InterruptingData()
    entries[key] = 1
    del key


@pytest.mark.parametrize("interrupted", [finalise_an_object, drop_a_weak_key])
def test_an_interrupt_while_an_object_is_finalised_is_not_lost(interrupted, monkeypatch):
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    with pytest.raises(KeyboardInterrupt), interruptible():
        interrupted()
        signal.sigtimedwait([], 5)  # until the signal comes
    assert lost == []
