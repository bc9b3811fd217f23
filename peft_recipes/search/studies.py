"""The runs of a scan as optuna keeps them: a study an arm, its rates waiting in it, successive halving by its pruner.

Halving is asynchronous (Li et al. 2018, arXiv:1810.05934): a run is looked at after a quarter and after half of its
steps, and goes on while it is among the better half of those that came so far.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError
from peft_recipes.search.candidates import Candidate, from_the_middle

if TYPE_CHECKING:
    import optuna

    from peft_recipes.search.short_runs import ShortRun

SHARES = (0.25, 0.5, 1.0)  # of its steps: where a run is looked at
_RATE = "learning_rate"
_CUT_OFF = {"ended": "out of time"}
_UNITS = (1, 2, 4)  # the same as optuna's resource, of which each rung needs twice the one before


def require_optuna() -> Any:
    """optuna, quiet. Raises RecipeError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise RecipeError("scan needs optuna: pip install 'peft_recipes[scan]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def storage_at(path: Path) -> Any:
    """The journal that the studies are kept in."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path.with_name(path.name + ".lock").unlink(missing_ok=True)  # of a killed scan; the folder's own lock is held
    if path.is_file():  # an entry that was cut off (a full disk) would make the next one unreadable
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
    return JournalStorage(JournalFileBackend(str(path)))


def study_of(storage: Any, one: Candidate) -> optuna.Study:
    """The arm's study, its rates waiting in it; runs that were killed, or cut off by the budget, wait again."""
    optuna = require_optuna()
    study = optuna.create_study(
        storage=storage, study_name=one.name, load_if_exists=True, direction="minimize",
        sampler=optuna.samplers.RandomSampler(seed=0),  # never asked: every rate is enqueued
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=_UNITS[0], reduction_factor=2),
    )  # fmt: skip
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    # By what is there, not by what was begun: a kill can come between any two of optuna's entries.
    trials = study.get_trials(deepcopy=False)
    known = {trial.user_attrs[_RATE] for trial in trials
             if trial.state == optuna.trial.TrialState.WAITING
             or trial.user_attrs.get("run", _CUT_OFF)["ended"] != _CUT_OFF["ended"]}  # fmt: skip
    for rate in from_the_middle(one.rates):
        if rate not in known:
            study.enqueue_trial({_RATE: rate}, user_attrs={_RATE: rate})
    return study


def next_trial(study: optuna.Study, one: Candidate) -> optuna.Trial | None:
    """The study's next rate, None where none waits."""
    optuna = require_optuna()
    if not study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)):
        return None
    return study.ask({_RATE: optuna.distributions.FloatDistribution(one.rates[0], one.rates[-1])})


def tell(study: optuna.Study, trial: optuna.Trial, made: ShortRun) -> None:
    """Tells the study what came of a run; of one that ended early or failed, too."""
    from optuna.trial import TrialState

    trial.set_user_attr("run", plain_run(made))
    if made.ended == "whole" and made.loss is not None and math.isfinite(made.loss):
        trial.report(made.loss, _UNITS[-1])
        study.tell(trial, made.loss)
    else:
        study.tell(trial, state=TrialState.PRUNED if made.ended == "stopped" else TrialState.FAIL)


def goes_on(trial: optuna.Trial, so_far: ShortRun) -> bool:
    """Whether a run that is looked at is good enough to go on."""
    if not math.isfinite(so_far.loss):
        return False
    trial.report(so_far.loss, _UNITS[len(so_far.validation) - 1])
    return not trial.should_prune()


def marks_of(steps: int) -> list[int]:
    """The steps after which a run of so many is looked at."""
    return [max(math.ceil(share * steps), place) for place, share in enumerate(SHARES, 1)]


def plain_run(made: ShortRun) -> dict[str, Any]:
    """A run as scan.json holds it."""
    from peft_recipes.runs.files import finite

    return finite({
        "learning_rate": made.learning_rate,
        "ended": made.ended,
        "error": made.error or None,
        "validation": made.validation,
        "seconds": {key: round(value, 3) for key, value in made.seconds.items()},
    })  # fmt: skip


def told(study: optuna.Study) -> list[dict[str, Any]]:
    """What came of the study's runs, by rate; of a rate that was begun twice the later run that ended."""
    runs = {trial.user_attrs[_RATE]: trial.user_attrs["run"]
            for trial in study.get_trials(deepcopy=False) if "run" in trial.user_attrs}  # fmt: skip
    return sorted(runs.values(), key=lambda run: run["learning_rate"])


def arm_data(one: Candidate, study: optuna.Study) -> dict[str, Any]:
    """An arm as scan.json holds it: its runs, and the best of them."""
    runs = told(study)
    best = best_run(runs)
    rate = best["learning_rate"] if best else None
    ends = {one.rates[0]: "lowest", one.rates[-1]: "highest"} if len(one.rates) > 1 else {}
    begun = {run["learning_rate"] for run in runs}  # one that was cut off, too
    return {
        "of": one.of,
        "method": one.arm.method_name,
        "rank": one.rank,
        "own_learning_rate": one.arm.learning_rate,
        "learning_rates": list(one.rates),
        "best": rate,
        "validation": best["validation"][-1] if best else None,
        "at_the_edge": ends.get(rate),
        "not_begun": [rate for rate in one.rates if rate not in begun],
        "runs": runs,
    }


def best_run(runs: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The run with the lowest validation loss among those that came furthest; None where none was looked at."""
    sound = [run for run in runs if run["ended"] != "diverged" and run["validation"]
             and run["validation"][-1]["loss"] is not None]  # fmt: skip
    furthest = max((len(run["validation"]) for run in sound), default=0)
    return min((run for run in sound if len(run["validation"]) == furthest),
               key=lambda run: run["validation"][-1]["loss"], default=None)  # fmt: skip
