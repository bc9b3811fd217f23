"""Adapters to the Hub, with their evidence: what is sent, what is checked before, what stays here.

Sent are the adapter, its card, run.json, recipe.yaml, predictions.parquet (numbers of test examples, classes, losses;
`reproduce` needs it for its intervals) and the plots; of local data nothing. Paths of this machine are taken out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.adapters.saved import CONFIG, WEIGHTS
from peft_recipes.cards.redaction import is_place, portable
from peft_recipes.errors import RecipeError
from peft_recipes.publishing import upload
from peft_recipes.recipe.arm import OWN_METHODS
from peft_recipes.runs.folder import RUN_FILE, Run, read_run
from peft_recipes.runs.outputs import OUTPUTS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from peft_recipes.comparison.comparison import Comparison

PREDICTIONS = "predictions.parquet"


@dataclass
class Published:
    """What was sent (or, after a dry run, would be): to where, which files of how many bytes, which were removed.

    left_out: files of the folder that stay here, and why. told: what the caller should know beside.
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
        """Of all files together."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
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
    """Sends a run's adapter with its evidence to the Hub, in one commit, privately unless `public`.

    run: a Run or its folder. A repository that holds an earlier push of the same recipe and arm is replaced: what is
    no longer there is removed. dry_run: everything but asking the Hub and sending. on_ready: is told what will be sent,
    before it is. Raises RecipeError, and leaves the Hub as it was: nobody logged in, no adapter or one that fails its
    checks, a name that is taken or not one's own, whatever the Hub refuses.
    """
    upload.check_repo_id(repo_id)
    api = None if dry_run else upload.logged_in(repo_id)
    run = _run_of(run)
    there = _place(api, repo_id, run)
    _check(run.folder, trust_remote_code)
    return _published(api, there, run, public, on_ready)


def publish_all(
    comparison: Comparison | str | Path,
    repo_id: str,
    *,
    public: bool = False,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    on_ready: Callable[[Published], None] | None = None,
) -> list[Published]:
    """Sends every adapter of a comparison to `<repo_id>-<arm>`, and to `repo_id` a card that lists them all, last.

    Of each arm the seed whose test metric is the median (the lower of two in the middle): the one that the table's
    mean stands for, and not the luckiest. Full models and heads are not sent. All are checked before the first is sent.
    """
    from peft_recipes.comparison.comparison import Comparison, read_comparison

    upload.check_repo_id(repo_id)
    api = None if dry_run else upload.logged_in(repo_id)
    made = comparison if isinstance(comparison, Comparison) else read_comparison(comparison)
    runs = {arm: median_run(made, arm) for arm, row in made.data["arms"].items() if _sendable(row)}
    if not runs:
        raise RecipeError(f"{made.folder} has no adapter to send: its arms are {', '.join(made.data['arms'])}.")
    names = {arm: f"{repo_id}-{arm}" for arm in runs}
    for name in names.values():
        upload.check_repo_id(name)
    places = {arm: _place(api, names[arm], run) for arm, run in runs.items()}
    index = _index_place(api, repo_id, made)
    for run in runs.values():
        _check(run.folder, trust_remote_code)
    sent: list[Published] = []
    try:
        for arm, run in runs.items():
            sent.append(_published(api, places[arm], run, public, on_ready))
        sent.append(_published_index(api, index, made, runs, names, public, on_ready))
    except RecipeError as error:
        done = ", ".join(one.repo_id for one in sent)
        raise RecipeError(f"{error}{f' Sent before it: {done}.' if done else ''}") from None
    return sent


def median_run(comparison: Comparison, arm: str) -> Run:
    """The finished run of an arm whose test metric is the median over its seeds."""
    data = comparison.data
    runs = [read_run(comparison.folder / arm / f"seed-{seed}") for seed in data["arms"][arm]["seeds"]]
    good = [run for run in runs if run is not None and run.ok]
    if not good:
        raise RecipeError(f"{comparison.folder / arm} holds no finished run of this comparison.")
    good.sort(key=lambda run: (run.metrics["test"][data["metric"]], run.data["seed"]))
    return good[(len(good) - 1) // 2]


def _sendable(row: dict[str, Any]) -> bool:
    return row["status"] == "ok" and row["method"] not in OWN_METHODS


def _run_of(run: Run | str | Path) -> Run:
    """A finished run with an adapter. Raises RecipeError that says what its folder is instead."""
    from peft_recipes.adapters.saved import read_adapter

    folder = run.folder if isinstance(run, Run) else Path(run)
    if (folder / "comparison.json").is_file() and not (folder / CONFIG).is_file():
        raise RecipeError(f"{folder} is a comparison. Send all of its adapters with --all, or name one of them.")
    if (folder / RUN_FILE).is_file() and not (folder / CONFIG).is_file():
        method = (read_run(folder) or Run(folder, {})).data.get("method")
        raise RecipeError(f"{folder} holds no adapter but a run of the method '{method}'; push sends adapters only.")
    read_adapter(folder)
    found = read_run(folder)
    if found is None or not (folder / "recipe.yaml").is_file():
        raise RecipeError(
            f"{folder} has no {RUN_FILE} or recipe.yaml: it was not trained here, so there is no evidence to send with "
            f"it. `hf upload` sends a folder as it is."
        )
    if not found.ok or not {"recipe", "arm", "seed", "metrics", "environment", "rows"} <= set(found.data):
        raise RecipeError(f"{folder / RUN_FILE}: the run is not a finished one ({found.data.get('status')}).")
    return found


def _check(folder: Path, trust_remote_code: bool) -> None:
    """The adapter's own checks; merging is left out, since it is sent unmerged."""
    from peft_recipes.adapters.check import check_adapter

    found = check_adapter(folder, merge=False, trust_remote_code=trust_remote_code)
    if wrong := next((finding for finding in found if finding.ok is False), None):
        raise RecipeError(f"{folder} fails the check '{wrong.name}': {wrong.said}. Nothing was sent.")


