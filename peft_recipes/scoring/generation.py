"""Batched generation: left-padded, sorted by length, the prompts' common prefix computed once.

An encoder-decoder's prompts are padded on the right, as in training, and share nothing: each token sees all others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from peft_recipes.hardware.device import random_state_kept
from peft_recipes.hardware.fitting import halve_until_it_fits
from peft_recipes.models.bases import end_tokens
from peft_recipes.models.positions import encoder_decoder_limits, learnt_positions, position_limit

if TYPE_CHECKING:
    import torch.nn as nn

BATCH_SIZE = 16
_NOT_SAMPLED = dict.fromkeys(("temperature", "top_p", "top_k"))  # None, or `generate` would warn
# What the settings stored with an encoder-decoder (bart-large-cnn: 4 beams, at least 56 tokens, an end token forced
# at the greatest length) would change in a greedy answer.
ENCODER_DECODER = {"num_beams": 1, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "length_penalty": 1.0,
                   "early_stopping": False, "forced_eos_token_id": None}  # fmt: skip
_LEAST_PREFIX = 16  # tokens; a shorter one saves less than its own pass costs
_SAME = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # of the largest logit


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    pad_token_id: int,
    max_new_tokens: int,
    options: dict[str, Any] | None = None,
    batch_size: int = BATCH_SIZE,
    ends: set[int] | None = None,
    on_answers: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, up to its end token if the model gives one; greedy unless `options` say so.

    Batching does not change an answer. The logits of the shortest prompt's first two tokens, behind padding and the
    common prefix, are compared with those of the prompt alone: a model that gives others (without a cache that can
    be shared, or one that does not mask its padding) answers without the prefix, or in batches of equal lengths.
    options: of GenerationConfig. A batch that does not fit in memory is halved. ends: the tokens that end
    an answer; None: those of the model's generation config. on_answers: called after each batch with the number of
    prompts answered so far.
    """
    was_training = model.training
    model.eval()
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))

    def answer_rest(batch_size: int) -> None:
        rest = [i for i in order if i not in answers]
        batching = _Batching(model, [prompts[i] for i in rest], pad_token_id, ends)
        new_tokens = (options or {}).get("max_new_tokens", max_new_tokens)
        for batch in batching.batches(rest, prompts, batch_size, new_tokens):
            settings = _settings(model, [prompts[i] for i in batch], pad_token_id, max_new_tokens, options)
            for i, new in zip(batch, batching.generate([prompts[i] for i in batch], settings), strict=True):
                answers[i] = new
            on_answers(len(answers))

    try:
        halve_until_it_fits(answer_rest, batch_size)
    finally:
        model.train(was_training)
    return [answers[i] for i in range(len(prompts))]


def end_token_ids(model: nn.Module, tokenizer: Any = None) -> set[int]:
    """The tokens that end an answer: those of the generation config and, with a tokenizer, those that end its turns.

    A base's generation config may lack the end of turn that its chat template, and so the training, ends answers with.
    """
    eos = model.generation_config.eos_token_id
    ends = set(eos) if isinstance(eos, (list, tuple)) else {eos} - {None}
    return ends | (end_tokens(tokenizer) if tokenizer is not None else set())


def room(model: nn.Module, prompt_tokens: int) -> int | None:
    """How many tokens the model can generate after a prompt; None where its positions have no limit.

    An encoder-decoder's answer begins in its decoder, behind the start token.
    """
    limit = learnt_positions(model) or position_limit(model.config.get_text_config())
    if model.config.is_encoder_decoder:
        limit, prompt_tokens = encoder_decoder_limits(model.config)[1], 1
    if limit is None:
        return None
    prompted = [c for c in getattr(model, "peft_config", {}).values() if c.is_prompt_learning]
    return limit - prompt_tokens - sum(config.num_virtual_tokens or 0 for config in prompted)


def _settings(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    pad_token_id: int,
    max_new_tokens: int,
    options: dict[str, Any] | None,
) -> dict[str, Any]:
    """The options of transformers' `generate`."""
    greedy = {"do_sample": False, **_NOT_SAMPLED, **(ENCODER_DECODER if model.config.is_encoder_decoder else {})}
    settings = {**greedy, "max_new_tokens": max_new_tokens, **(options or {})}
    left = room(model, max(map(len, prompts)))
    if left is not None:
        settings["max_new_tokens"] = max(min(settings["max_new_tokens"], left), 1)
    return settings | {"pad_token_id": pad_token_id, "use_cache": True}


