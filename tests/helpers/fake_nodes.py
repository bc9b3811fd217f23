"""Nodes of a cluster that run nothing and are lost when a test wants it."""

from __future__ import annotations

from peft_recipes.cluster.nodes import Lost


class Task(list):
    """The end of a start, its number and its work."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


class Nodes:
    """Nodes that run nothing: each start of a process takes the next of its prepared ends."""

    def __init__(self, **ends):
        self.ends, self.waiting, self.started, self.cancelled, self.sent = ends, [], [], [], []

    def start(self, work, number, sent, driver):
        self.started.append(work.name)
        self.sent.append(sent)
        assert driver.mark.read_text() == driver.content
        task = Task([self.ends[work.name].pop(0), number, work])
        self.waiting += [(number, *event) for event in task[0].get("events", [])]
        return task

    def wait(self, tasks, seconds):
        return [tasks[0]]

    def result(self, task):
        if "lost" in task[0]:
            raise Lost(task[0]["lost"], task[0].get("out_of_memory", False))
        return task[0]

    def events(self):
        taken, self.waiting = self.waiting, []
        return taken

    def put(self, pieces):
        return list(pieces)

    def fetch(self, pieces):
        yield from pieces

    def clean(self, content):
        self.cleaned = content

    def cancel(self, task, force):
        self.cancelled.append((task[2].name, force))
