"""Judge the answers of a comparison's runs: each arm's against full fine-tuning's of the same seed.

The win rate of an arm needs two runs, so it is computed here, in the caller's process, once the runs have ended. Full
scores 0.5 by definition. Each run's scores are written to preferences.parquet in its folder, its win rate to run.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from peft_recipes.errors import JudgeError, RecipeError
from peft_recipes.recipe.judge import Judge
from peft_recipes.recipe.metrics import PREFERENCE
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import write_json
from peft_recipes.runs.folder import RUN_FILE, Run
from peft_recipes.runs.predictions import write_preferences
from peft_recipes.scoring import preferences
from peft_recipes.scoring.judge_cache import Replies
from peft_recipes.scoring.judges import ask, check_judge
from peft_recipes.scoring.preferences import Pair
from peft_recipes.statistics.differences import FULL

OnReply = Callable[[int, int], None]  # called with the number of replies so far, and of questions


def check_judged(recipe: Recipe, arms: Iterable[str]) -> None:
    """Check, before anything runs, that the arms of a recipe can be judged. Raises RecipeError."""
    if recipe.judge is None:
        return
    if FULL not in arms:
        raise RecipeError(f"metric {PREFERENCE} compares each arm's answers with full's: add '{FULL}' to the arms.")
    check_judge(recipe.judge, recipe.trust_remote_code)


def judge_runs(
    recipe: Recipe, runs: Mapping[tuple[str, int], Run], base: Run, folder: Path, on_reply: OnReply | None = None
) -> dict[str, Any] | None:
    """Judge the runs' answers and store the scores; return `judge` of comparison.json, None without a judge.

    Replies are kept in `folder`: a question that was answered before is not asked again. A run without a full one of
    its seed gets no win rate. Raises JudgeError where the judge can't be asked.
    """
    judge = recipe.judge
    if judge is None:
        return None
    others = [*(run for (arm, _), run in runs.items() if arm != FULL), base]
    pairs = {}
    for number, run in enumerate(others):
        full = runs.get((FULL, run.data.get("seed")))
        if run.ok and full is not None and full.ok:
            pairs[number] = answer_pairs(run, full)
        elif run.ok:
            _store(run, None, None)
    template = judge.template or preferences.TEMPLATE
    replies = _replies(judge, recipe, [pair for each in pairs.values() for pair in each], template, folder, on_reply)
    judged = {number: preferences.judged(each, replies, template) for number, each in pairs.items()}
    for number, columns in judged.items():
        _store(others[number], columns, preferences.counts(columns))
    for full in (run for (arm, _), run in runs.items() if arm == FULL and run.ok):
        ids = [pair_id for pair_id, _, _ in _answers(full)]
        _store(full, {"id": ids, "preference": [0.5] * len(ids)}, None)
    return _summary(judge, {number: others[number] for number in judged})


def answer_pairs(run: Run, full: Run) -> list[Pair]:
    """Pair the answers of two runs to the same prompts of the test split."""
    theirs = {example: answer for example, _, answer in _answers(full)}
    pairs = [Pair(example, prompt, own, theirs[example]) for example, prompt, own in _answers(run) if example in theirs]
    if len(pairs) < len(theirs):
        raise RuntimeError(f"The runs of '{run.data['arm']}' and '{FULL}' did not answer the same examples.")
    return pairs


def _answers(run: Run) -> list[tuple[Any, str, str]]:
    """Return (id, prompt, answer) of the test examples that a run answered."""
    import pandas

    table = pandas.read_parquet(run.folder / "predictions.parquet")
    table = table[(table["split"] == "test") & table["answer"].notna()]
    return list(zip(table["id"], table["prompt"], table["answer"], strict=True))


def _replies(
    judge: Judge, recipe: Recipe, pairs: list[Pair], template: str, folder: Path, on_reply: OnReply | None
) -> Replies:
    """Ask what was not asked before, and return all replies."""
    replies = Replies(folder, judge)
    asked = [question for pair in pairs if not pair.identical for question in pair.questions(template)]
    questions = list(dict.fromkeys(asked))
    missing = [question for question in questions if question not in replies]
    done = len(questions) - len(missing)
    try:
        for question, reply in ask(judge, missing, recipe.trust_remote_code) if missing else ():
            replies.add(question, reply)
            done += 1
            if on_reply is not None:
                on_reply(done, len(questions))
    except JudgeError as error:
        raise JudgeError(
            f"{error} The runs are kept, and {done} of {len(questions)} replies: call again to ask the others, or look "
            "at the loss with --set metric=loss --set judge=null."
        ) from error
    return replies


def _store(run: Run, columns: dict[str, list[Any]] | None, counts: dict[str, int] | None) -> None:
    """Write a run's scores, and its win rate to run.json; None removes those of an earlier comparison."""
    test = run.data["metrics"]["test"]
    test.pop(PREFERENCE, None)
    run.data.pop("judged", None)
    write_preferences(run.folder, columns)
    if columns is not None:
        test[PREFERENCE] = sum(columns["preference"]) / len(columns["preference"])
    if counts is not None:
        run.data["judged"] = counts
    write_json(run.folder / RUN_FILE, run.data)


def _summary(judge: Judge, runs: Mapping[int, Run]) -> dict[str, Any]:
    """Return the judge's name and the counts of each arm, summed over its seeds, and of all."""
    arms: dict[str, dict[str, int]] = {}
    for run in runs.values():
        total = arms.setdefault(run.data["arm"], {})
        for name, count in run.data["judged"].items():
            total[name] = total.get(name, 0) + count
    everything = {name: sum(arm[name] for arm in arms.values()) for name in next(iter(arms.values()), {})}
    first, second = everything.get(preferences.FIRST, 0), everything.get(preferences.SECOND, 0)
    return {
        "model": judge.model,
        "endpoint": judge.base_url is not None,
        "own_template": judge.template is not None,
        "first_position_share": first / (first + second) if first + second else None,
        "total": everything,
        "arms": arms,
    }
