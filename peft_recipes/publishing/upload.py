"""The Hub's side of publishing: may one write there, what lies there already, one commit; every refusal is one line.

The token is read by huggingface_hub itself and goes nowhere but into its requests.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError
from peft_recipes.models import hub

if TYPE_CHECKING:
    from huggingface_hub import HfApi

GIT_FILE = ".gitattributes"  # the Hub's own, in every repository
Files = Mapping[str, "bytes | Path"]


@dataclass(frozen=True)
class Repository:
    """What the Hub has under a name: nothing, or a commit with files."""

    repo_id: str
    exists: bool = False
    private: bool = True
    commit: str | None = None
    files: list[str] = field(default_factory=list)


def check_repo_id(repo_id: str) -> None:
    """Raises RecipeError where the Hub could have no repository of this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    owner, _, name = repo_id.partition("/")
    wrong = "" if owner and name else "it has no owner" if not name else "it begins with '/'"
    wrong = "it has more than one '/'" if "/" in name else wrong
    with contextlib.suppress(HFValidationError):
        validate_repo_id(repo_id)
        if not wrong:
            return
    wrong = (
        wrong or "a space is in it" * (" " in repo_id) or "'--' or '..' is in it, or another sign, or it is too long"
    )
    raise RecipeError(
        f"--repo-id '{repo_id}': {wrong}. A repository is named ORG/NAME: letters, digits, '-', '_' and '.', at most "
        "96 of them."
    )


def logged_in(repo_id: str) -> HfApi:
    """The Hub's client, once it is known that someone is logged in. Raises RecipeError that says how to.

    repo_id: what is to be written there, for the words of a refusal.
    """
    from huggingface_hub import HfApi, constants, get_token

    if not get_token():
        raise RecipeError(
            "Nobody is logged in to the Hub. Make a token with write permission in your settings there and run "
            "`hf auth login`, or set HF_TOKEN. Nothing was sent."
        )
    hub.offline_if_unreachable()
    if constants.is_offline_mode():
        raise RecipeError(
            f"The Hub at {constants.ENDPOINT} can't be reached, or HF_HUB_OFFLINE is set. Nothing was sent."
        )
    api = HfApi(library_name="peft_recipes")
    with refusals(repo_id):
        api.whoami()
    return api


def look(api: HfApi, repo_id: str) -> Repository:
    """What lies under a name now."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with refusals(repo_id):
        try:
            info = api.model_info(repo_id)
        except RepositoryNotFoundError:
            return Repository(repo_id)
    files = [sibling.rfilename for sibling in info.siblings or []]
    return Repository(repo_id, True, bool(info.private), info.sha, files)


def check_not_taken(api: HfApi, there: Repository, file: str, same: dict[str, Any]) -> None:
    """Raises RecipeError where a repository holds something else than an earlier push of this.

    file: the JSON file that would say what it holds; same: what has to stand in it.
    """
    held = [name for name in there.files if name != GIT_FILE]
    if not held:
        return
    says: Any = {}
    if file in held:
        with refusals(there.repo_id), contextlib.suppress(ValueError, OSError):
            path = api.hf_hub_download(there.repo_id, file, revision=there.commit)
            says = json.loads(Path(path).read_text(encoding="utf-8"))
    if isinstance(says, dict) and all(says.get(key) == value for key, value in same.items()):
        return
    what = f"{says.get('recipe')} {says.get('arm') or ''}".strip() if isinstance(says, dict) and says else None
    shown = ", ".join(held[:4]) + (", ..." if len(held) > 4 else "")
    raise RecipeError(
        f"{there.repo_id} is taken: it holds {what or shown}, which a push would remove. Name another repository, or "
        "delete that one on the Hub."
    )


def send(api: HfApi, there: Repository, files: Files, *, private: bool, message: str) -> tuple[str, list[str]]:
    """Makes a repository hold exactly these files, in one commit. Returns the commit and the paths that it removed.

    Where it fails the repository is as it was; one that was made for this is removed again.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    removed = [name for name in there.files if name not in files and name != GIT_FILE]
    operations: list[Any] = [CommitOperationDelete(name) for name in removed]
    operations += [
        CommitOperationAdd(path, made if isinstance(made, bytes) else str(made)) for path, made in files.items()
    ]
    with refusals(there.repo_id):
        if not there.exists:
            api.create_repo(there.repo_id, private=private)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that predictions.parquet might be a dataset
                done = api.create_commit(there.repo_id, operations, commit_message=message, parent_commit=there.commit)
        except BaseException:
            if not there.exists:
                _remove_empty(api, there.repo_id)
            raise
    return done.oid, removed


def _remove_empty(api: HfApi, repo_id: str) -> None:
    """Takes back a repository that was made a moment ago and holds nothing."""
    with contextlib.suppress(Exception):  # what stopped the push is what is told
        if not set(api.list_repo_files(repo_id)) - {GIT_FILE}:
            api.delete_repo(repo_id)


@contextlib.contextmanager
def refusals(repo_id: str) -> Iterator[None]:
    """Turns what the Hub's client raises into one RecipeError: what happened, to which repository, what to do."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        if said := _explained(repo_id, error):
            raise RecipeError(said) from None
        raise


def _explained(repo_id: str, error: Exception) -> str:
    chain, kinds, status = hub.behind(error)
    said = next((text for one in chain if (text := getattr(one, "server_message", None))), None)
    said = _one_line(said or str(error))
    unchanged, again = "Nothing was changed there.", "A push is one commit, there whole or not at all: push again"
    if status == 401:
        return f"{repo_id}: the Hub does not take the token that is in use. Log in again: `hf auth login`. {unchanged}"
    if status == 403:
        return (
            f"{repo_id}: no permission to write there ({said}). Use a token with write permission, or a name that is "
            f"yours. {unchanged}"
        )
    if status == 409:
        return f"{repo_id}: this name is taken ({said}). Choose another. {unchanged}"
    if status == 412:
        return f"{repo_id}: someone else has just changed it. Look at what is there, and push again. {unchanged}"
    if status == 404:
        return f"{repo_id}: the Hub has no such place, or not for you ({said}). {unchanged}"
    if status == 429 or status >= 500:
        return f"{repo_id}: the Hub answered {status} ({HTTPStatus(status).phrase}). {again} later."
    if status:
        return f"{repo_id}: the Hub refused it with {status} ({said}). {unchanged}"
    if kinds & {"TransportError", "ConnectError", "TimeoutException", "ConnectionError", "OfflineModeIsEnabled"}:
        return f"{repo_id}: the connection to the Hub was lost. {again}."
    if isinstance(error, ValueError):
        return f"{repo_id}: {said} {unchanged}"
    return ""


def _one_line(text: str) -> str:
    """Text of the Hub on one short line, without the token, should it ever be in it."""
    from huggingface_hub import get_token

    token = get_token()
    line = " ".join(text.split())[:300].rstrip(".")
    return line.replace(token, "***") if token else line
