"""Memory-efficient token-level cross-entropy: the gradient overwrites the logits in place."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

_CHUNK = 128  # positions whose exponentials are in memory at once


def token_losses(logits: torch.Tensor, targets: torch.Tensor, ignored: int) -> torch.Tensor:
    """Compute losses [n] of logits [n, vocabulary] for targets [n]; 0 where a target is `ignored`.

    The backward pass overwrites `logits` with their gradient, so nothing else may use them afterwards. torch's own
    cross-entropy allocates two more tensors of that size (log-probabilities and gradient), the memory peak of a small
    model's step.
    """
    return _TokenLosses.apply(logits, targets, ignored)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, ignored: int) -> torch.Tensor:
        normaliser = torch.cat([chunk.logsumexp(-1) for chunk in logits.split(_CHUNK)])
        kept = targets != ignored
        labels = targets.where(kept, 0)
        ctx.save_for_backward(logits, normaliser, labels, kept)
        ctx.done = False
        losses = normaliser - logits.gather(-1, labels[:, None])[:, 0]
        return losses.where(kept, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.done:
            raise RuntimeError("token_losses can be differentiated once: its logits hold their gradient now.")
        ctx.done = True
        logits, normaliser, labels, kept = ctx.saved_tensors
        # d loss / d logits = softmax - one_hot(target)
        logits.sub_(normaliser[:, None]).exp_()
        logits.scatter_add_(-1, labels[:, None], logits.new_full((len(labels), 1), -1.0))
        return logits.mul_(grad.where(kept, 0.0)[:, None]), None, None
