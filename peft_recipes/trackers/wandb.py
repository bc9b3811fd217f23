"""Weights & Biases: a project for each recipe, a group for each comparison; history, summary and artifacts of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from peft_recipes.trackers.secrets import scrubbed
from peft_recipes.trackers.tracker import FINISHED, Tracker

if TYPE_CHECKING:
    from transformers import TrainerCallback


class WeightsAndBiases(Tracker):
    """A run beside any that the caller has open. W&B's own variables (WANDB_PROJECT, WANDB_RUN_GROUP, ...) win.

    Offline, what is added after training is a second file of the same run; `wandb sync` uploads them in order.
    """

    name = "wandb"

    def open(self, config: dict[str, Any], place: dict[str, Any] | None, step: int | None) -> dict[str, Any]:
        import wandb

        identity, place = self.identity, place or {}
        project = place.get("project") or os.getenv("WANDB_PROJECT") or identity.project
        run_id = place.get("id") or os.getenv("WANDB_RUN_ID")
        self._run = wandb.init(
            entity=place.get("entity"),
            project=project,
            group=os.getenv("WANDB_RUN_GROUP") or identity.group,
            job_type=os.getenv("WANDB_JOB_TYPE") or identity.arm,
            name=os.getenv("WANDB_NAME") or identity.name_in(project),
            id=run_id,
            resume="allow" if run_id and not _offline() else None,
            config=config,
            reinit="create_new",
            settings=wandb.Settings(silent=True, console=os.getenv("WANDB_CONSOLE") or "off"),
        )
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step", step_sync=True)
        entity, url = (None, None) if _offline() else (self._run.entity, scrubbed(self._run.url))
        return {"id": self._run.id, "url": url, "project": project, "entity": entity}

    def callback(self) -> TrainerCallback:
        import wandb
        from transformers.integrations import WandbCallback

        run, callback = self._run, WandbCallback()
        callback._wandb = SimpleNamespace(run=run, log=run.log, log_artifact=run.log_artifact, Artifact=wandb.Artifact)
        callback._initialized = True
        return callback

    def add(self, metrics: dict[str, float], texts: dict[str, str], files: Sequence[Path], step: int) -> None:
        import wandb

        self._run.summary.update({**metrics, **texts})
        if files:
            own = self.identity.name_in(self.identity.group)
            artifact = wandb.Artifact(f"{self.identity.group}-{own}".replace("/", "-"), type="evidence")
            for file in files:
                artifact.add_file(str(file))
            self._run.log_artifact(artifact)

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == FINISHED else 1)


def _offline() -> bool:
    import wandb

    return os.getenv("WANDB_MODE") == "offline" or wandb.setup().settings.mode == "offline"
