"""Precision, recall, F1 and support of every class."""

import datasets
import evaluate
from sklearn.metrics import precision_recall_fscore_support

INPUTS = """
Args:
    predictions: predicted class ids, one an example.
    references: true class ids, one an example.
    labels: the names of classes 0, 1, ... (optional). Without it: the ids that occur, as text. With it: every class,
        also one without examples, which has zeros.
Returns:
    per_class: a list of {"label", "precision", "recall", "f1", "support"} in the order of the ids. A ratio of nothing
        to nothing is 0; support is the number of examples whose true class it is.
"""


class PerClass(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references, labels=None):
        ids = sorted({*predictions, *references})
        if labels is not None:
            if ids and not 0 <= ids[0] <= ids[-1] < len(labels):
                raise ValueError(f"Class ids go from {ids[0]} to {ids[-1]}, but there are {len(labels)} labels.")
            ids = range(len(labels))
        columns = precision_recall_fscore_support(references, predictions, labels=list(ids), zero_division=0)
        return {
            "per_class": [
                {
                    "label": str(i if labels is None else labels[i]),
                    "precision": float(precision),
                    "recall": float(recall),
                    "f1": float(f1),
                    "support": int(support),
                }
                for i, precision, recall, f1, support in zip(ids, *columns, strict=True)
            ]
        }
