"""A comparison reports to TensorBoard, MLflow, W&B and trackio at once; each store is read back by its own client."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import workspace
from tracker_stores import READERS, from_mlflow, from_tensorboard, from_wandb

import peft_recipes.comparison.adapter_checks
import peft_recipes.comparison.compare
from peft_recipes import RecipeError, compare, train
from peft_recipes.runs.folder import read_run
from peft_recipes.trackers import choice
from peft_recipes.trackers.secrets import scrubbed

TRACKERS = ["tensorboard", "mlflow", "wandb", "trackio"]
ARMS = ["full", "lora"]
RUNS = ["base", *ARMS]
SECRET = "k" * 40
TRAINING = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 3, "per_device_train_batch_size": 16,
            "use_cpu": True, "bf16": False}  # fmt: skip


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Empty local stores of every tracker as the current folder, and a key that must appear nowhere."""
    import sqlalchemy
    import trackio.sqlite_storage  # noqa: F401

    def unsynchronised(connection, _):
        connection.execute("PRAGMA synchronous=OFF")  # MLflow makes its tables in a hundred steps

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", unsynchronised)
    root = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
            patch.delenv(name)
        patch.chdir(root)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_API_KEY", SECRET)
        patch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "trackio"]:
            if hasattr(module, "TRACKIO_DIR"):
                patch.setattr(module, "TRACKIO_DIR", root / "trackio")
        yield root
    sqlalchemy.event.remove(sqlalchemy.Engine, "connect", unsynchronised)


@pytest.fixture(scope="module")
def in_process():
    """Run a comparison's runs in this process: one of its own costs each six seconds."""
    with pytest.MonkeyPatch.context() as patch:
        module = peft_recipes.comparison.compare
        patch.setattr(module, "executor_of", workspace.ThisProcess)
        checks = peft_recipes.comparison.adapter_checks
        patch.setattr(checks, "check_in_fresh_process", lambda runs, trust_remote_code: None)
        yield


@pytest.fixture(scope="module")
def compared(stores, in_process, classify):
    """A comparison of full and lora that reports to all four."""
    recipe = classify(training={**TRAINING, "report_to": TRACKERS})
    return compare(recipe, ARMS, output=stores / "adapters")


@pytest.fixture(scope="module")
def read(stores, compared):
    """read(tracker, arm) -> the losses by step, the final figures, the texts, the configuration and the files."""
    found = {(tracker, arm): reader(stores, read_run(compared.folder / arm / "seed-0"))
             for tracker, reader in READERS.items() for arm in RUNS}  # fmt: skip
    return lambda tracker, arm: found[tracker, arm]


@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.parametrize("arm", RUNS)
def test_each_tracker_holds_the_losses_and_the_figures_of_each_run(read, compared, tracker, arm):
    found, run = read(tracker, arm), read_run(compared.folder / arm / "seed-0")
    losses = dict((run.data["training"] or {}).get("losses", []))
    assert found["losses"] == pytest.approx(losses, rel=1e-6) and len(losses) == (0 if arm == "base" else 3)
    logged = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    logged = {line["step"] - 1: line["loss"] for line in logged if line.get("loss") is not None}  # of the step before
    assert {step: found["losses"][step] for step in logged} == pytest.approx(logged, rel=1e-6)
    figures = found["figures"]
    assert figures["test/accuracy"] == pytest.approx(run.metrics["test"]["accuracy"])
    assert figures["run/total_parameters"] == run.data["parameters"]["total"]
    if arm != "base":
        assert figures["eval/loss"] == pytest.approx(run.data["training"]["validation"][-1]["loss"], rel=1e-6)
        assert figures["run/checkpoint_bytes"] == run.data["checkpoint_bytes"]
        assert figures["run/peak_memory_bytes"] == run.data["training"]["peak_memory_bytes"]
        assert figures["run/training_seconds"] == pytest.approx(run.data["training"]["seconds"])


@pytest.mark.parametrize("tracker", TRACKERS)
def test_each_tracker_run_ends_with_the_verdict_of_its_arm(read, compared, tracker):
    found, difference = read(tracker, "lora"), compared.data["differences"]["lora"]
    assert found["figures"]["comparison/difference"] == pytest.approx(difference["estimate"], rel=1e-6)
    ends = [found["figures"][f"comparison/ci95_{end}"] for end in ("low", "high")]
    assert ends == pytest.approx(difference["ci95"], rel=1e-6)
    assert found["texts"]["comparison/verdict"] == difference["verdict"]
    assert found["texts"]["comparison/result"] == compared.verdict("lora")
    assert read(tracker, "full")["texts"]["comparison/verdict"] == "reference"
    assert read(tracker, "base")["texts"]["comparison/verdict"] == "untrained base"


