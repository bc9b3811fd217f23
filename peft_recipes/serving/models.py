"""The base and its adapters in memory, each in a lane, and compared with plain PEFT before anything is served."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peft_recipes.adapters.adapter_set import AdapterSet
from peft_recipes.adapters.merge import public_name
from peft_recipes.adapters.open import OpenedAdapter, open_adapters
from peft_recipes.errors import RecipeError, root_cause, unknown
from peft_recipes.inference.generate import check_generates
from peft_recipes.inference.variants import BASE, Variants
from peft_recipes.models import bases
from peft_recipes.scoring.generation import end_token_ids, room
from peft_recipes.serving.lane import Lane, Row
from peft_recipes.serving.names import Given, folder_of, served_names

# How far a row's logits may be from those of plain PEFT, as a share of the largest.
_SAME = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_TRIAL_TOKENS = 3


@dataclass(eq=False)
class Served:
    """One model of /v1/models. adapter: its name within the lane; None is the base. ends: tokens that end an answer.

    context: positions for prompt and answer; None: no limit. vocabulary: rows of the embedding.
    plain_chat: chat goes through the plain prompt that the adapter was trained with, as there is no chat template.
    """

    name: str
    lane: Lane
    adapter: str | None
    tokenizer: Any
    ends: frozenset[int]
    context: int | None
    vocabulary: int
    opened: OpenedAdapter
    plain_chat: bool = False
    virtual: Callable[[], Any] | None = None
    repetition_penalty: float = 1.0

    def row(self, prompt: list[int]) -> Row:
        """Make a row for a prompt's tokens."""
        return Row(prompt, self.adapter, self.virtual)


