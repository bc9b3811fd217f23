"""Generate text with a base and its adapters, and measure the speed of each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft_recipes.adapters.open import OpenedAdapter
from peft_recipes.data import formats
from peft_recipes.errors import RecipeError
from peft_recipes.hardware.device import synchronise
from peft_recipes.inference.variants import Variants
from peft_recipes.models.positions import encoder_decoder_limits
from peft_recipes.scoring.generation import ENCODER_DECODER, end_token_ids, room


@dataclass(frozen=True)
class Sampling:
    """Generation options, by transformers' names. do_sample None: greedy, unless a sampling option is given."""

    max_new_tokens: int = 128
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        for name in ("max_new_tokens", "top_k"):
            if (value := getattr(self, name)) is not None and value < 1:
                problems.append(f"--{name.replace('_', '-')} {value}: expected 1 or more.")
        for name in ("temperature", "repetition_penalty"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                problems.append(f"--{name.replace('_', '-')} {value:g}: expected a number above 0.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"--top-p {self.top_p:g}: expected a number above 0 up to 1.")
        if not 0 <= self.seed < 2**32:
            problems.append(f"--seed {self.seed}: expected a whole number from 0 to {2**32 - 1}.")
        if problems:
            raise RecipeError(*problems)

    @property
    def samples(self) -> bool:
        given = any(value is not None for value in (self.temperature, self.top_p, self.top_k))
        return given if self.do_sample is None else self.do_sample

    def options(self) -> dict[str, Any]:
        """Return the options of transformers' `generate`. Greedy: sampling options are None, or it would warn."""
        sampling = ("temperature", "top_p", "top_k")
        given = {key: getattr(self, key) for key in (*sampling, "repetition_penalty")}
        given = {key: value for key, value in given.items() if value is not None}
        return {"do_sample": self.samples, **given, **({} if self.samples else dict.fromkeys(sampling))}


def check_generates(adapters: dict[str, OpenedAdapter]) -> None:
    """Raise RecipeError for an adapter that does not generate text."""
    for adapter in adapters.values():
        if not adapter.generates:
            raise RecipeError(f"{adapter.folder} is for {adapter.recipe.task}, it writes no text: use `predict`.")


def generate(
    adapters: dict[str, OpenedAdapter],
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    merged: bool = False,
    raw: bool = False,
    on_answer: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Answer each prompt with the base and each adapter (merged: with each merged model too), all from the same seed.

    raw: use the prompt as it is, without the chat template. on_answer(done, total) is called after each answer. Returns
    one row per prompt: {"prompt", "answers": {variant: {"text", "tokens", "tokens_per_second", "cut_off"}}}; the speed
    is that of the new tokens, after a warm-up. Raises RecipeError: an adapter that generates no text, a prompt that is
    empty or too long.
    """
    check_generates(adapters)
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise RecipeError(f"Prompt {number} is empty.")
    variants = Variants(adapters, merged)
    # Each adapter is asked in the format of its own tokenizer, and the base in that of the first.
    tokens = {
        name: [prompt_tokens(variants.adapter(name), [{"role": "user", "content": text}], raw) for text in prompts]
        for name in variants.names
    }
    for name in (variants.names[0], *adapters):
        for number, ids in enumerate(tokens[name], 1):
            max_answer_tokens(variants.model(name), ids, sampling.max_new_tokens, f"Prompt {number}")
    rows: list[dict[str, Any]] = [{"prompt": prompt, "answers": {}} for prompt in prompts]
    done = 0
    for name in variants.names:  # the outer loop: a merged model is made once
        model, adapter = variants.model(name), variants.adapter(name)
        generate_answer(model, adapter, tokens[name][0], Sampling(max_new_tokens=2))  # warm-up
        for row, ids in zip(rows, tokens[name], strict=True):
            row["answers"][name] = generate_answer(model, adapter, ids, sampling)
            done += 1
            if on_answer is not None:
                on_answer(done, len(variants.names) * len(rows))
    return rows


def prompt_tokens(adapter: OpenedAdapter, messages: list[dict[str, str]], raw: bool = False) -> torch.Tensor:
    """Tokenise a conversation as in training, with the chat template if there is one. Returns [1, tokens]."""
    tokenizer = adapter.processor
    if raw or adapter.recipe.task in ("language-modeling", "seq2seq"):
        ids = tokenizer("\n".join(m["content"] for m in messages))["input_ids"]
    elif tokenizer.chat_template is not None:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=True)
    else:
        turns = [formats.plain_prompt(m["content"]) if m["role"] == "user" else f"{m['content']}\n\n" for m in messages]
        ids = tokenizer("".join(turns))["input_ids"]
    return torch.tensor([list(ids)])


def max_answer_tokens(model: nn.Module, tokens: torch.Tensor, max_new_tokens: int, what: str) -> int:
    """Return how many new tokens fit the model's positions, at most max_new_tokens.

    Raises RecipeError if none does, and for a token that has no row in the model's embedding.
    """
    if not tokens.shape[1]:
        raise RecipeError(f"{what} has no token that the model knows.")
    rows = model.get_input_embeddings().weight.shape[0]
    if int(tokens.max()) >= rows:
        raise RecipeError(f"{what} has token {int(tokens.max())}, and the model's embedding has {rows} rows: its "
                          "tokenizer is another model's, or has tokens that were added after it.")  # fmt: skip
    if model.config.is_encoder_decoder:
        encoder, decoder = encoder_decoder_limits(model.config)
        if encoder is not None and tokens.shape[1] > encoder:
            raise RecipeError(f"{what} has {tokens.shape[1]} tokens; the model takes {encoder}.")
        return max_new_tokens if decoder is None else min(max_new_tokens, decoder - 1)
    left = room(model, tokens.shape[1])
    if left is not None and left < 1:
        raise RecipeError(f"{what} has {tokens.shape[1]} tokens; the model takes {left + tokens.shape[1]}, its answer "
                          "included.")  # fmt: skip
    return max_new_tokens if left is None else min(max_new_tokens, left)


def generate_answer(
    model: nn.Module, adapter: OpenedAdapter, tokens: torch.Tensor, sampling: Sampling, streamer: Any = None
) -> dict[str, Any]:
    """Generate one answer. streamer: a transformers TextStreamer.

    Returns its text, its number of tokens, tokens per second, and whether max_new_tokens cut it off.
    """
    device = next(model.parameters()).device
    ids = tokens.to(device)
    torch.manual_seed(sampling.seed)
    synchronise(device.type)
    max_new_tokens = max_answer_tokens(model, tokens, sampling.max_new_tokens, "The prompt")
    ends = _end_tokens(model, adapter)
    start = time.perf_counter()
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=adapter.processor.pad_token_id,
            eos_token_id=sorted(ends) or None,
            use_cache=True,
            streamer=streamer,
            **(ENCODER_DECODER if adapter.encodes else {}),
            **sampling.options(),
        )
    synchronise(device.type)
    seconds = time.perf_counter() - start
    new = output[0, 1 if adapter.encodes else ids.shape[1] :]  # an encoder-decoder's begins with its start token
    text = adapter.processor.decode(new, skip_special_tokens=True).strip()
    cut_off = len(new) == max_new_tokens and int(new[-1]) not in ends
    return {"text": text, "tokens": len(new), "tokens_per_second": len(new) / seconds, "cut_off": cut_off}


def _end_tokens(model: nn.Module, adapter: OpenedAdapter) -> set[int]:
    """The tokens that end an answer: the base's, as in plain PEFT, and that of a tokenizer the adapter brings."""
    own = adapter.processor.eos_token_id if adapter.has_own_tokenizer else None
    return end_token_ids(model) | ({own} - {None})


def length_and_speed(answer: dict[str, Any]) -> str:
    """Describe an answer: "96 tokens, cut off there, 18.2 tokens/s"."""
    cut_off = ", cut off there" if answer["cut_off"] else ""
    count = f"{answer['tokens']} token{'' if answer['tokens'] == 1 else 's'}"
    return f"{count}{cut_off}, {answer['tokens_per_second']:.1f} tokens/s"
