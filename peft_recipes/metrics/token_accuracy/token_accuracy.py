"""Token accuracy: the share of labelled tokens that the model ranks first, over all tokens of all examples."""

import datasets
import evaluate

INPUTS = """
Args:
    correct: how many labelled tokens of each example were predicted right, given the true tokens before them.
    tokens: how many labelled tokens each example has.
Returns:
    token_accuracy: a fraction between 0 and 1.
    tokens: how many tokens that is over.
"""


class TokenAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"correct": datasets.Value("int64"), "tokens": datasets.Value("int64")}),
        )

    def _compute(self, correct, tokens):
        total = sum(tokens)
        if total <= 0 or any(not 0 <= right <= count for right, count in zip(correct, tokens, strict=True)):
            raise ValueError("Token accuracy needs a labelled token, and never more correct tokens than there are.")
        return {"token_accuracy": sum(correct) / total, "tokens": total}
