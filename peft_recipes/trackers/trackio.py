"""trackio: a project for each recipe, a group for each comparison; a local database, or a Space of the user's."""

from __future__ import annotations

import contextlib
import contextvars
import io
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from peft_recipes.trackers.tracker import Tracker

if TYPE_CHECKING:
    from transformers import TrainerCallback


class Trackio(Tracker):
    """A run beside any that the caller has open. TRACKIO_PROJECT, TRACKIO_DIR and TRACKIO_SPACE_ID are honoured."""

    name = "trackio"

    def open(self, config: dict[str, Any], place: dict[str, Any] | None, step: int | None) -> dict[str, Any]:
        project = (place or {}).get("project") or os.getenv("TRACKIO_PROJECT") or self.identity.project
        name = self.identity.name_in(project)
        # In a context of its own: trackio's current run is a context variable.
        self._run = contextvars.copy_context().run(self._start, project, name, config, "must" if place else "never")
        if place is not None and self._run.id != place["id"]:
            raise RuntimeError(f"the newest run '{name}' of project '{project}' is another one")
        if place is not None and step is not None:
            self.seen = self._last_steps(project, name)
        space = os.getenv("TRACKIO_SPACE_ID")
        return {"id": self._run.id, "url": space and f"https://huggingface.co/spaces/{space}", "project": project}

    def _start(self, project: str, name: str, config: dict[str, Any], resume: str) -> Any:
        import trackio

        trackio.context_vars.current_run.set(None)
        with contextlib.redirect_stdout(io.StringIO()):  # stdout is one JSON document under --json
            return trackio.init(
                project, name, group=self.identity.group, config=config, resume=resume, private=True, embed=False
            )

    def callback(self) -> TrainerCallback:
        from transformers.integrations import TrackioCallback

        callback = TrackioCallback()
        # The step of Trainer, where trackio would count the calls.
        callback._trackio = SimpleNamespace(log=lambda logs: self._run.log(logs, step=logs["train/global_step"]))
        callback._initialized = True
        return callback

    def add(self, metrics: dict[str, float], texts: dict[str, str], files: Sequence[Path], step: int) -> None:
        self._run.log({**metrics, **texts}, step=step)
        own = self.identity.name_in(self.identity.group)
        for file in files:
            self._run.log_artifact(str(file), name=f"{self.identity.group}-{own}-{file.stem}", type="evidence")

    def close(self, status: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()

    def _last_steps(self, project: str, name: str) -> dict[str, int]:
        """The last step of each metric in the local database; of a Space nothing is known here."""
        from trackio.sqlite_storage import SQLiteStorage

        last: dict[str, int] = {}
        for row in SQLiteStorage.get_logs(project, run=name):
            for key in row:
                last[_log_name(key)] = max(last.get(_log_name(key), -1), row["step"])
        return last


def _log_name(key: str) -> str:
    """The name in Trainer's logs of a metric that transformers' callback has renamed."""
    return key.removeprefix("train/").replace("eval/", "eval_", 1)
