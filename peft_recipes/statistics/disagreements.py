"""Where an arm and full fine-tuning differ: the test examples that one of them gets right and the other wrong.

Of a classifier an example is right or wrong; of scored answers it has the metric's score. A loss says of no example
whether it is right, so a comparison by the loss alone has no disagreements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_recipes.recipe.metrics import METRICS, PREFERENCE
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.folder import Run
from peft_recipes.runs.predictions import PREFERENCES

if TYPE_CHECKING:
    import pandas

MOST, MOST_CHANGED = 5, 2  # examples that are kept of each kind
ANSWER_LENGTH, PROMPT_LENGTH = 300, 600  # characters


def disagreements(
    recipe: Recipe, runs: Mapping[tuple[str, int], Run], arms: Sequence[str], seeds: Sequence[int], against: str
) -> dict[str, dict[str, Any]]:
    """Return for each arm where it differs from `against`, with the first seed that both finished.

    An entry has the counts and the first or largest few of the examples on which the arm is better (`gained`), worse
    (`lost`), or gives another answer of the same score (`changed`). `kind`: "right" where an example is right or wrong,
    "score" where it has a score, "preference" where a judge prefers one answer. The largest differences come first, and
    the same runs give the same examples.
    """
    found = {}
    for arm in arms:
        shared = [seed for seed in seeds if runs[arm, seed].ok and runs[against, seed].ok] if arm != against else []
        if not shared:
            continue
        ours, theirs = (_examples(runs[name, shared[0]], recipe) for name in (arm, against))
        if ours is not None and theirs is not None:
            found[arm] = {"against": against, "seed": shared[0], **_compare(ours, theirs, recipe)}
    return found


def _examples(run: Run, recipe: Recipe) -> pandas.DataFrame | None:
    """The test examples by id: prompt, reference, answer and score; None where no example is right or wrong."""
    import pandas

    path = run.folder / "predictions.parquet"
    if not path.is_file():
        return None
    rows = pandas.read_parquet(path)
    rows = rows[rows["split"] == "test"].drop_duplicates("id").set_index("id")
    if {"label", "prediction"} <= set(rows):
        if pandas.api.types.is_float_dtype(rows["label"]):
            return None  # a number is not right or wrong
        names = [str(row["label"]) for row in run.data.get("per_class") or []]
        reference, answer = ([_named(value, names) for value in rows[name]] for name in ("label", "prediction"))
        score = [float(a == b) for a, b in zip(reference, answer, strict=True)]
        prompt = rows["prompt"] if "prompt" in rows else rows["text"] if "text" in rows else [None] * len(rows)
    elif METRICS[recipe.metric].generated and {"prompt", "reference", "answer"} <= set(rows):
        if recipe.metric == PREFERENCE:
            rows = rows.assign(preference=_preferences(run))
        elif recipe.metric not in rows:
            return None
        rows = rows[rows[recipe.metric].notna()]  # the others were not answered
        prompt, reference, answer = (rows[name] for name in ("prompt", "reference", "answer"))
        score = rows[recipe.metric].astype(float)
    else:
        return None
    columns = {"prompt": prompt, "reference": reference, "answer": answer, "score": score}
    return pandas.DataFrame(columns, index=rows.index)


def _preferences(run: Run) -> pandas.Series | float:
    """The judge's preferences for an arm's answers by id; full fine-tuning itself has none: half, as a tie."""
    import pandas

    path = run.folder / PREFERENCES
    return pandas.read_parquet(path).drop_duplicates("id").set_index("id")["preference"] if path.is_file() else 0.5


def _named(value: Any, names: Sequence[str]) -> str:
    """A label or prediction as text: a class by its name, several in a row."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return ", ".join(_named(one, names) for one in value)
    is_class = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 0 <= value < len(names)
    return names[value] if is_class else str(value)


def _compare(ours: pandas.DataFrame, theirs: pandas.DataFrame, recipe: Recipe) -> dict[str, Any]:
    pairs = ours.join(theirs[["answer", "score"]], how="inner", rsuffix="_other")
    change = (pairs["score"] - pairs["score_other"]).to_numpy()
    values = pairs[["score", "score_other"]].to_numpy().ravel()
    right_or_wrong = bool(np.isin(values, (0.0, 1.0)).all())
    # Metrics that are no mean over examples have pseudo-values: their order tells which examples count, not how much.
    shown = not METRICS[recipe.metric].share or bool(((values >= 0) & (values <= 1)).all())
    changed = (change == 0) & (pairs["answer"] != pairs["answer_other"]).to_numpy()
    groups = {"gained": (change > 0, MOST), "lost": (change < 0, MOST), "changed": (changed, MOST_CHANGED)}
    kind = "preference" if recipe.metric == PREFERENCE else "right" if right_or_wrong else "score"
    entry: dict[str, Any] = {"kind": kind, "examples": len(pairs)}
    for name, (chosen, most) in groups.items():
        positions = np.flatnonzero(chosen)
        order = positions[np.argsort(-np.abs(change[positions]), kind="stable")]
        examples = [_example(pairs.index[at], pairs.iloc[at], shown) for at in order[:most]]
        entry[name] = {"count": len(positions), "examples": examples}
    return entry


def _example(name: Any, pair: pandas.Series, scores: bool) -> dict[str, Any]:
    return {
        "id": str(name),
        "prompt": _shortened(pair["prompt"], PROMPT_LENGTH),
        "reference": _shortened(pair["reference"], ANSWER_LENGTH),
        "answer": _shortened(pair["answer"], ANSWER_LENGTH),
        "answer_against": _shortened(pair["answer_other"], ANSWER_LENGTH),
        "score": float(pair["score"]) if scores else None,
        "score_against": float(pair["score_other"]) if scores else None,
    }


def _shortened(text: Any, most: int) -> str | None:
    """A text of at most `most` characters, without its middle: a question is often at the end of a prompt."""
    if not isinstance(text, str):
        return None
    if len(text) <= most:
        return text
    return f"{text[: most // 2].rstrip()} ... {text[-(most // 2 - 5) :].lstrip()}"


def answers_cut_at(runs: Sequence[Run]) -> int | None:
    """Return the limit on new tokens: the longest answer that a model did not end itself; None without one."""
    import pandas

    longest = []
    for run in runs:
        path = run.folder / "predictions.parquet"
        if (run.metrics.get("test") or {}).get("ended", 1) < 1 and path.is_file():
            rows = pandas.read_parquet(path, columns=["split", "answer_tokens", "ended"])
            rows = rows[(rows["split"] == "test") & (rows["ended"] == False)]  # noqa: E712, None was not answered
            longest.append(rows["answer_tokens"].max())
    return int(max(longest)) if longest else None
