"""Cross entropy of each position in the memory of its logits alone: their gradient is written over them."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

_ROWS = 128  # positions whose exponentials are held at once


def token_losses(logits: torch.Tensor, targets: torch.Tensor, ignored: int) -> torch.Tensor:
    """Losses [n] of logits [n, vocabulary] for targets [n]; 0 where a target is `ignored`.

    Where a gradient is wanted, backward overwrites `logits` with it, so nobody else may need them after that:
    torch's own cross entropy holds two more tensors of that size (log-probabilities and gradient), which are the peak
    of a small model's step.
    """
    return _TokenLosses.apply(logits, targets, ignored)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, ignored: int) -> torch.Tensor:
        normaliser = torch.cat([part.logsumexp(-1) for part in logits.split(_ROWS)])
        kept = targets != ignored
        places = targets.where(kept, 0)
        ctx.save_for_backward(logits, normaliser, places, kept)
        ctx.done = False
        losses = normaliser - logits.gather(-1, places[:, None])[:, 0]
        return losses.where(kept, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.done:
            raise RuntimeError("token_losses can be differentiated once: its logits hold their gradient now.")
        ctx.done = True
        logits, normaliser, places, kept = ctx.saved_tensors
        # d loss / d logits = softmax - one_hot(target)
        logits.sub_(normaliser[:, None]).exp_()
        logits.scatter_add_(-1, places[:, None], logits.new_full((len(places), 1), -1.0))
        return logits.mul_(gradient.where(kept, 0.0)[:, None]), None, None
