"""The table of metrics: how each is named, shown and compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

from peft_recipes.errors import unknown


@dataclass(frozen=True)
class Metric:
    """One row of `METRICS`.

    title: its name in running text. share: a value from 0 to 1, shown in percent, whose differences are points and
    whose default margin is one point; the margin of others is 1 % of the full arm's value. A correlation, from -1 to 1,
    counts as a share: GLUE's tables give it times 100 as well, and a margin of 1 % of one near 0 would be nothing.
    generated: computed from generated answers. needs: the recipe's field without which it can't be computed.
    """

    title: str
    higher_is_better: bool = True
    share: bool = True
    generated: bool = False
    needs: str | None = None


PREFERENCE = "preference"  # the only one that needs the answers of two runs: comparison/judging.py

# Every metric by name. A new metric is a row here, and its name in the rows of the tasks that compute it.
METRICS = {
    "loss": Metric("loss", higher_is_better=False, share=False),
    "perplexity": Metric("perplexity", higher_is_better=False, share=False),
    "bits_per_byte": Metric("bits per byte", higher_is_better=False, share=False),
    "accuracy": Metric("accuracy"),
    "token_accuracy": Metric("token accuracy"),
    "macro_f1": Metric("macro F1"),
    "micro_f1": Metric("micro F1"),
    "entity_f1": Metric("entity F1"),
    "entity_precision": Metric("entity precision"),
    "entity_recall": Metric("entity recall"),
    "mcc": Metric("Matthews correlation"),
    "pearson": Metric("Pearson correlation"),
    "spearman": Metric("Spearman correlation"),
    "mse": Metric("mean squared error", higher_is_better=False, share=False),
    "preference_accuracy": Metric("preference accuracy"),
    "likelihood_accuracy": Metric("likelihood accuracy"),
    "margin": Metric("margin", share=False),
    "reward": Metric("reward", share=False),
    "exact_match": Metric("exact match", generated=True),
    "f1": Metric("F1", generated=True),
    "rougeL": Metric("ROUGE-L", generated=True),
    "bleu": Metric("BLEU", generated=True),
    "chrf": Metric("chrF", generated=True),
    "contains": Metric("share of answers with the reference", generated=True),
    "regex": Metric("share of answers that match", generated=True),
    "json": Metric("share of equal JSON", generated=True),
    "number": Metric("share of right numbers", generated=True),
    "score": Metric("score", share=False, generated=True, needs="score"),
    "acc": Metric("accuracy"),
    "acc_norm": Metric("normalised accuracy"),
    PREFERENCE: Metric("win rate against full", generated=True, needs="judge"),
    "ended": Metric("answers ended by the model"),
    "answer_tokens": Metric("answer length", share=False),
    "empty_answers": Metric("empty answers", higher_is_better=False),
}
# Metrics of generated answers.
ANSWER_METRICS = tuple(name for name, metric in METRICS.items() if metric.generated)


def margin_for(metric: str, full_mean: float) -> float:
    """Return the default margin: one point (0.01) of a share; 1 % of full's mean of others, as a loss.

    Raises ValueError for an unknown metric, or a mean that is not finite.
    """
    if metric not in METRICS:
        raise ValueError(unknown("metric", metric, METRICS))
    if METRICS[metric].share:
        return 0.01
    if not math.isfinite(full_mean):
        raise ValueError(f"The margin is 1 % of full's mean {metric}, which is {full_mean}.")
    return 0.01 * abs(full_mean)