@pytest.mark.parametrize("tracker", TRACKERS[1:])
def test_runs_are_named_by_arm_and_seed_in_one_group_with_card_and_report(read, tracker):
    for arm in RUNS:
        found = read(tracker, arm)
        assert (found["name"], found["group"]) == (f"{arm}-seed-0", "tiny")
        assert len(found["files"]) == 2 and all(any(part in file for file in found["files"])
                                                for part in ("README", "comparison"))  # fmt: skip
    assert read("wandb", "lora")["job_type"] == "lora" and read("wandb", "lora")["project"] == "tiny"


@pytest.mark.parametrize("tracker", TRACKERS)
def test_the_configuration_is_the_resolved_recipe_with_this_arm_alone(read, compared, tracker):
    config, run = read(tracker, "lora")["config"], read_run(compared.folder / "lora" / "seed-0")
    assert (config["arm"], str(config["seed"]), config["recipe"], config["model"]) == (
        "lora", "0", "tiny", run.data["model"])  # fmt: skip
    if tracker == "mlflow":
        assert config["peft.r"] == "4" and config["training.max_steps"] == "3"
    else:
        assert config["peft"]["r"] == 4 and config["training"]["max_steps"] == 3
    assert "arms" not in config and float(config["learning_rate"]) == 2e-2


def test_no_file_holds_a_key(compared, stores):
    files = [path for path in stores.rglob("*") if path.is_file()]
    assert len(files) > 40
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path


def test_a_second_call_reports_nothing_twice(compared, stores, classify, in_process, read):
    before = {path: path.stat().st_size for path in compared.folder.rglob("events.out.*")}
    runs = len(list(stores.glob("wandb/offline-run-*")))
    assert runs == 2 * len(RUNS)  # one file of the training and one of the comparison
    compare(classify(training={**TRAINING, "report_to": TRACKERS}), ARMS, output=stores / "adapters")
    assert {path: path.stat().st_size for path in compared.folder.rglob("events.out.*")} == before
    assert len(list(stores.glob("wandb/offline-run-*"))) == runs


def settle(monkeypatch, **variables):
    """Set and unset variables of the environment, and let W&B read them again."""
    for name, value in variables.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)


WRONG = {
    "unknown": ("wandbb", {}, "Unknown tracker 'wandbb' in training.report_to. Did you mean 'wandb'?"),
    "not installed": ("clearml", {}, "clearml is not installed. Install it (pip install clearml)."),
    "among others": (["tensorboard", "swanlab"], {}, "swanlab is not installed"),
    "all and one": (["all", "wandb"], {}, "training.report_to: all stands alone"),
    "none and one": (["wandb", "none"], {}, "training.report_to: none stands alone"),
    "no text": ([3], {}, "training.report_to: expected"),
    "not logged in": ("wandb", {"WANDB_MODE": None, "WANDB_API_KEY": None}, "wandb is not logged in. Log in"),
    "all, not logged in": ("all", {"WANDB_MODE": None, "WANDB_API_KEY": None}, "wandb is not logged in. Log in"),
    "no server": ("mlflow", {"MLFLOW_TRACKING_URI": "http://me:secret-word@127.0.0.1:9"}, "Check MLFLOW_TRACKING_URI."),
    "no scheme": ("mlflow", {"MLFLOW_TRACKING_URI": "nonsense://x"}, "Check MLFLOW_TRACKING_URI."),
    "switched off": ("mlflow", {"DISABLE_MLFLOW_INTEGRATION": "TRUE"}, "switched off by DISABLE_MLFLOW_INTEGRATION"),
    "one run": ("mlflow", {"MLFLOW_RUN_ID": "abc"}, "MLFLOW_RUN_ID names one tracker run, and this reports 3."),
    "nobody's space": ("trackio", {"TRACKIO_SPACE_ID": "me/space"}, "nobody is logged in. Log in (`hf auth login`)"),
    "no token": ("trackio", {"TRACKIO_SERVER_URL": "http://127.0.0.1:9"}, "needs a write token"),
    "a file": ("tensorboard", {"TENSORBOARD_LOGGING_DIR": __file__}, "TENSORBOARD_LOGGING_DIR"),
}


