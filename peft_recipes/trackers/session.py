"""The open trackers of one run. A tracker that fails becomes a note of the run, and the run goes on without it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from peft_recipes.trackers.others import TransformersTracker
from peft_recipes.trackers.secrets import one_line
from peft_recipes.trackers.tracker import FAILED, FINISHED, KILLED, Identity, Tracker

T = TypeVar("T")

OWN = ("tensorboard", "mlflow", "wandb", "trackio")  # those with a file here: their runs can be opened again
PLACES_FILE = "trackers.json"  # in the run's folder: where its tracker runs are, for a run that is resumed


class Session:
    """The trackers of one run, by name.

    places: of each tracker, what finds its run again; written to run.json. notes: on trackers that failed. ended: those
    whose run was closed without any failure.
    """

    def __init__(self, names: Sequence[str], identity: Identity, folder: Path):
        self._open: dict[str, Tracker] = {name: _tracker(name, identity, folder) for name in names}
        self.places: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self.ended: list[str] = []

    def open(self, config: dict[str, Any], places: dict[str, Any], step: int | None) -> None:
        """Open every tracker; continue the runs at `places`. step: see `Tracker.open`."""
        for name, tracker in list(self._open.items()):
            place = self.attempt(name, lambda t: t.open(config, places.get(t.name), step), opened=False)
            if name in self._open:
                self.places[name] = place or {}
                if (callback := self.attempt(name, lambda t: t.callback())) is not None:
                    tracker.events = callback

    def event(self, name: str, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Pass an event of Trainer on to every tracker."""
        for tracker in list(self._open.values()):
            self.attempt(tracker.name, lambda t: t.event(name, args, state, control, **more))

    def add(self, metrics: dict[str, float], texts: dict[str, str], files: Sequence[Path], step: int) -> None:
        """Add figures, texts and files to every tracker's run."""
        found = [file for file in files if file.is_file()]
        for name in list(self._open):
            self.attempt(name, lambda t: t.add(metrics, texts, found, step))

    def close(self, status: str) -> None:
        """End every tracker's run."""
        for name in list(self._open):
            self.attempt(name, lambda t: t.close(status))
            if self._open.pop(name, None) is not None:
                self.ended.append(name)

    def attempt(self, name: str, call: Callable[[Tracker], T], opened: bool = True) -> T | None:
        """Call a tracker; where that raises, note it and leave the tracker out from here on."""
        try:
            return call(self._open[name])
        except Exception as error:  # whatever its client raises
            self.notes.append(f"{name}: {one_line(error)}. The run went on without this tracker.")
            tracker = self._open.pop(name)
            if opened:
                with contextlib.suppress(Exception):
                    tracker.close(FAILED)
            return None


def _tracker(name: str, identity: Identity, folder: Path) -> Tracker:
    """The tracker of that name: one of ours, else transformers' callback as it is."""
    if name == "tensorboard":
        from peft_recipes.trackers.tensorboard import TensorBoard as kind
    elif name == "mlflow":
        from peft_recipes.trackers.mlflow import MLflow as kind
    elif name == "wandb":
        from peft_recipes.trackers.wandb import WeightsAndBiases as kind
    elif name == "trackio":
        from peft_recipes.trackers.trackio import Trackio as kind
    else:
        return TransformersTracker(name, identity, folder)
    return kind(identity, folder)


@contextlib.contextmanager
def closing(session: Session) -> Iterator[Session]:
    """Close the session as FINISHED; as FAILED after an error, as KILLED after an interruption."""
    status = KILLED
    try:
        yield session
        status = FINISHED
    except Exception:
        status = FAILED
        raise
    finally:
        session.close(status)


def read_places(folder: Path, signature: str) -> dict[str, Any]:
    """Where the tracker runs of an unfinished run are; {} where it is a run of another signature."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        stored = json.loads((folder / PLACES_FILE).read_text(encoding="utf-8"))
        if stored.get("signature") == signature:
            return dict(stored["places"])
    return {}
