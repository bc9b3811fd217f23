"""What happens on a node: the process of one `Work` is started and watched, and its folder sent back.

`run` is a Ray task. It imports neither torch nor transformers: the process it starts does. Where the node sees the
driver's folder, the process works there; elsewhere in a folder of the node's own, below `$PEFT_RECIPES_NODE_DIR`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft_recipes
from peft_recipes.cluster.packing import digest, pack, unpack
from peft_recipes.cluster.work import Needed, Work
from peft_recipes.distributed.processes import JOBS
from peft_recipes.embedded.cache import cache_dir
from peft_recipes.errors import RecipeError
from peft_recipes.hardware.environment import code_version
from peft_recipes.runs.checkpoints import newest_name
from peft_recipes.runs.log import last_line
from peft_recipes.runs.subprocesses import ending_together, interrupt

NODE_DIR = "PEFT_RECIPES_NODE_DIR"  # set on a node: its runs work there, whether or not it sees the driver's disk
VERSIONS = ("torch", "transformers", "peft", "trl", "accelerate")  # named where a node's differ from the driver's
_POLL_SECONDS = 0.2
_KEPT_DAYS = 7  # folders of drivers that were killed

Tell = Callable[[str, Any], None]


@dataclass(frozen=True)
class Sent:
    """What the driver put into the object store for nodes that do not see its disk, as references to the pieces.

    inputs: of each entry of `Work.inputs`. needed: place -> (digest, pieces) of `Work.needed`. own: of the checkpoints
    that the driver has of this process.
    """

    inputs: tuple[list[Any], ...] = ()
    needed: dict[str, tuple[str, list[Any]]] = field(default_factory=dict)
    own: list[Any] | None = None


@dataclass(frozen=True)
class Driver:
    """The driver's side. mark, content: a file that it wrote. current: its folder. code: the version of its sources."""

    mark: Path
    content: str
    current: str
    code: str
    versions: dict[str, str]


def run(work: Work, sent: Sent | None, driver: Driver, tell: Tell, put: Any, get: Any, jobs: int) -> dict[str, Any]:
    """Start the process and wait for its end; return its exit `code`, and without a shared disk the `pieces`.

    sent: None while the driver doesn't know that it has to send anything; then `send` is returned where it has to.
    tell: passes an event to the driver. put, get: of the object store. jobs: how many processes this node runs at a
    time. Where the node can't run it, `refused` says why in one line.
    """
    if not work.module:
        return {"code": 0}
    if (own := code_version()) != driver.code:
        return {"refused": f"A node of the cluster has peft_recipes {own}, this machine {driver.code}. Install the "
                           "same version on all nodes: other code gives other figures."}  # fmt: skip
    facts = {"versions": {name: v for name, v in versions().items() if v != driver.versions.get(name)}}
    shared = NODE_DIR not in os.environ and _holds(driver.mark, driver.content)
    tell("started", {"shared": shared, **facts})
    try:
        if shared:
            return {"code": _train(_Place(work), driver.current, {}, tell, None, jobs)}
        place = _Place(work, _node_dir() / driver.content)
        if sent is None or place.lacks(sent):
            return {"send": place.lacks(sent or Sent())}
        place.fill(sent, get)
        cache = {"PEFT_RECIPES_CACHE": str(place.cache)} if any(one.in_cache for one in work.needed) else {}
        place.current.mkdir(parents=True, exist_ok=True)
        code = _train(place, str(place.current), cache, tell, put, jobs)
        pieces = [put(piece) for piece in pack(place.folder)]
        shutil.rmtree(place.folder, ignore_errors=True)
        return {"code": code, "pieces": pieces}
    except RecipeError as error:
        return {"refused": str(error)}


@functools.cache
def versions() -> dict[str, str]:
    """The installed versions of the packages that compute."""
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name).split("+")[0]
    return found


def clean(content: str) -> None:
    """Delete what a driver has sent to this node."""
    shutil.rmtree(_node_dir() / content, ignore_errors=True)


def _holds(mark: Path, content: str) -> bool:
    try:
        return mark.read_text(encoding="utf-8") == content
    except (OSError, ValueError):
        return False


def _node_dir() -> Path:
    """The folder of this node's runs; deletes what drivers left there that were killed."""
    folder = Path(os.environ.get(NODE_DIR) or cache_dir() / "node").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if time.time() - old.stat().st_mtime > _KEPT_DAYS * 86_400:
                shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise RecipeError(
            f"A node can't write to {folder} ({error.strerror}). Set {NODE_DIR} before `ray start` there."
        ) from error
    return folder


