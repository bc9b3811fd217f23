"""Metrics of generated answers: one value per example, whose mean is the metric.

- exact_match, f1: of words, after the normalisation of SQuAD's official script (Rajpurkar et al. 2016).
- rougeL: the F-measure of rouge-score, stemmed, as in transformers' summarization example.
- bleu: sacreBLEU's corpus BLEU (tokenizer 13a, exponential smoothing), as pseudo-values.
- chrf: the mean of sacreBLEU's sentence chrF (character 6-grams, beta 2).
- contains: the normalised answer contains the normalised reference.
- regex: what the recipe's `answer_pattern` finds last in answer and reference is equal; without it the reference is
  the pattern, and must match somewhere in the answer.
- json: the answer, or the first code block in it, parses to the same value as the reference.
- number: the last number of the answer equals the last number of the reference, as GSM8K is scored (Cobbe et al. 2021).
- score: the recipe's own function of the answer and the row.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_recipes.errors import RecipeError
from peft_recipes.recipe.answer_options import load_function
from peft_recipes.recipe.metrics import PREFERENCE
from peft_recipes.scoring.pseudo_values import pseudo_values

if TYPE_CHECKING:
    from peft_recipes.recipe.recipe import Recipe

Scores = Callable[[Sequence[str], Sequence[str], Sequence[dict[str, Any]]], np.ndarray]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)")
_CODE_BLOCK = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_MISSING = object()


def scorer(recipe: Recipe) -> Scores | None:
    """Return the recipe's metric as a function of answers, references and rows, which gives values [examples].

    None for the win rate of a judge, which needs the answers of two runs (comparison/judging.py).
    Imports the user's own score: not for a recipe that was downloaded. Raises RecipeError if it can't be imported.
    """
    if recipe.metric == PREFERENCE:
        return None
    if recipe.metric == "score":
        return _user_scores(load_function(recipe.score, "score"), recipe.score)
    if recipe.metric == "bleu":
        return lambda answers, references, rows: _bleu(answers, references)
    if recipe.metric == "rougeL":
        return lambda answers, references, rows: _rouge(answers, references)
    pair_score = _PAIR_SCORES[recipe.metric](recipe.answer_pattern)
    return lambda answers, references, rows: np.array(
        [float(pair_score(*pair)) for pair in zip(answers, references, strict=True)]
    )


def reference_problem(recipe: Recipe, reference: str) -> str | None:
    """Return why an answer can't be compared with this reference, or None."""
    if recipe.metric in ("exact_match", "f1", "contains") and not normalised(reference):
        return "has no word left once normalised (lower case, no punctuation, no articles)"
    if recipe.metric == "number" and last_number(reference) is None:
        return "has no number"
    if recipe.metric == "json" and _parsed(reference) is _MISSING:
        return "is no JSON"
    if recipe.metric == "regex" and recipe.answer_pattern is None:
        try:
            re.compile(reference)
        except re.error as error:
            return f"is no regular expression ({error})"
    elif recipe.metric == "regex" and _last_match(re.compile(recipe.answer_pattern), reference) is None:
        return f"has no match of answer_pattern '{recipe.answer_pattern}'"
    return None


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and repeated white space, as SQuAD's script has it."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def word_f1(answer: str, reference: str) -> float:
    """The F1 of the normalised words of two texts, as a bag; 1 where both have none."""
    ours, theirs = normalised(answer).split(), normalised(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def last_number(text: str) -> Decimal | None:
    """The last number in a text, without the commas of thousands; None if it has none."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def _regex(pattern: str | None) -> Callable[[str, str], bool]:
    if pattern is None:
        return lambda answer, reference: re.search(reference, answer) is not None
    compiled = re.compile(pattern)

    def same(answer: str, reference: str) -> bool:
        found = _last_match(compiled, answer)
        return found is not None and found == _last_match(compiled, reference)

    return same


def _last_match(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match of a pattern, its first group if it has one, without white space at its ends."""
    matches = list(pattern.finditer(text))
    found = matches[-1][1 if pattern.groups else 0] if matches else None
    return None if found is None else found.strip()


def _parsed(text: str) -> Any:
    blocks = _CODE_BLOCK.findall(text)
    try:
        return json.loads(blocks[0] if blocks else text)
    except (ValueError, RecursionError):  # of "[[[[..."
        return _MISSING


def _same_json(answer: str, reference: str) -> bool:
    values = [_parsed(answer), _parsed(reference)]
    return _MISSING not in values and len({json.dumps(value, sort_keys=True) for value in values}) == 1


def _chrf(answer: str, reference: str) -> float:
    from sacrebleu.metrics import CHRF

    return CHRF().sentence_score(answer, [reference]).score / 100


# metric -> a function of the recipe's answer_pattern that returns the score of (answer, reference)
_PAIR_SCORES: dict[str, Callable[[str | None], Callable[[str, str], float]]] = {
    "exact_match": lambda _: lambda answer, reference: normalised(answer) == normalised(reference),
    "f1": lambda _: word_f1,
    "chrf": lambda _: _chrf,
    "contains": lambda _: lambda answer, reference: normalised(reference) in normalised(answer),
    "regex": _regex,
    "json": lambda _: _same_json,
    "number": lambda _: lambda answer, reference: last_number(answer) == last_number(reference) is not None,
}


def _rouge(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    return np.array([rouge.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)])


def _bleu(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Pseudo-values of corpus BLEU / 100, from each answer's n-gram counts."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True)  # of a sentence; the counts are the corpus score's
    parts = [bleu.sentence_score(a, [r]) for a, r in zip(answers, references, strict=True)]
    counts = np.array([[*part.counts, *part.totals, part.sys_len, part.ref_len] for part in parts])

    def corpus(sums: np.ndarray) -> float:
        order = (len(sums) - 2) // 2
        sums = [int(value) for value in sums]
        score = BLEU.compute_bleu(sums[:order], sums[order:-2], sums[-2], sums[-1], smooth_method="exp")
        return score.score / 100

    return pseudo_values(corpus, counts)


def _user_scores(function: Callable[[str, dict[str, Any]], float], path: str) -> Scores:
    def values(answers: Sequence[str], references: Sequence[str], rows: Sequence[dict[str, Any]]) -> np.ndarray:
        return np.array([_user_score(function, path, a, row) for a, row in zip(answers, rows, strict=True)])

    return values


def _user_score(function: Callable[[str, dict[str, Any]], float], path: str, answer: str, row: dict[str, Any]) -> float:
    try:
        value = function(answer, dict(row))
    except Exception as error:
        raise RecipeError(
            f"score: {path} raised {type(error).__name__}: {error} for the answer {answer[:80]!r}."
        ) from error
    if isinstance(value, (bool, int, float, np.number)) and math.isfinite(value):
        return float(value)
    raise RecipeError(f"score: {path} returned {value!r} for the answer {answer[:80]!r}: expected a finite number.")
