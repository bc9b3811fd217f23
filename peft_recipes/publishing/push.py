"""Push adapters to the Hub with their evidence: check them, decide what is sent, commit it.

Sent are the adapter, its card, run.json, recipe.yaml, predictions.parquet (of each test example its id, class and loss;
`reproduce` computes its intervals from them) and the plots. Local data and paths of this machine are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.adapters.check import check_adapter
from peft_recipes.adapters.saved import CONFIG, RECIPE_FILE, WEIGHTS, read_adapter
from peft_recipes.cards.index import index_card
from peft_recipes.cards.metadata import hub_base, known_licence
from peft_recipes.cards.redaction import is_local_path, portable
from peft_recipes.cards.write import CARD, PLOTS, published_card
from peft_recipes.comparison.comparison import Comparison, read_comparison
from peft_recipes.errors import RecipeError
from peft_recipes.publishing import hub_client
from peft_recipes.recipe.arm import OWN_METHODS
from peft_recipes.recipe.serialization import read_yaml, to_yaml
from peft_recipes.reporting.formats import metric_title, quality
from peft_recipes.runs.folder import RUN_FILE, Run, read_run, resolved_recipe
from peft_recipes.runs.outputs import OUTPUTS
from peft_recipes.runs.predictions import PREFERENCES

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PREDICTIONS = "predictions.parquet"
COMPARISON_FILE = "comparison.json"
_OWN_ENTRIES = ("samples", "trackers")  # of run.json: texts of the data, addresses of the user's trackers
_TEXTS = ("words", "prompt", "answer", "reference")  # columns of predictions.parquet with texts of the data


@dataclass
class Published:
    """A push, done or planned: the repository, its files with their bytes, and the files that it removed there.

    left_out: files of the folder that are not sent, and why. told: notes for the user. commit: None after a dry run.
    """

    repo_id: str
    private: bool
    files: dict[str, int]
    left_out: dict[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    url: str | None = None
    commit: str | None = None

    @property
    def bytes(self) -> int:
        """The size of all files together."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return {**vars(self), "bytes": self.bytes, "sent": self.commit is not None}


def publish(
    run: Run | str | Path,
    repo_id: str,
    *,
    public: bool = False,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    on_ready: Callable[[Published], None] | None = None,
) -> Published:
    """Push a run's adapter with its evidence to the Hub, in one commit; privately, unless `public`.

    run: a Run or its folder. An earlier push of the same recipe and arm is replaced, and its other files are removed.
    dry_run: do everything except contacting the Hub. on_ready: called with what will be sent, before it is. Raises
    RecipeError, with the Hub unchanged: nobody logged in, no adapter or one that fails its checks, a name that is taken
    or not the user's own, any error of the Hub.
    """
    push = _Push.start(repo_id, public, dry_run, on_ready)
    run = _finished_run(run)
    repository = push.find_run(repo_id, run)
    _check(run.folder, trust_remote_code)
    return push.send_run(repository, run)


def publish_all(
    comparison: Comparison | str | Path,
    repo_id: str,
    *,
    public: bool = False,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    on_ready: Callable[[Published], None] | None = None,
) -> list[Published]:
    """Push every adapter of a comparison to `<repo_id>-<arm>`, and last to `repo_id` a card that lists them.

    Of each arm the seed with the median test metric (the lower of two in the middle) is sent: it stands for the mean in
    the table, and is not the luckiest. Full models and heads are not sent. All adapters are checked before the first is
    sent.
    """
    push = _Push.start(repo_id, public, dry_run, on_ready)
    if not isinstance(comparison, Comparison):
        comparison = read_comparison(comparison)
    if comparison.provisional:
        made = comparison.data["provisional"]
        raise RecipeError(
            f"{comparison.folder} is provisional: {made['finished']} of {made['of']} runs are finished, so there is no "
            "evidence to send yet. The same `peft-recipes compare` finishes it."
        )
    arms = comparison.data["arms"]
    sendable = [arm for arm, row in arms.items() if row["status"] == "ok" and row["method"] not in OWN_METHODS]
    runs = {arm: median_run(comparison, arm) for arm in sendable}
    if not runs:
        raise RecipeError(f"{comparison.folder} has no adapter to send: its arms are {', '.join(arms)}.")
    names = {arm: f"{repo_id}-{arm}" for arm in runs}
    for name in names.values():
        hub_client.check_repo_id(name)
    repositories = {arm: push.find_run(names[arm], run) for arm, run in runs.items()}
    index = push.find(repo_id, COMPARISON_FILE, {"recipe": comparison.data["recipe"]})
    for run in runs.values():
        _check(run.folder, trust_remote_code)
    sent: list[Published] = []
    try:
        for arm, run in runs.items():
            sent.append(push.send_run(repositories[arm], run))
        files = _index_files(comparison, {arm: (names[arm], run.data["seed"]) for arm, run in runs.items()})
        message = f"{comparison.data['recipe']}: {len(runs)} adapters compared"
        sent.append(push.send(index, files, {"samples": "pictures of the data"}, message))
    except RecipeError as error:
        done = ", ".join(one.repo_id for one in sent)
        raise RecipeError(f"{error}{f' Sent before it: {done}.' if done else ''}") from None
    return sent