class Models:
    """What is served, by name; the base first. lanes: each goes through the model by itself."""

    def __init__(self, adapters: dict[str, OpenedAdapter]):
        self._variants = Variants(adapters)
        self.base_name = public_name(self._variants.first.base_name)
        if taken := {self.base_name, BASE} & set(adapters):
            raise RecipeError(f"'{taken.pop()}' is the base; give the adapter another name, NAME=ADAPTER.")
        self._base = self._variants.base
        mixing = [n for n in adapters if self._set(n).mixes(n) and not self._variants.has_own_model(n)]
        # One set holds all LoRAs that can share a batch, and the base's rows join them.
        shared = self._set(mixing[0]) if mixing else None
        self._shared = Lane(self._base, self._plain if shared is None else functools.partial(_mixed, shared))
        self.lanes = [self._shared]
        self.by_name = {self.base_name: self._served(self.base_name, None, self._shared)}
        self._check_base()
        for name, adapter in adapters.items():
            self.by_name[name] = self._add(name, adapter, name in mixing)

    def _plain(self, inputs: dict[str, Any], names: Sequence[str | None]) -> Any:
        return self._base(**inputs)

    def _set(self, name: str) -> AdapterSet:
        return self._variants.adapter_set(name)

    def _add(self, name: str, adapter: OpenedAdapter, shared: bool) -> Served:
        """Put an adapter into a lane: the shared one, where it has the same logits there, else one of its own."""
        saved = adapter.saved
        if getattr(saved.config, "alora_invocation_tokens", None):
            raise RecipeError(f"{adapter.folder} is an activated LoRA, which changes within a prompt; it can't be "
                              "served. `generate` answers with it.")  # fmt: skip
        own = functools.partial(_one, self._set(name), name)
        if saved.config.is_prompt_learning:
            virtual = functools.partial(_virtual_tokens, self._set(name), name)
            lanes = [(self._shared, None, virtual)]
        else:
            lanes = [(self._shared, name, None)] if shared else []
            lanes += [
                (Lane(self._set(name).model.get_base_model(), own, exclusive=x), name, None) for x in (False, True)
            ]
        for lane, within, virtual in lanes:
            served = self._served(name, adapter, lane, within, virtual)
            reason = self._unlike_plain(served)
            if not reason:
                self.lanes += [] if lane in self.lanes else [lane]
                return served
        raise RecipeError(f"{adapter.folder} ({saved.method}) can't be served: {reason} `generate` answers with it.")

    def _served(
        self, name: str, adapter: OpenedAdapter | None, lane: Lane, within: str | None = None, virtual: Any = None
    ) -> Served:
        opened = adapter or self._variants.first
        # The base is asked in its own format, an adapter in that which it was trained with.
        tokenizer = bases.load_tokenizer(opened.recipe) if adapter is None else opened.processor
        plain = adapter is not None and adapter.saved.is_run and adapter.recipe.task != "language-modeling"
        model = self._base if virtual is None else self._set(name).use(name)
        penalty = getattr(self._base.generation_config, "repetition_penalty", None)
        return Served(
            name, lane, within, tokenizer, frozenset(end_token_ids(self._base, tokenizer)), room(model, 0),
            lane.base.get_input_embeddings().weight.shape[0], opened, plain and tokenizer.chat_template is None,
            virtual, penalty or 1.0,
        )  # fmt: skip

    def _check_base(self) -> None:
        """Let the base's lane hold one row at a time if the base answers otherwise in a padded batch than alone."""
        base, reason = self.by_name[self.base_name], ""
        for self._shared.exclusive in (False, True):
            reason = self._unlike_plain(base)
            if not reason:
                return
        raise RecipeError(f"'{self.base_name}' can't be served: {reason} `generate` answers with it.")

    def _unlike_plain(self, served: Served) -> str:
        """Why a model, in its lane, is not answered as by plain transformers and PEFT; empty if it is."""
        try:
            difference = self._difference(served)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            return f"{root_cause(error).rstrip('.')}."
        if difference <= _SAME.get(next(self._base.parameters()).dtype, _SAME[torch.bfloat16]):
            return ""
        return f"its logits differ from those of plain PEFT by {difference:.1e} of the largest."

    @torch.inference_mode()
    def _difference(self, served: Served) -> float:
        """The largest difference of a row's first logits, in a batch with a longer one, from those of the model alone.

        As a share of the largest logit. The model alone computes all tokens at once, without a cache.
        """
        lane, vocabulary = served.lane, min(served.vocabulary, served.tokenizer.vocab_size)
        row, other = (served.row([(7 * i + 3) % vocabulary for i in range(length)]) for length in (5, 9))
        rows = [row] if lane.exclusive else [other, row]
        if not lane.exclusive and lane is self._shared:
            other.adapter, other.virtual = None, None
        try:
            for each in rows:
                each.token = int(lane.read_prompt(each).argmax())
                lane.join(each)
            logits, tokens = [], [*row.prompt]
            for _ in range(_TRIAL_TOKENS):
                tokens.append(row.token)
                step = lane.step()
                logits.append(step[lane.rows.index(row)])
                for each, values in zip(lane.rows, step, strict=True):
                    each.token = int(values.argmax())
        finally:
            lane.clear()
        expected = self._alone(served, tokens)[-_TRIAL_TOKENS:]
        return float((torch.stack(logits) - expected).abs().max() / expected.abs().max())

    def _alone(self, served: Served, tokens: list[int]) -> torch.Tensor:
        """[tokens, vocabulary] the logits of plain transformers and PEFT."""
        model = self._base if served.name == self.base_name else self._variants.model(served.name)
        ids = torch.tensor([tokens], device=served.lane.device)
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return output.logits[0, -len(tokens) :].float()

    def find(self, name: str) -> Served:
        """The model of a name; "base" is the base. Raises RecipeError, which names the nearest, for an unknown one."""
        if name == BASE:
            name = self.base_name
        if name not in self.by_name:
            raise RecipeError(unknown("model", name, [BASE, *self.by_name]))
        return self.by_name[name]


def _mixed(adapters: AdapterSet, inputs: dict[str, Any], names: Sequence[str | None]) -> Any:
    """One forward pass for rows with different adapters; plainly where they have the same."""
    if len(set(names)) == 1:
        return adapters.use(names[0])(**inputs)
    return adapters.ask(inputs, names)


def _one(adapters: AdapterSet, name: str, inputs: dict[str, Any], names: Sequence[str | None]) -> Any:
    return adapters.use(name)(**inputs)


def _virtual_tokens(adapters: AdapterSet, name: str) -> Any:
    """A prompt-learning adapter's embeddings [1, tokens, width], or the cache of a prefix."""
    return adapters.use(name).get_prompt(batch_size=1)


def load_models(given: Sequence[str], base: str | None = None, *, trust_remote_code: bool = False) -> Models:
    """Load what is served. Raises RecipeError: no adapter, another base, no text, a method that can't be served."""
    parsed = [Given.parse(text) for text in given]
    names = served_names(parsed)
    folders: list[Path] = [folder_of(one.place) for one in parsed]
    opened = list(open_adapters(folders, base, trust_remote_code=trust_remote_code).values())
    adapters = dict(zip(names, opened, strict=True))
    check_generates(adapters)
    for adapter in opened:
        if adapter.encodes:
            raise RecipeError(
                f"{adapter.folder} is on an encoder-decoder, which `serve` does not take: use `generate`."
            )
    return Models(adapters)
