"""Preference accuracy: the share of pairs whose chosen answer is preferred; a pair without a preference counts half.

So a model that prefers nothing has 0.5, as one that guesses has on average.
"""

import math

import datasets
import evaluate

INPUTS = """
Args:
    margins: by how much each pair's chosen answer is rated above the rejected one, in nats.
    tie: margins nearer to zero than this are none: what rounding alone makes of two equal ratings.
Returns:
    preference_accuracy: a fraction between 0 and 1.
    scores: of each pair 1, 0.5 or 0, of which it is the mean.
"""


class PreferenceAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"margins": datasets.Value("float64")}),
        )

    def _compute(self, margins, tie=0.0):
        scores = [0.5 if abs(margin) <= tie else float(margin > 0) for margin in margins]
        return {"preference_accuracy": math.fsum(scores) / len(scores), "scores": scores}