class _Batching:
    """How the prompts of a model are laid out: whether its batches may hold padding and share a prefix's cache."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], pad_token_id: int, ends: set[int] | None):
        self.model, self.pad_token_id = model, pad_token_id
        self.ends = end_token_ids(model) if ends is None else ends
        self.device, self.encodes = next(model.parameters()).device, model.config.is_encoder_decoder
        self.prefix, self.cache, self.pads = 0, None, True
        if len(prompts) < 2:
            return
        tested = [prompts[0], prompts[-1]]  # the shortest and the longest
        alone = self._first_logits([prompts[0]])
        self.prefix = _common_prefix(prompts) if _shares_cache(model) else 0
        if self.prefix >= _LEAST_PREFIX:
            self.cache = self._prefix_cache(prompts[0][: self.prefix])
            if self.cache is not None and self._same(tested, alone):
                return
        self.prefix, self.cache = 0, None
        self.pads = self._same(tested, alone)

    def batches(
        self, indices: Sequence[int], prompts: Sequence[Sequence[int]], batch_size: int, new_tokens: int
    ) -> Iterator[list[int]]:
        """Yield batches of sorted indices, the longest prompts first.

        They have equal lengths where padding is not exact, and where the longest leaves no room for `new_tokens`: the
        others have more room than it.
        """
        batch: list[int] = []
        for i in reversed(indices):
            new_length = batch and len(prompts[i]) != len(prompts[batch[0]])
            if new_length and self.pads:
                left = room(self.model, len(prompts[batch[0]]))
                new_length = left is not None and left < new_tokens
            if len(batch) == batch_size or new_length:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def generate(self, prompts: Sequence[Sequence[int]], settings: dict[str, Any]) -> list[list[int]]:
        """Return the new tokens of each prompt of one batch."""
        inputs = self._inputs(prompts)
        if self.cache is not None and settings.get("num_beams", 1) == 1:
            inputs["past_key_values"] = self._repeated(len(prompts))
        with random_state_kept(self.device.type):
            torch.manual_seed(0)  # matters where an option asks for sampling
            output = self.model.generate(**inputs, **settings, **self._stops())
        start = 1 if self.encodes else inputs["input_ids"].shape[1]
        return [_until_end(new, self.ends) for new in output[:, start:].tolist()]

    def _stops(self) -> dict[str, list[int]]:
        return {"eos_token_id": sorted(self.ends)} if self.ends else {}

    def _inputs(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """input_ids and attention_mask [prompts, longest]: the prefix, then padding, then the rest of each prompt."""
        longest = max(map(len, prompts))
        before = [len(p) if self.encodes else self.prefix for p in prompts]  # tokens before the padding
        pairs = list(zip(prompts, before, strict=True))
        ids = [[*p[:n], *[self.pad_token_id] * (longest - len(p)), *p[n:]] for p, n in pairs]
        mask = [[*[1] * n, *[0] * (longest - len(p)), *[1] * (len(p) - n)] for p, n in pairs]
        tensors = {"input_ids": ids, "attention_mask": mask}
        return {name: torch.tensor(values, device=self.device) for name, values in tensors.items()}

    def _repeated(self, count: int) -> Any:
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(count)
        return cache

    def _prefix_cache(self, prefix: Sequence[int]) -> Any | None:
        """The keys and values of the prefix, for a batch of one; None for a cache of another kind."""
        from transformers import DynamicCache

        ids = torch.tensor([list(prefix)], device=self.device)
        cache = getattr(self.model(input_ids=ids, use_cache=True), "past_key_values", None)
        return cache if type(cache) is DynamicCache else None

    def _first_logits(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """[2, vocabulary] the logits of the first prompt's first two new tokens, as `generate` computes them."""
        settings = _settings(self.model, prompts, self.pad_token_id, 2, {"min_new_tokens": 2})
        inputs = self._inputs(prompts)
        if self.cache is not None:
            inputs["past_key_values"] = self._repeated(len(prompts))
        output = self.model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
        return torch.stack([step[0].float() for step in output.logits])

    def _same(self, prompts: Sequence[Sequence[int]], alone: torch.Tensor) -> bool:
        """Whether the first prompt has the same logits in a batch as alone."""
        try:
            batched = self._first_logits(prompts)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError):
            return False  # a model that takes no padding, or no cache of this kind
        tolerance = _SAME.get(next(self.model.parameters()).dtype, _SAME[torch.bfloat16])
        return bool((batched - alone).abs().max() <= tolerance * alone.abs().max())


def _shares_cache(model: nn.Module) -> bool:
    """Whether a prefix's keys and values can be given to `generate`; an adapter's virtual tokens have their own.

    Those of an encoder depend on all of its prompt.
    """
    configs = getattr(model, "peft_config", {}).values()
    return not (model.config.is_encoder_decoder or any(config.is_prompt_learning for config in configs))


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """The number of tokens that all prompts begin with, leaving each a token of its own."""
    first, shortest = prompts[0], min(map(len, prompts)) - 1
    return next((i for i in range(shortest) if any(p[i] != first[i] for p in prompts)), shortest)


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to the first end token, which is kept."""
    end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: end + 1]
