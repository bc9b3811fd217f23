"""Text from a base and its adapters side by side, with the speed of each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_recipes.adapters.open import Served
from peft_recipes.data import columns
from peft_recipes.errors import RecipeError
from peft_recipes.inference.variants import Forms

if TYPE_CHECKING:
    import torch
    import torch.nn as nn

SYSTEM = "system"


@dataclass(frozen=True)
class Sampling:
    """How text is drawn, by transformers' own names. do_sample None: greedy, unless a sampling option is given."""

    max_new_tokens: int = 128
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise RecipeError(*problems)

    @property
    def samples(self) -> bool:
        given = any(value is not None for value in (self.temperature, self.top_p, self.top_k))
        return given if self.do_sample is None else self.do_sample

    def problems(self) -> list[str]:
        """One line for each value that can't be."""
        found = []
        if self.max_new_tokens < 1:
            found.append(f"--max-new-tokens {self.max_new_tokens}: expected 1 or more.")
        for name in ("temperature", "repetition_penalty"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                found.append(f"--{name.replace('_', '-')} {value:g}: expected a number above 0.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            found.append(f"--top-p {self.top_p:g}: expected a number above 0 up to 1.")
        if self.top_k is not None and self.top_k < 1:
            found.append(f"--top-k {self.top_k}: expected 1 or more.")
        if not 0 <= self.seed < 2**32:
            found.append(f"--seed {self.seed}: expected a whole number from 0 to {2**32 - 1}.")
        return found

    def options(self) -> dict[str, Any]:
        """What `generate` takes; what greedy generation has no use for is None, or transformers would warn."""
        sampled = {key: getattr(self, key) for key in ("temperature", "top_p", "top_k")}
        if self.samples:
            sampled = {key: value for key, value in sampled.items() if value is not None}
        else:
            sampled = dict.fromkeys(sampled)
        penalty = {} if self.repetition_penalty is None else {"repetition_penalty": self.repetition_penalty}
        return {"do_sample": self.samples, **sampled, **penalty}


def check_generates(opened: dict[str, Served]) -> None:
    """Raises RecipeError for an adapter that writes no text."""
    for served in opened.values():
        if not served.generates:
            raise RecipeError(f"{served.folder} is for {served.recipe.task}, it writes no text: use `predict`.")


def generate(
    opened: dict[str, Served],
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    merged: bool = False,
    raw: bool = False,
    on_answer: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """The answers of the base, each adapter (and each merged) to each prompt, each form from the same seed.

    raw: the prompt as it is, without the chat template. Returns one row a prompt: {"prompt", "answers": {form: {"text",
    "tokens", "tokens_per_second", "cut_off"}}}; tokens_per_second is of the new tokens, after a warm-up of its own.
    on_answer is told how many of how many are done. Raises RecipeError: an adapter that writes no text, a prompt too
    long or empty.
    """
    check_generates(opened)
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise RecipeError(f"Prompt {number} is empty.")
    first = next(iter(opened.values()))
    asked = [prompt_tokens(first, [{"role": "user", "content": prompt}], raw) for prompt in prompts]
    forms = Forms(opened, merged)
    for number, tokens in enumerate(asked, 1):
        room(forms.base, tokens, sampling.max_new_tokens, f"Prompt {number}")
    rows: list[dict[str, Any]] = [{"prompt": prompt, "answers": {}} for prompt in prompts]
    done = 0
    for form in forms.names:  # a merged one is made once, and not kept beside the next
        model = forms.model(form)
        write(model, first, asked[0], Sampling(max_new_tokens=2))
        for row, tokens in zip(rows, asked, strict=True):
            row["answers"][form] = write(model, first, tokens, sampling)
            done += 1
            if on_answer is not None:
                on_answer(done, len(forms.names) * len(rows))
    return rows


def prompt_tokens(served: Served, messages: list[dict[str, str]], raw: bool = False) -> torch.Tensor:
    """[1, tokens] of a conversation, as the task showed it in training: by the chat template where there is one."""
    import torch

    tokenizer = served.processor
    if raw or served.recipe.task == "language-modeling":
        ids = tokenizer("\n".join(m["content"] for m in messages))["input_ids"]
    elif tokenizer.chat_template is not None:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=True)
    else:
        turns = [columns.plain_prompt(m["content"]) if m["role"] == "user" else f"{m['content']}\n\n" for m in messages]
        ids = tokenizer("".join(turns))["input_ids"]
    return torch.tensor([list(ids)])


def room(model: nn.Module, tokens: torch.Tensor, wanted: int, what: str) -> int:
    """How many new tokens there is room for, up to those wanted. Raises RecipeError where there is none."""
    config = model.config.get_text_config()
    places = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not tokens.shape[1]:
        raise RecipeError(f"{what} has no token that the model knows.")
    if places is not None and tokens.shape[1] >= places:
        raise RecipeError(f"{what} has {tokens.shape[1]} tokens; the model takes {places}, its answer included.")
    return wanted if places is None else min(wanted, places - tokens.shape[1])


def write(
    model: nn.Module, served: Served, tokens: torch.Tensor, sampling: Sampling, streamer: Any = None
) -> dict[str, Any]:
    """One answer: its text, how many tokens, how many a second, whether it was cut off before it ended by itself.
    streamer: told of each token (TextStreamer)."""
    import torch

    from peft_recipes.hardware.device import synchronise

    device = next(model.parameters()).device
    ids = tokens.to(device)
    torch.manual_seed(sampling.seed)
    synchronise(device.type)
    most = room(model, tokens, sampling.max_new_tokens, "The prompt")
    start = time.perf_counter()
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            pad_token_id=served.processor.pad_token_id,
            use_cache=True,
            streamer=streamer,
            **sampling.options(),
        )
    synchronise(device.type)
    seconds = time.perf_counter() - start
    new = made[0, ids.shape[1] :]
    text = served.processor.decode(new, skip_special_tokens=True).strip()
    ends = model.generation_config.eos_token_id
    ended = int(new[-1]) in (ends if isinstance(ends, list) else [ends])
    cut_off = len(new) == most and not ended
    return {"text": text, "tokens": len(new), "tokens_per_second": len(new) / seconds, "cut_off": cut_off}


def pace(made: dict[str, Any]) -> str:
    """How long an answer became, and how fast: "96 tokens, cut off there, 18.2 tokens/s"."""
    cut = ", cut off there" if made["cut_off"] else ""
    count = f"{made['tokens']} token{'' if made['tokens'] == 1 else 's'}"
    return f"{count}{cut}, {made['tokens_per_second']:.1f} tokens/s"