class _Place:
    """Where a node's process works: the driver's folder (root None), or one below `root`, filled with what was sent."""

    def __init__(self, work: Work, root: Path | None = None):
        self.work, self.root = work, root
        self.folder = self.here(work.folder)
        if root is not None:
            self.current, self.cache = root / "current", root / "cache"

    def here(self, path: Path) -> Path:
        return path if self.root is None else self.root / "base" / path.relative_to(self.work.base)

    def command(self) -> list[str]:
        words = [str(self.here(word)) if isinstance(word, Path) else word for word in self.work.arguments]
        return [sys.executable, "-m", self.work.module, *words]

    def target(self, needed: Needed) -> Path:
        """Where a needed file belongs on this node."""
        return (self.cache if needed.in_cache else self.current) / Path(needed.place)  # an absolute place stays

    def lacks(self, sent: Sent) -> list[str]:
        """The places of needed files that are neither here nor sent."""
        return [one.place for one in self.work.needed if one.place not in sent.needed]

    def fill(self, sent: Sent, get: Any) -> None:
        """Write what was sent to its places, once for all processes of this node."""
        from filelock import FileLock

        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(str(self.root / ".filling")):
            for path, pieces in zip(self.work.inputs, sent.inputs, strict=True):
                self._place(self.here(path), pieces, get)
            for needed in self.work.needed:
                expected, pieces = sent.needed[needed.place]
                self._place_needed(self.target(needed), expected, pieces, get)
            if sent.own is not None and not (self.folder / self.work.checkpoints).is_dir():
                shutil.rmtree(self.folder, ignore_errors=True)
                unpack((get(piece) for piece in sent.own), self.folder)

    def _place(self, target: Path, pieces: list[Any], get: Any) -> None:
        """Write one file or folder, which was packed in a folder that holds it alone."""
        if target.exists():
            return
        box = target.with_name(f".{target.name}.box")
        shutil.rmtree(box, ignore_errors=True)
        unpack((get(piece) for piece in pieces), box)
        os.replace(box / target.name, target)
        box.rmdir()

    def _place_needed(self, target: Path, expected: str, pieces: list[Any], get: Any) -> None:
        if target.exists():
            if digest(target) != expected:
                raise RecipeError(
                    f"{target} on a node is not the same as on this machine. Make them equal, give the recipe a "
                    "relative path, or put the file on a disk that all nodes see."
                )
            return
        try:
            self._place(target, pieces, get)
        except OSError as error:
            raise RecipeError(
                f"A node has no {target}, and it can't be copied there ({error.strerror}). Give the recipe a relative "
                "path or a Hub id, or put it on a disk that all nodes see."
            ) from error


def _train(place: _Place, current: str, extra: dict[str, str], tell: Tell, put: Any, jobs: int) -> int:
    """Start the process and watch it until it ends; send its checkpoints where `put` is given."""
    place.folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **_found_package(), JOBS: str(jobs), **place.work.environment, **extra}
    with (place.folder / "log.txt").open("wb") as log, ending_together() as processes:
        # In a session of its own, with a pipe that closes when this Ray worker dies: the process then ends itself.
        pipes = {"stdin": subprocess.PIPE, "stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(place.command(), cwd=current, env=environment, start_new_session=True, **pipes)
        processes.append(process)
        try:
            with contextlib.closing(_news(place, tell, put)) as news:
                while process.poll() is None:
                    next(news)
                    time.sleep(_POLL_SECONDS)
        except BaseException:
            with _undisturbed():
                _end(process, place, tell, put)
            raise
    return process.returncode


def _found_package() -> dict[str, str]:
    """PYTHONPATH for a package that is not installed, which a Ray worker finds by the driver's sys.path."""
    folder = Path(peft_recipes.__file__).parents[1]
    if folder.name in ("site-packages", "dist-packages"):
        return {}
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore SIGINT: Ray repeats it every few seconds until a cancelled task has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(process: subprocess.Popen[bytes], place: _Place, tell: Tell, put: Any) -> None:
    """Interrupt the process, wait for its last checkpoint and send it."""
    interrupt([process], signal.SIGTERM)  # processes of Ray have SIGINT blocked, and this one inherits it
    next(_news(place, tell, put))


def _news(place: _Place, tell: Tell, put: Any) -> Iterator[None]:
    """At each step, tell the driver the log's last line and, where `put` is given, send the newest checkpoint."""
    line, sent, not_before, kept = b"", "", 0.0, []
    while True:
        if (latest := last_line(place.folder / place.work.log)) not in (b"", line):
            line = latest
            tell("line", line)
        name = newest_name(place.folder / place.work.checkpoints) if put else None
        if name not in (None, sent) and time.monotonic() >= not_before:
            start, sent = time.monotonic(), name
            names = [f"{place.work.checkpoints}/{name}", place.work.log]
            with contextlib.suppress(OSError):  # deleted meanwhile: there is a newer one
                kept = [put(piece) for piece in pack(place.folder, names)]
                tell("checkpoint", {"names": names, "pieces": kept})
            not_before = time.monotonic() + 9 * (time.monotonic() - start)  # at most a tenth of the time
        yield
