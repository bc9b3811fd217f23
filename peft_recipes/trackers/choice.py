"""Which trackers a recipe reports to, and whether each can be used here: asked before anything starts."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_recipes.errors import RecipeError
from peft_recipes.trackers.secrets import one_line, scrubbed
from peft_recipes.trackers.session import OWN
from peft_recipes.trackers.tracker import Identity

WHERE = "training.report_to"
LATER = "PEFT_RECIPES_REPORT_LATER"  # set in the process of a run that its comparison reports, from run.json
_PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "flyte": "flytekit", "kubeflow": "kubeflow"}
_ONE_RUN = ("WANDB_RUN_ID", "WANDB_NAME", "MLFLOW_RUN_ID")  # variables that name one run


def requested(training: dict[str, Any]) -> list[str]:
    """The trackers that `report_to` names, each once; "all" is every installed one. None, "none" and []: none."""
    given = training.get("report_to")
    names = [given] if isinstance(given, str) else list(given or [])
    if names == ["all"]:
        from transformers.integrations import get_available_reporting_integrations

        names = get_available_reporting_integrations()
    names = list(dict.fromkeys(name for name in names if name not in ("", "none")))
    return [name for name in names if not _switched_off(name)]


def _switched_off(name: str) -> bool:
    """Whether the tracker's own variable switches it off, or the comparison reports to it once the run is finished."""
    if name in OWN and os.getenv(LATER):
        return True
    return name == "wandb" and (
        os.getenv("WANDB_MODE") == "disabled" or os.getenv("WANDB_DISABLED", "").lower() in ("true", "1", "yes")
    )


def identity(training: dict[str, Any], recipe: str, arm: str, seed: int) -> Identity:
    """The names of a run of a recipe in every tracker."""
    return Identity(arm, seed, training.get("project") or recipe, training.get("run_name") or recipe)


def check_trackers(training: dict[str, Any], *, runs: int = 1, connect: bool = True) -> None:
    """Raise RecipeError for a tracker that is not installed, not logged in or can't be reached.

    runs: to be reported. connect: also ask the trackers' servers; False asks only what is installed.
    """
    names = requested(training)
    if not names:
        return
    problems = [problem for name in names if (problem := _not_installed(name))]
    taken = [variable for variable in _ONE_RUN if runs > 1 and os.getenv(variable) and _named_by(variable, names)]
    problems += [f"{variable} names one tracker run, and this reports {runs}. Unset it." for variable in taken]
    if not problems and connect:
        problems = [problem for name in names if (problem := _not_usable(name))]
    if problems:
        raise RecipeError(*(f"{WHERE}: {problem}" for problem in problems))


def _named_by(variable: str, names: Sequence[str]) -> bool:
    return variable.partition("_")[0].lower() in names


def _not_installed(name: str) -> str | None:
    from transformers.integrations import get_available_reporting_integrations

    if name == "mlflow" and os.getenv("DISABLE_MLFLOW_INTEGRATION", "").upper() == "TRUE":
        return "mlflow is switched off by DISABLE_MLFLOW_INTEGRATION. Unset it, or leave mlflow out."
    installed = get_available_reporting_integrations()
    if name in installed or (name == "flyte" and importlib.util.find_spec("flytekit")):
        return None
    usable = f"Usable here: {', '.join(installed) or 'none'}."
    if name == "kubeflow":
        return f"kubeflow reports from within a Kubeflow job only (KUBEFLOW_TRAINER_SERVER_URL). {usable}"
    if name == "comet_ml" and importlib.util.find_spec("comet_ml"):
        return f"comet_ml has no key. Set COMET_API_KEY. {usable}"
    return f"{name} is not installed. Install it (pip install {_PACKAGES.get(name, name)}). {usable}"


def _not_usable(name: str) -> str | None:
    """What keeps an installed tracker from being used, in one line."""
    asked = {"wandb": _ask_wandb, "mlflow": _ask_mlflow, "trackio": _ask_trackio, "tensorboard": _ask_tensorboard}
    try:
        return asked.get(name, lambda: None)()
    except Exception as error:  # whatever the tracker's client raises
        return f"{name}: {one_line(error)}."


def _ask_wandb() -> str | None:
    import wandb

    settings = wandb.setup().settings
    if os.getenv("WANDB_MODE") == "offline" or settings.mode in ("offline", "disabled", "dryrun"):
        return None
    ways = "Log in (`wandb login`), set WANDB_API_KEY, or keep the run on this machine: WANDB_MODE=offline."
    try:
        known = _wandb_credentials(settings.base_url)
    except Exception as error:
        return f"wandb can't log in to {scrubbed(settings.base_url)}: {one_line(error)}. {ways}"
    return None if known else f"wandb is not logged in. {ways}"


def _wandb_credentials(host: str) -> bool:
    """Whether there are credentials for W&B's server, which it accepts; asks nobody at the terminal."""
    from wandb.sdk.lib import wbauth

    return wbauth.authenticate_session(host=host, source="peft-recipes", prompt=False, verify=True) is not None


def _ask_mlflow() -> str | None:
    from peft_recipes.trackers import mlflow

    store = os.getenv("MLFLOW_TRACKING_URI")
    what = f"mlflow: the store {scrubbed(store)}" if store else "mlflow: its store"
    if not (store or "sqlite").startswith("http") and importlib.util.find_spec("sqlalchemy") is None:
        return f"{what} is a database, and sqlalchemy is not installed. Install MLflow with it: pip install mlflow."
    try:
        mlflow.connect().search_experiments(max_results=1)
    except Exception as error:
        return f"{what} can't be used: {one_line(error)}. Check MLFLOW_TRACKING_URI."
    return None


def _ask_trackio() -> str | None:
    space = os.getenv("TRACKIO_SPACE_ID")
    if not space:
        return _ask_trackio_server(os.getenv("TRACKIO_SERVER_URL"))
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        return (f"trackio: TRACKIO_SPACE_ID names the Space {space}, and nobody is logged in. Log in "
                "(`hf auth login`), or unset it to keep the run on this machine.")  # fmt: skip
    try:
        huggingface_hub.whoami()
    except Exception as error:
        return f"trackio: the Space {space} can't be used: {one_line(error)}. Unset TRACKIO_SPACE_ID to log locally."
    return None


def _ask_trackio_server(address: str | None) -> str | None:
    if not address:
        return None
    from trackio.remote_client import RemoteClient
    from trackio.utils import parse_trackio_server_url

    base, token = parse_trackio_server_url(address)
    if not (token or os.getenv("TRACKIO_WRITE_TOKEN")):
        return "trackio: TRACKIO_SERVER_URL needs a write token. Set TRACKIO_WRITE_TOKEN."
    try:
        RemoteClient(base, hf_token=None, write_token=token or os.getenv("TRACKIO_WRITE_TOKEN"), verbose=False)
    except Exception as error:
        return f"trackio: the server {scrubbed(base)} can't be used: {one_line(error)}. Check TRACKIO_SERVER_URL."
    return None


def _ask_tensorboard() -> str | None:
    folder = os.getenv("TENSORBOARD_LOGGING_DIR")
    parent = Path(folder).expanduser().absolute() if folder else None
    while parent is not None and not parent.exists():
        parent = parent.parent
    if parent is not None and not (parent.is_dir() and os.access(parent, os.W_OK)):
        return f"tensorboard: TENSORBOARD_LOGGING_DIR={folder} can't be written. Name another folder."
    return None