def _place(api: HfApi | None, repo_id: str, run: Run) -> upload.Repository:
    if api is None:
        return upload.Repository(repo_id)
    there = upload.look(api, repo_id)
    upload.check_not_taken(api, there, RUN_FILE, {key: run.data[key] for key in ("recipe", "arm")})
    return there


def _published(
    api: HfApi | None,
    there: upload.Repository,
    run: Run,
    public: bool,
    on_ready: Callable[[Published], None] | None,
) -> Published:
    from peft_recipes.reporting.formats import metric_title, quality

    files, left_out = parcel(run.folder, there.repo_id, _licence(api, run))
    metric = run.data["metric"]
    reached = quality(run.metrics["test"].get(metric), metric)
    message = f"{run.data['recipe']} {run.data['arm']}, seed {run.data['seed']}: {metric_title(metric)} {reached}"
    return _send(api, there, files, left_out, message, public, on_ready)


def _send(
    api: HfApi | None,
    there: upload.Repository,
    files: dict[str, bytes | Path],
    left_out: dict[str, str],
    message: str,
    public: bool,
    on_ready: Callable[[Published], None] | None,
) -> Published:
    sizes = {path: len(made) if isinstance(made, bytes) else made.stat().st_size for path, made in files.items()}
    private = there.private if there.exists else not public
    made = Published(there.repo_id, private, sizes, left_out)
    made.removed = [name for name in there.files if name not in files and name != upload.GIT_FILE]
    if there.exists and there.private == public:
        made.told.append(
            f"{there.repo_id} is there already and is {'private' if there.private else 'public'}; it stays so (its "
            "settings on the Hub change that)."
        )
    if on_ready is not None:
        on_ready(made)
    if api is not None:
        made.commit, made.removed = upload.send(api, there, files, private=private, message=message)
        made.url = f"{api.endpoint}/{there.repo_id}"
    return made


def parcel(folder: Path, repo_id: str, license: str | None = None) -> tuple[dict[str, bytes | Path], dict[str, str]]:
    """What a push of a run's folder sends, by path in the repository; and what of the folder stays here, and why."""
    from peft_recipes.cards.write import CARD, PLOTS, published_card
    from peft_recipes.recipe.serialization import read_yaml, to_yaml

    run = read_run(folder)
    assert run is not None
    data = {key: value for key, value in run.data.items() if key != "samples"}
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    files: dict[str, bytes | Path] = {
        CARD: published_card(folder, repo_id, license).encode(),
        CONFIG: _json(portable(config)),
        WEIGHTS: folder / WEIGHTS,
        RUN_FILE: _json(portable(data)),
        "recipe.yaml": to_yaml(portable(read_yaml(folder / "recipe.yaml"))).encode(),
    }
    left_out = {}
    if (folder / PREDICTIONS).is_file():
        files[PREDICTIONS] = folder / PREDICTIONS
    if (folder / OUTPUTS).is_file():
        if is_place(run.data["dataset"]):
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


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


def _licence(api: HfApi | None, run: Run) -> str | None:
    """The base's licence, as its own card on the Hub says; None where it does not, or nobody was asked."""
    from peft_recipes.cards.metadata import hub_base, known_licence
    from peft_recipes.runs.folder import resolved_recipe

    recipe = resolved_recipe(run.folder / "recipe.yaml")
    base = hub_base(recipe)
    if api is None or base is None or known_licence(recipe.model):
        return known_licence(recipe.model)
    try:
        card = api.model_info(base).card_data
    except Exception:  # the base may be gone, or be hidden from this user: the card does without
        return None
    found = card.get("license") if card else None
    return found if isinstance(found, str) else None


def _index_place(api: HfApi | None, repo_id: str, made: Comparison) -> upload.Repository:
    if api is None:
        return upload.Repository(repo_id)
    there = upload.look(api, repo_id)
    upload.check_not_taken(api, there, "comparison.json", {"recipe": made.data["recipe"]})
    return there


def _published_index(
    api: HfApi | None,
    there: upload.Repository,
    made: Comparison,
    runs: dict[str, Run],
    names: dict[str, str],
    public: bool,
    on_ready: Callable[[Published], None] | None,
) -> Published:
    from peft_recipes.cards.index import index_card
    from peft_recipes.cards.write import CARD, PLOTS
    from peft_recipes.recipe.serialization import read_yaml, to_yaml

    data = portable({key: value for key, value in made.data.items() if key not in ("samples", "asked")})
    plots = [path for path in sorted((made.folder / PLOTS).glob("*.png")) if path.stem != "samples"]
    chosen = {arm: (names[arm], run.data["seed"]) for arm, run in runs.items()}
    files: dict[str, bytes | Path] = {
        CARD: str(index_card(data, chosen, [path.stem for path in plots])).encode(),
        "comparison.json": _json(data),
        "recipe.yaml": to_yaml(portable(read_yaml(made.folder / "recipe.yaml"))).encode(),
        **{f"{PLOTS}/{path.name}": path for path in plots},
    }
    message = f"{made.data['recipe']}: {len(runs)} adapters compared"
    return _send(api, there, files, {"samples": "pictures of the data"}, message, public, on_ready)
