"""Macro F1: the mean over classes of the harmonic mean of precision and recall; rare ones weigh as much as others."""

import datasets
import evaluate
from sklearn.metrics import f1_score

INPUTS = """
Args:
    predictions: predicted class ids, one an example.
    references: true class ids, one an example.
Returns:
    macro_f1: a fraction between 0 and 1, over the classes that occur in predictions or references. A class that is
        never predicted, or never right, has an F1 of 0.
"""


class MacroF1(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references):
        return {"macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0))}
