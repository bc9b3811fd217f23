"""Read a run back from the local store of each tracker, by the tracker's own client.

Each reader gets the folder of the stores and a run, and returns the name, group, losses by step, final figures, texts,
configuration and files of its tracker run, as far as the tracker has them.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from warm_python import REAL


def from_tensorboard(root, run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder)).Reload()
    scalars = {tag: {point.step: point.value for point in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    texts = {tag.removesuffix("/text_summary"): events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
             for tag in events.Tags()["tensors"]}  # fmt: skip
    config = json.loads(texts.pop("config").strip("`").removeprefix("json"))
    last = {tag: points[max(points)] for tag, points in scalars.items()}
    return {"name": None, "losses": scalars.get("train/loss", {}), "figures": last, "texts": texts, "config": config}


def from_mlflow(root, run):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    found = client.get_run(run.data["trackers"]["mlflow"]["id"])
    history = client.get_metric_history(found.info.run_id, "loss") if run.data.get("training") else []
    return {
        "name": found.info.run_name,
        "status": found.info.status,
        "group": client.get_experiment(found.info.experiment_id).name,
        "losses": {point.step: point.value for point in history},
        "figures": {**found.data.metrics, "eval/loss": found.data.metrics.get("eval_loss")},
        "texts": found.data.tags,
        "config": found.data.params,
        "files": [artifact.path for artifact in client.list_artifacts(found.info.run_id)],
    }


def from_wandb(root, run):
    """The records of every file of the run, as `wandb leet inspect` prints them, in the order of their start."""
    found = {"losses": {}, "figures": {}, "files": [], "config": {}}
    command = Path(REAL).with_name("wandb")
    for file in sorted(root.glob(f"wandb/offline-run-*/run-{run.data['trackers']['wandb']['id']}.wandb")):
        printed = subprocess.run(
            [command, "leet", "inspect", "--json", file], capture_output=True, text=True, check=True
        )
        for record in map(json.loads, printed.stdout.splitlines()):
            kind, values = record["type"], record[record["type"]]
            if kind == "run":
                found |= {"name": values["display_name"], "group": values["run_group"], "job_type": values["job_type"],
                          "project": values["project"], "config": values["config"]["update"]}  # fmt: skip
            elif kind == "history" and "train/loss" in values["item"]:
                found["losses"][values["item"]["train/global_step"]] = values["item"]["train/loss"]
            elif kind == "summary":
                found["figures"] |= values["update"]
            elif kind == "artifact":
                found["files"] += [entry["path"] for entry in values["manifest"]["contents"]]
    found["texts"] = found["figures"]
    return found


def from_trackio(root, run):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    name = f"{run.data['arm']}-seed-0"
    (found,) = [each for each in trackio.Api().runs("tiny") if each.id == run.data["trackers"]["trackio"]["id"]]
    logs = SQLiteStorage.get_logs("tiny", run=name)
    figures = {key: value for row in logs for key, value in row.items()}
    files = [each["name"] for each in SQLiteStorage.list_artifacts("tiny") if f"-{name}-" in each["name"]]
    return {
        "name": found.name,
        "group": found.config["_Group"],
        "losses": {row["step"]: row["train/loss"] for row in logs if "train/loss" in row},
        "figures": figures,
        "texts": figures,
        "config": found.config,
        "files": files,
    }


READERS = {"tensorboard": from_tensorboard, "mlflow": from_mlflow, "wandb": from_wandb, "trackio": from_trackio}
