"""MLflow: an experiment for each recipe; parameters, metrics, tags and artifacts of one run."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from peft_recipes.trackers.secrets import scrubbed
from peft_recipes.trackers.tracker import Tracker

if TYPE_CHECKING:
    from transformers import TrainerCallback

_LONGEST = 500  # characters of a parameter, the limit of older servers
_BATCH = 100  # parameters in one request
_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}  # seconds; default 120 and 7


class MLflow(Tracker):
    """A run through MLflow's client; an active run of the caller's own is left alone.

    MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_EXPERIMENT_ID, MLFLOW_RUN_ID and MLFLOW_TAGS are honoured.
    """

    name = "mlflow"

    def open(self, config: dict[str, Any], place: dict[str, Any] | None, step: int | None) -> dict[str, Any]:
        self._client, identity = connect(), self.identity
        run_id = (place or {}).get("id") or os.getenv("MLFLOW_RUN_ID")
        if run_id:
            run = self._client.get_run(run_id)
            self._client.update_run(run_id, "RUNNING")
            if step is not None:
                self.seen = {key: self._last_step(run_id, key) for key in run.data.metrics}
        else:
            experiment, name = self._experiment()
            tags = {"group": identity.group, "arm": identity.arm, "seed": str(identity.seed)}
            tags |= json.loads(os.getenv("MLFLOW_TAGS") or "{}")
            run = self._client.create_run(experiment, run_name=identity.name_in(name), tags=tags)
            self._log_parameters(run.info.run_id, config)
        self._id = run.info.run_id
        return {"id": self._id, "url": _page(self._client.tracking_uri, run)}

    def callback(self) -> TrainerCallback:
        import mlflow
        from transformers.integrations import MLflowCallback

        log_metrics = functools.partial(mlflow.log_metrics, run_id=self._id)
        callback = MLflowCallback()
        callback._ml_flow, callback._initialized = SimpleNamespace(log_metrics=log_metrics), True
        callback._async_log = callback._log_artifacts = False
        return callback

    def add(self, metrics: dict[str, float], texts: dict[str, str], files: Sequence[Path], step: int) -> None:
        import mlflow

        mlflow.log_metrics(metrics, step=step, run_id=self._id, synchronous=True)
        for name, text in texts.items():
            self._client.set_tag(self._id, name, text)
        if "comparison/result" in texts:
            self._client.set_tag(self._id, "mlflow.note.content", texts["comparison/result"])  # the run's description
        for file in files:
            self._client.log_artifact(self._id, str(file))

    def close(self, status: str) -> None:
        self._client.set_terminated(self._id, status)

    def _experiment(self) -> tuple[str, str]:
        """The id and name of the experiment, made where there is none."""
        if chosen := os.getenv("MLFLOW_EXPERIMENT_ID"):
            return chosen, self._client.get_experiment(chosen).name
        name = os.getenv("MLFLOW_EXPERIMENT_NAME") or self.identity.project
        return experiment_id(self._client, name), name

    def _log_parameters(self, run_id: str, config: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, value[:_LONGEST]) for key, value in _flat(config)]
        for start in range(0, len(params), _BATCH):
            self._client.log_batch(run_id, params=params[start : start + _BATCH])

    def _last_step(self, run_id: str, key: str) -> int:
        return max((point.step for point in self._client.get_metric_history(run_id, key)), default=-1)


def connect() -> Any:
    """MLflow's client, with a patience of seconds: a server that is gone must not hold up training."""
    import logging

    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    import mlflow

    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    return mlflow.MlflowClient()


def experiment_id(client: Any, name: str) -> str:
    """The id of the experiment of that name; another process may be making it at the same moment."""
    from mlflow.exceptions import MlflowException

    if (found := client.get_experiment_by_name(name)) is not None:
        return found.experiment_id
    try:
        return client.create_experiment(name)
    except MlflowException:
        if (found := client.get_experiment_by_name(name)) is None:
            raise
        return found.experiment_id


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested keys joined by points, without characters that MLflow refuses; what is empty is left out."""
    for key, value in config.items():
        name = prefix + re.sub(r"[^\w.\- /:]", "_", str(key))
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        elif value not in (None, [], ""):
            yield name, str(value)


def _page(tracking_uri: str, run: Any) -> str | None:
    """The address of the run's page on a server; None for a local store."""
    if not tracking_uri.startswith("http"):
        return None
    return scrubbed(f"{tracking_uri.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}")
