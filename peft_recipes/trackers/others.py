"""Any other tracker that transformers knows: its own callback, which names and keeps the run as that library does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.trackers.tracker import Identity, Tracker

if TYPE_CHECKING:
    from transformers import TrainerCallback


class TransformersTracker(Tracker):
    """Steps and validation of a training run, then its final figures; nothing after the run has ended.

    The end of training reaches the callback only after the final figures, since most end their run with it. The
    untrained base is not reported.
    """

    def __init__(self, name: str, identity: Identity, folder: Path):
        super().__init__(identity, folder)
        self.name = name
        self._last: tuple[Any, ...] | None = None  # arguments of the last event

    def open(self, config: dict[str, Any], place: dict[str, Any] | None, step: int | None) -> dict[str, Any]:
        return {"id": self.identity.name_in(self.identity.project), "url": None}

    def callback(self) -> TrainerCallback:
        from transformers.integrations.integration_utils import get_reporting_integration_callbacks

        return get_reporting_integration_callbacks([self.name])[0]()

    def event(self, name: str, args: Any, state: Any, control: Any, **more: Any) -> None:
        if name == "on_train_end":
            self._last = (args, state, control, {key: value for key, value in more.items() if key != "logs"})
        else:
            getattr(self.events, name)(args, state, control, **more)

    def add(self, metrics: dict[str, float], texts: dict[str, str], files: Sequence[Path], step: int) -> None:
        if self._last is not None:
            args, state, control, more = self._last
            self.events.on_log(args, state, control, logs=dict(metrics), **more)

    def close(self, status: str) -> None:
        if self._last is not None:
            args, state, control, more = self._last
            self.events.on_train_end(args, state, control, **more)