@dataclass(frozen=True)
class _Push:
    """One call of `publish` or `publish_all`: its client (None in a dry run) and its options."""

    api: HfApi | None
    public: bool
    on_ready: Callable[[Published], None] | None

    @classmethod
    def start(cls, repo_id: str, public: bool, dry_run: bool, on_ready: Callable[[Published], None] | None) -> _Push:
        hub_client.check_repo_id(repo_id)
        return cls(None if dry_run else hub_client.authenticated_client(repo_id), public, on_ready)

    def find(self, repo_id: str, file: str, expected: dict[str, Any]) -> hub_client.Repository:
        """Look up a repository. Raises RecipeError if it holds anything but an earlier push of the same."""
        if self.api is None:
            return hub_client.Repository(repo_id)
        repository = hub_client.find_repository(self.api, repo_id)
        hub_client.check_not_taken(self.api, repository, file, expected)
        return repository

    def find_run(self, repo_id: str, run: Run) -> hub_client.Repository:
        return self.find(repo_id, RUN_FILE, {key: run.data[key] for key in ("recipe", "arm")})

    def send_run(self, repository: hub_client.Repository, run: Run) -> Published:
        files, left_out = run_files(run, repository.repo_id, self._licence(run))
        data, metric = run.data, run.data["metric"]
        value = quality(run.metrics["test"].get(metric), metric)
        message = f"{data['recipe']} {data['arm']}, seed {data['seed']}: {metric_title(metric)} {value}"
        return self.send(repository, files, left_out, message)

    def send(
        self, repository: hub_client.Repository, files: hub_client.Files, left_out: dict[str, str], message: str
    ) -> Published:
        """Commit files to a repository; in a dry run only report what would be sent."""
        sizes = {path: len(data) if isinstance(data, bytes) else data.stat().st_size for path, data in files.items()}
        private = repository.private if repository.exists else not self.public
        published = Published(repository.repo_id, private, sizes, left_out, repository.replaced_by(files))
        if repository.exists and repository.private == self.public:
            published.told.append(
                f"{repository.repo_id} is there already and is {'private' if private else 'public'}; it stays so (its "
                "settings on the Hub change that)."
            )
        if self.on_ready is not None:
            self.on_ready(published)
        if self.api is not None:
            published.commit = hub_client.commit_files(self.api, repository, files, private=private, message=message)
            published.url = f"{self.api.endpoint}/{repository.repo_id}"
        return published

    def _licence(self, run: Run) -> str | None:
        """Return the base's licence, from its card on the Hub if need be; None if it is unknown, or in a dry run."""
        recipe = resolved_recipe(run.folder / RECIPE_FILE)
        base, known = hub_base(recipe), known_licence(recipe.model)
        if self.api is None or base is None or known:
            return known
        try:
            card = self.api.model_info(base).card_data
        except Exception:  # the base may be gone, or hidden from this user: the card does without
            return None
        licence = card.get("license") if card else None
        return licence if isinstance(licence, str) else None


