"""Perplexity: e to the mean loss of a token, over all tokens of all examples.

Long examples weigh more than short ones: the mean is over tokens, not over examples or batches.
"""

import math

import datasets
import evaluate

INPUTS = """
Args:
    losses: the mean cross entropy, in nats, of each example's labelled tokens.
    tokens: how many labelled tokens each example has. An example without any counts for nothing, whatever its loss.
Returns:
    perplexity: e to the loss; infinite where that is beyond a float.
    loss: the mean cross entropy of a token, in nats.
    tokens: how many tokens that is over.
"""


class Perplexity(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"losses": datasets.Value("float64"), "tokens": datasets.Value("int64")}),
        )

    def _compute(self, losses, tokens):
        total = sum(tokens)
        if total <= 0 or min(tokens) < 0:
            raise ValueError("Perplexity needs at least one labelled token, and no negative counts.")
        loss = math.fsum(mean * count for mean, count in zip(losses, tokens, strict=True) if count) / total
        try:
            perplexity = math.exp(loss)
        except OverflowError:
            perplexity = math.inf
        return {"perplexity": perplexity, "loss": loss, "tokens": total}
