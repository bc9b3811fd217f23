"""`Work`: one process to be started on some node; `Outcome`: how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Needed:
    """A file or folder of the user outside `Work.base`, which a node without the driver's disk may lack.

    path: on the driver. place: where the process looks for it on the node: absolute, or relative to its current folder;
    with `in_cache`, relative to the package's cache folder.
    """

    path: Path
    place: str
    in_cache: bool = False


@dataclass(frozen=True)
class Work:
    """One process: `python -m module *arguments` in the current folder of the driver; it writes to `folder`.

    name: for messages. base: a folder of the driver; a node that does not see it works in a folder of its own, and the
    paths among the arguments, which lie below `base`, are moved there. inputs: what the process reads below `base`.
    needed: what it reads elsewhere. checkpoints: of `folder`, where the process writes complete checkpoints, each a
    folder that appears at once. log: of `folder`, what the process appends a line to when it makes progress.
    result: of `folder`, what it writes last. cpus, gpus, memory (bytes): what it takes of a node.
    Without a module no process is started.
    """

    name: str
    module: str
    arguments: tuple[str | Path, ...]
    base: Path
    folder: Path
    inputs: tuple[Path, ...] = ()
    needed: tuple[Needed, ...] = ()
    checkpoints: str = "trainer"
    log: str = "log.jsonl"
    environment: dict[str, str] = field(default_factory=dict)
    result: str = "run.json"
    cpus: int = 1
    gpus: int = 0
    memory: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a process ended. code: its exit code; None where it was lost with its node, too often, for the reason `lost`.

    out_of_memory: Ray ended it because its node ran out of memory. attempts: how often it was started.
    """

    code: int | None
    lost: str = ""
    out_of_memory: bool = False
    attempts: int = 1
    facts: dict[str, Any] = field(default_factory=dict)
