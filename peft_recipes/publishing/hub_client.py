"""Talk to the Hub for `push`: log in, look up a repository, commit files to it, and explain the Hub's errors.

huggingface_hub reads the token itself; it is sent with its requests and nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from peft_recipes.errors import RecipeError
from peft_recipes.models import hub

GIT_FILE = ".gitattributes"  # the Hub's own, in every repository
Files = Mapping[str, "bytes | Path"]  # content by path in the repository


@dataclass(frozen=True)
class Repository:
    """A repository as it is on the Hub now, or a name that is free (exists False)."""

    repo_id: str
    exists: bool = False
    private: bool = True
    commit: str | None = None
    files: list[str] = field(default_factory=list)

    def replaced_by(self, files: Files) -> list[str]:
        """List the files that a push of `files` removes."""
        return [name for name in self.files if name not in files and name != GIT_FILE]


def check_repo_id(repo_id: str) -> None:
    """Raise RecipeError if no repository on the Hub can have this name."""
    owner, _, name = repo_id.partition("/")
    if not name:
        problem = "it has no owner"
    elif not owner:
        problem = "it begins with '/'"
    elif "/" in name:
        problem = "it has more than one '/'"
    elif " " in repo_id:
        problem = "a space is in it"
    else:
        with contextlib.suppress(HFValidationError):
            validate_repo_id(repo_id)
            return
        problem = "'--' or '..' is in it, or another sign, or it is too long"
    raise RecipeError(
        f"--repo-id '{repo_id}': {problem}. A repository is named ORG/NAME: letters, digits, '-', '_' and '.', at most "
        "96 of them."
    )


def authenticated_client(repo_id: str) -> HfApi:
    """Return the Hub's client for a logged-in user. Raises RecipeError, which names `repo_id`, if there is none."""
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
    with explained_errors(repo_id):
        api.whoami()
    return api


def find_repository(api: HfApi, repo_id: str) -> Repository:
    """Look up what the Hub has under a name now."""
    with explained_errors(repo_id):
        try:
            info = api.model_info(repo_id)
        except RepositoryNotFoundError:
            return Repository(repo_id)
    files = [sibling.rfilename for sibling in info.siblings or []]
    return Repository(repo_id, True, bool(info.private), info.sha, files)


def check_not_taken(api: HfApi, repository: Repository, file: str, expected: dict[str, Any]) -> None:
    """Raise RecipeError if a repository has files, and not those of an earlier push of the same.

    file: a JSON file that every push of it writes; expected: the values that it has then.
    """
    files = [name for name in repository.files if name != GIT_FILE]
    if not files:
        return
    data: Any = {}
    if file in files:
        with explained_errors(repository.repo_id), contextlib.suppress(ValueError, OSError):
            path = api.hf_hub_download(repository.repo_id, file, revision=repository.commit)
            data = json.loads(Path(path).read_text(encoding="utf-8"))
    if isinstance(data, dict) and all(data.get(key) == value for key, value in expected.items()):
        return
    run = f"{data.get('recipe')} {data.get('arm') or ''}".strip() if isinstance(data, dict) and data else None
    listed = ", ".join(files[:4]) + (", ..." if len(files) > 4 else "")
    raise RecipeError(
        f"{repository.repo_id} is taken: it holds {run or listed}, which a push would remove. Name another repository, "
        "or delete that one on the Hub."
    )


def commit_files(api: HfApi, repository: Repository, files: Files, *, private: bool, message: str) -> str:
    """Make a repository hold exactly these files, in one commit, and return the commit.

    If it fails, the repository is unchanged; one that was created for this push is deleted again.
    """
    operations: list[Any] = [CommitOperationDelete(name) for name in repository.replaced_by(files)]
    operations += [
        CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
        for path, content in files.items()
    ]
    repo_id = repository.repo_id
    with explained_errors(repo_id):
        if not repository.exists:
            api.create_repo(repo_id, private=private)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that predictions.parquet might be a dataset
                commit = api.create_commit(repo_id, operations, commit_message=message, parent_commit=repository.commit)
        except BaseException:
            if not repository.exists:
                with contextlib.suppress(Exception):  # the error to report is the one that stopped the push
                    if not set(api.list_repo_files(repo_id)) - {GIT_FILE}:
                        api.delete_repo(repo_id)
            raise
    return commit.oid


@contextlib.contextmanager
def explained_errors(repo_id: str) -> Iterator[None]:
    """Turn the errors of the Hub's client into one RecipeError: what happened, to which repository, what to do."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        if message := _explain(repo_id, error):
            raise RecipeError(message) from None
        raise


def _explain(repo_id: str, error: Exception) -> str:
    """Return the message for an error of the Hub's client; empty for any other error."""
    chain, kinds, status = hub.error_chain(error)
    server_message = next((text for one in chain if (text := getattr(one, "server_message", None))), None)
    message = _one_line(server_message or str(error))
    unchanged, again = "Nothing was changed there.", "A push is one commit, there whole or not at all: push again"
    if status == 429 or status >= 500:
        return f"{repo_id}: the Hub answered {status} ({HTTPStatus(status).phrase}). {again} later."
    if status:
        by_status = {
            401: "the Hub does not take the token that is in use. Log in again: `hf auth login`.",
            403: f"no permission to write there ({message}). Use a token with write permission, or a name of yours.",
            404: f"the Hub has no such repository, or not for you ({message}).",
            409: f"this name is taken ({message}). Choose another.",
            412: "someone else has just changed it. Look at what is there, and push again.",
        }
        return f"{repo_id}: {by_status.get(status, f'the Hub refused it with {status} ({message}).')} {unchanged}"
    if kinds & {"TransportError", "ConnectError", "TimeoutException", "ConnectionError", "OfflineModeIsEnabled"}:
        return f"{repo_id}: the connection to the Hub was lost. {again}."
    return f"{repo_id}: {message} {unchanged}" if isinstance(error, ValueError) else ""


def _one_line(text: str) -> str:
    """Shorten text of the Hub to one line, and remove the token from it."""
    token = get_token()
    line = " ".join(text.split())[:300].rstrip(".")
    return line.replace(token, "***") if token else line
