"""Greedy answers of a causal language model to a recipe's prompts, and the speed of its generation."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from peft_recipes.scoring.generation import room

if TYPE_CHECKING:
    import torch.nn as nn

_TIMED_TOKENS = 32  # generated to measure the speed
_ANSWER_TOKENS = 64  # generated at most to answer a prompt

Tokens = Callable[[str, Any], torch.Tensor]  # of a prompt and a tokenizer: [1, tokens]


def answers(
    model: nn.Module, tokenizer: Any, prompts: list[dict[str, str]], tokens: Tokens
) -> list[dict[str, str]] | None:
    """Each prompt with its answer, or why it has none; None without prompts."""
    given = []
    for row in prompts:
        ids = tokens(row["prompt"], tokenizer).to(model.device)
        left = _positions_left(model, ids)
        if left < 1:
            why = f"the prompt has {ids.shape[1]:,} tokens, and the model has no position left for an answer"
            given.append({**row, "answer": "", "skipped": why})
            continue
        generated = _generate(model, ids, tokenizer, max_new_tokens=min(_ANSWER_TOKENS, left))
        text = tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True).strip()
        given.append({**row, "answer": text})
    return given or None


def tokens_per_second(model: nn.Module, tokenizer: Any, prompts: list[dict[str, str]], tokens: Tokens) -> float:
    """The speed of the generation of 32 tokens after the first prompt, fewer where the model has no room for them."""
    ids = tokens(prompts[0]["prompt"] if prompts else "The", tokenizer).to(model.device)
    if (missing := _TIMED_TOKENS - _positions_left(model, ids)) > 0:
        ids = ids[:, min(missing, ids.shape[1] - 1) :]  # the end of a prompt near the context's length
    count = min(_TIMED_TOKENS, _positions_left(model, ids))
    _generate(model, ids, tokenizer, max_new_tokens=min(4, count))  # warm-up
    start = time.perf_counter()
    generated = _generate(model, ids, tokenizer, max_new_tokens=count, min_new_tokens=count)
    return (generated.shape[1] - ids.shape[1]) / (time.perf_counter() - start)


def _positions_left(model: nn.Module, ids: torch.Tensor) -> int:
    """How many tokens the model can generate after a prompt; _ANSWER_TOKENS where its positions have no limit."""
    left = room(model, ids.shape[1])
    return _ANSWER_TOKENS if left is None else left


def _generate(model: nn.Module, ids: torch.Tensor, tokenizer: Any, **options: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