@pytest.mark.parametrize("report_to, variables, words", WRONG.values(), ids=WRONG)
def test_a_tracker_that_cannot_be_used_is_an_error_before_anything_starts(
    stores, tmp_path, monkeypatch, classify, report_to, variables, words
):
    import wandb

    home = {"NETRC": str(tmp_path / "netrc"), "HF_TOKEN": None, "HF_TOKEN_PATH": str(tmp_path / "token")}
    settle(monkeypatch, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", **home, **variables)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    restarts = wandb.teardown if "WANDB_MODE" in variables else lambda: None  # it reads its settings once
    restarts()
    with pytest.raises(RecipeError) as raised:
        recipe = classify().with_changes({"training": {"report_to": report_to}})
        compare(recipe, ARMS, output=tmp_path / "out")
    restarts()
    assert words in str(raised.value) and "secret-word" not in str(raised.value) and SECRET not in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1 and not (tmp_path / "out").exists()


def test_all_and_none_and_a_switched_off_tracker(stores, monkeypatch):
    assert set(choice.requested({"report_to": "all"})) >= set(TRACKERS)
    assert [choice.requested({"report_to": none}) for none in (None, "none", [], ["none"])] == [[]] * 4
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choice.requested({"report_to": ["wandb", "mlflow", "mlflow"]}) == ["mlflow"]


def test_names_of_the_user_win(stores, monkeypatch, classify, in_process, tmp_path):
    """Variables name project and experiment; run names then begin with the recipe's, or with run_name."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    monkeypatch.setenv("TRACKIO_PROJECT", "ours")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    recipe = classify(
        training={**TRAINING, "max_steps": 1, "report_to": TRACKERS, "run_name": "trial-2", "project": "mine"}
    )
    run = train(recipe, "head", output=tmp_path / "out")
    import trackio
    from mlflow import MlflowClient

    assert [(each.name, each.config["_Group"]) for each in trackio.Api().runs("ours")] == [
        ("trial-2/head-seed-0", "trial-2")
    ]
    found = MlflowClient().get_run(run.data["trackers"]["mlflow"]["id"])
    assert found.info.run_name == "trial-2/head-seed-0" and found.data.tags["group"] == "trial-2"
    assert MlflowClient().get_experiment(found.info.experiment_id).name == "ours"
    assert run.data["trackers"]["wandb"]["project"] == "mine"
    assert [path.parent.name for path in (tmp_path / "boards" / "trial-2" / "head").rglob("events*")] == ["seed-0"]
    artifacts = [each.path for each in MlflowClient().list_artifacts(found.info.run_id)]
    assert artifacts == ["README.md"]  # a single run has a card and no report


def test_a_tracker_that_fails_midway_becomes_a_note_and_the_comparison_reports_the_rest(
    stores, monkeypatch, classify, in_process, tmp_path
):
    """The server is gone at the second step: the run goes on; at its end the comparison fills in what is missing."""
    import mlflow

    log_metrics, calls = mlflow.log_metrics, []

    def fails_once(metrics, *args, **options):
        calls.append(metrics)
        if len(calls) == 2:
            raise ConnectionError(f"http://me:{SECRET}@127.0.0.1:5000 is gone, token={SECRET}")
        return log_metrics(metrics, *args, **options)

    monkeypatch.setattr(mlflow, "log_metrics", fails_once)
    recipe = classify(name="gone", training={**TRAINING, "report_to": ["mlflow"]})
    made = compare(recipe, ["lora"], output=tmp_path)
    run = read_run(made.folder / "lora" / "seed-0")
    (note,) = [note for note in run.data["notes"] if note.startswith("mlflow: ")]
    assert "is gone" in note and "went on without this tracker" in note and SECRET not in note
    found = from_mlflow(stores, run)
    assert found["status"] == "FINISHED"
    assert found["losses"] == pytest.approx(dict(run.data["training"]["losses"]))
    assert found["figures"]["test/accuracy"] == pytest.approx(run.metrics["test"]["accuracy"])


def test_a_resumed_run_continues_its_tracker_runs(stores, monkeypatch, classify, tmp_path):
    """Interrupted after the second step, it goes on in the same run of each tracker, with one point a step."""
    import signal

    from peft_recipes.training import stages

    log_step = stages.log_step

    def interrupted(log, step, *rest):
        log_step(log, step, *rest)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    recipe = classify(
        name="tiny", checkpoint_seconds=0, training={**TRAINING, "report_to": TRACKERS, "eval_strategy": "no"}
    )
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "log_step", interrupted)
        train(recipe, "lora", seed=7, output=tmp_path)
    folder = tmp_path / "tiny" / "lora" / "seed-7"
    places = json.loads((folder / "trackers.json").read_text())["places"]
    run = train(recipe, "lora", seed=7, output=tmp_path, resume=True)
    assert run.data["training"]["resumed_at_steps"] == [2]
    assert {name: place["id"] for name, place in run.data["trackers"].items()} == {
        name: place["id"] for name, place in places.items()
    }
    losses = dict(run.data["training"]["losses"])
    assert sorted(losses) == [1, 2, 3]
    for tracker in (from_tensorboard, from_mlflow, from_wandb):
        assert tracker(stores, run)["losses"] == pytest.approx(losses, rel=1e-6), tracker
    from trackio.sqlite_storage import SQLiteStorage

    rows = [row for row in SQLiteStorage.get_logs("tiny", run="lora-seed-7") if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["train/loss"] for row in rows] == pytest.approx(list(losses.values()))


def test_a_failed_run_is_a_failed_one_in_its_tracker(stores, monkeypatch, classify, tmp_path):
    from peft_recipes.training import stages

    def fails(*_):
        raise RuntimeError("no training today")

    monkeypatch.setattr(stages, "fit", fails)
    recipe = classify(name="failing", training={**TRAINING, "report_to": ["mlflow"]})
    with pytest.raises(RuntimeError, match="no training today"):
        train(recipe, "lora", output=tmp_path)
    run = read_run(tmp_path / "failing" / "lora" / "seed-0")
    assert not run.ok and from_mlflow(stores, run)["status"] == "FAILED"


def test_a_push_sends_neither_addresses_of_trackers_nor_their_files(compared):
    from peft_recipes.publishing.push import run_files

    files, _ = run_files(read_run(compared.folder / "lora" / "seed-0"), "me/tiny", None)
    assert "trackers" not in json.loads(files["run.json"]) and not [name for name in files if "events" in name]


def test_credentials_are_removed_from_text_and_data(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert (
        scrubbed(f"https://me:pass@host/x?a=1&write_token=abc of {SECRET}")
        == "https://host/x?a=1&write_token=*** of ***"
    )
    assert scrubbed({"judge": [{"url": "http://u:p@h"}], "steps": 3}) == {"judge": [{"url": "http://h"}], "steps": 3}


def test_any_other_tracker_of_transformers_gets_the_steps_then_the_final_figures(monkeypatch, classify, tmp_path):
    """Through its own callback, whose training ends only after the final figures."""
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    seen = []

    class Recorder(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            seen.append(("begin", args.run_name, args.project))

        def on_log(self, args, state, control, logs=None, **_):
            seen.append(("log", state.global_step, sorted(logs)))

        def on_train_end(self, args, state, control, **_):
            seen.append(("end",))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "clearml", Recorder)
    monkeypatch.setattr(integration_utils, "is_clearml_available", lambda: True)
    run = train(classify(training={**TRAINING, "report_to": ["clearml"]}), "lora", output=tmp_path)
    assert seen[0] == ("begin", "lora-seed-0", "tiny") and seen[-1] == ("end",)
    assert [step for kind, step, logs in seen[1:-1] if "loss" in logs] == [1, 2, 3]
    assert "test/accuracy" in seen[-2][2] and run.data["trackers"] == {
        "clearml": {"id": "lora-seed-0", "url": None, "complete": True}
    }


def test_nothing_is_reported_or_imported_unasked(instruct, tmp_path):
    """A run in a process of its own: no tracker is imported, though all are installed, and none leaves a folder.

    With each checkpoint trl's trainers write a card, which asks W&B for its run where it is installed.
    """
    instruct(checkpoint_seconds=0, training={**TRAINING, "max_steps": 2}).to_yaml(tmp_path / "recipe.yaml")
    code = """
import sys
from peft_recipes.cli.app import app
import peft_recipes.recipe.imports as imports
try:
    app(["train", "recipe.yaml", "--arm", "lora"])
except SystemExit as end:
    assert not end.code, end.code
imports.import_module("trl.trainer.grpo_trainer")
print([name for name in ("wandb", "mlflow", "trackio", "tensorboard") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "[]"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters", "recipe.yaml"]
    assert not list(tmp_path.rglob("events.out.*")) and "trackers" not in read_run(next(tmp_path.rglob("seed-0"))).data
