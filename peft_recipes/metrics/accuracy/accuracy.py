"""Accuracy: the share of examples whose predicted class is the right one."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score

INPUTS = """
Args:
    predictions: predicted class ids, one an example.
    references: true class ids, one an example.
Returns:
    accuracy: a fraction between 0 and 1.
"""


class Accuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(accuracy_score(references, predictions))}