def median_run(comparison: Comparison, arm: str) -> Run:
    """Return the finished run of an arm whose test metric is the median over its seeds."""
    metric, seeds = comparison.data["metric"], comparison.data["arms"][arm]["seeds"]
    runs = [read_run(comparison.folder / arm / f"seed-{seed}") for seed in seeds]
    finished = [run for run in runs if run is not None and run.ok]
    if not finished:
        raise RecipeError(f"{comparison.folder / arm} holds no finished run of this comparison.")
    finished.sort(key=lambda run: (run.metrics["test"][metric], run.data["seed"]))
    return finished[(len(finished) - 1) // 2]


def _finished_run(run: Run | str | Path) -> Run:
    """Read a finished run that has an adapter. Raises RecipeError that says what its folder is instead."""
    folder = run.folder if isinstance(run, Run) else Path(run)
    if not (folder / CONFIG).is_file():
        if (folder / COMPARISON_FILE).is_file():
            raise RecipeError(f"{folder} is a comparison. Send all of its adapters with --all, or name one of them.")
        if (folder / RUN_FILE).is_file():
            method = (read_run(folder) or Run(folder, {})).data.get("method")
            raise RecipeError(
                f"{folder} holds no adapter but a run of the method '{method}'; push sends adapters only."
            )
    read_adapter(folder)
    found = read_run(folder)
    if found is None or not (folder / RECIPE_FILE).is_file():
        raise RecipeError(
            f"{folder} has no {RUN_FILE} or {RECIPE_FILE}: it was not trained here, so there is no evidence to send "
            f"with it. `hf upload` sends a folder as it is."
        )
    if not found.ok or not {"recipe", "arm", "seed", "metrics", "environment", "rows"} <= set(found.data):
        raise RecipeError(f"{folder / RUN_FILE}: the run is not a finished one ({found.data.get('status')}).")
    return found


def _check(folder: Path, trust_remote_code: bool) -> None:
    """Raise RecipeError if an adapter fails a check. Merging is not checked: the adapter is sent unmerged."""
    for finding in check_adapter(folder, merge=False, trust_remote_code=trust_remote_code):
        if finding.ok is False:
            raise RecipeError(f"{folder} fails the check '{finding.name}': {finding.message}. Nothing was sent.")


def run_files(run: Run, repo_id: str, licence: str | None = None) -> tuple[hub_client.Files, dict[str, str]]:
    """Return what a push of a run sends, by path in the repository, and which of its files it leaves out, and why."""
    folder = run.folder
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    files: dict[str, bytes | Path] = {
        CARD: published_card(folder, repo_id, licence).encode(),
        CONFIG: _json(portable(config)),
        WEIGHTS: folder / WEIGHTS,
        RUN_FILE: _json(portable({key: value for key, value in run.data.items() if key not in _OWN_ENTRIES})),
        RECIPE_FILE: _portable_yaml(folder / RECIPE_FILE),
    }
    left_out = {}
    files |= {name: folder / name for name in (PREDICTIONS, PREFERENCES) if (folder / name).is_file()}
    if PREDICTIONS in files and is_local_path(run.data["dataset"]):
        files[PREDICTIONS], texts = _without_texts(folder / PREDICTIONS)
        if texts:
            left_out[f"{', '.join(texts)} in {PREDICTIONS}"] = "they are texts of local data"
    if (folder / OUTPUTS).is_file():
        if is_local_path(run.data["dataset"]):
            left_out[OUTPUTS] = "it holds two examples of local data"
        else:
            files[OUTPUTS] = folder / OUTPUTS
    if run.data.get("samples"):
        left_out[f"samples in {RUN_FILE}"] = "they are pictures of the data"
    files |= {f"{PLOTS}/{path.name}": path for path in sorted((folder / PLOTS).glob("*.png"))}
    sent = {path.partition("/")[0] for path in files}
    for path in sorted(folder.iterdir()):
        if path.name not in sent and path.name not in left_out and not path.name.startswith("."):
            left_out[path.name] = "it is no part of the evidence"
    return files, left_out


def _without_texts(path: Path) -> tuple[bytes | Path, list[str]]:
    """The table of predictions without the texts of the data, and the columns that it loses."""
    import pandas

    table = pandas.read_parquet(path)
    texts = [column for column in _TEXTS if column in table]
    return (table.drop(columns=texts).to_parquet(index=False), texts) if texts else (path, [])


def _index_files(comparison: Comparison, pushed: dict[str, tuple[str, int]]) -> hub_client.Files:
    """Return the files of a comparison's own repository. pushed: each arm's repository and seed."""
    local = is_local_path(comparison.data["dataset"])  # then its texts, in examples, stay here
    left_out = ("samples", "asked", *(["disagreements", "data"] if local else []))
    data = portable({key: value for key, value in comparison.data.items() if key not in left_out})
    plots = [path for path in sorted((comparison.folder / PLOTS).glob("*.png")) if path.stem != "samples"]
    return {
        CARD: str(index_card(data, pushed, [path.stem for path in plots])).encode(),
        COMPARISON_FILE: _json(data),
        RECIPE_FILE: _portable_yaml(comparison.folder / RECIPE_FILE),
        **{f"{PLOTS}/{path.name}": path for path in plots},
    }


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


def _portable_yaml(path: Path) -> bytes:
    return to_yaml(portable(read_yaml(path))).encode()
