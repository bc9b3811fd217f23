"""Exact prefix-shared batches: a batch's examples in one row (or a few), their common prefix once, nothing padded.

The examples stand one after another behind their common token prefix; `position_ids` go on from the prefix, and a 4-D
mask lets each example see the prefix and itself. By causality each token sees exactly what it sees in a padded batch,
so losses and gradients are the same, while the prefix is computed once instead of once an example, no position is
padding, and an example's last token, which predicts nothing, is its label alone. (With dropout the examples of a batch
share the prefix's draw; everything else is equal.)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from peft_recipes.kernels.segment_attention import Segments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100  # a label that is no label, in transformers as in torch's cross entropy
COUNTS = "counts"  # what a batch is made of; for the trainer, never for the model
EXAMPLES = "example_ids"  # [rows, length]: which of the batch's examples a label belongs to, -1 for none

SEGMENTS = "segments"  # of shared rows, for the attention that runs example by example
COMPLETIONS = "completion_mask"  # [2 pairs, length]: where a pair's answers stand, chosen ones first, as trl has it
REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")  # [pairs]: the answers' log-probabilities by the reference
KEPT = "logits_to_keep"  # the columns whose next token is a label: only there the vocabulary head need be computed

# Attention over a row costs as much as all else at about this many positions for each unit of hidden width: measured on
# SmolLM2-135M (a third of the matrix products' time at 640 positions, width 576); by operations alone it would be six.
_BREAK_EVEN = 3
_SHORT = 1_024  # below this a row is too short for its attention to matter, however narrow the model


@dataclass(frozen=True)
class Counts:
    """What one batch holds: tokens of its examples, positions the model computes, how many of those are padding."""

    tokens: int
    computed: int
    padding: int
    examples: int


@dataclass
class SharedPrefixCollator:
    """Examples {"input_ids", "labels"} to a batch of rows that share their common prefix.

    additive_mask: eager attention wants numbers to add, sdpa takes booleans. break_even: row length at which attention
    costs as much as everything else. head_share: the vocabulary head's cost as a share of the rest, a position.
    max_row_tokens: no row is longer (an example that is stands alone), which bounds the mask's memory. by_segments: the
    attention will run example by example (segment_attention.py), so that a row's length costs nothing by itself.

    Returns input_ids, position_ids, labels, example_ids [rows, length], attention_mask [rows, 1, length, length],
    logits_to_keep [columns that predict a label] and the batch's Counts.
    """

    pad_token_id: int
    additive_mask: bool = False
    break_even: float = 2_000
    head_share: float = 0.0
    max_row_tokens: int = 4_096
    by_segments: bool = False

    @classmethod
    def for_model(cls, model: PreTrainedModel, pad_token_id: int, max_row_tokens: int) -> SharedPrefixCollator:
        """A collator with the mask that this model's attention takes, and its costs."""
        config = model.config.get_text_config()
        head = config.vocab_size * config.hidden_size
        body = max(model.num_parameters(exclude_embeddings=True), 1)
        by_segments = config._attn_implementation == "sdpa" and model.device.type in ("cpu", "meta")
        return cls(
            pad_token_id,
            additive_mask=config._attn_implementation == "eager",
            break_even=float("inf") if by_segments else max(_BREAK_EVEN * config.hidden_size, _SHORT),
            by_segments=by_segments,
            head_share=head / body,
            max_row_tokens=max_row_tokens,
        )

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        ids = [list(example["input_ids"]) for example in examples]
        labels = [_shifted_out(example["labels"]) for example in examples]
        shared = shareable_prefix(ids, labels)
        rows = self._rows([len(i) - shared for i in ids], shared, [_labelled(row) for row in labels])
        # What follows the prefix of each example. Its last token predicts nothing and nobody looks back at it: only the
        # label is needed, and goes where the next example begins, whose first token has none of its own.
        sizes = [[len(ids[e]) - shared for e in row] for row in rows]
        sizes = [
            [size - (size > 1 and after > 0) for size, after in zip(row, [*row[1:], 0], strict=True)] for row in sizes
        ]
        length = max(shared + sum(row) for row in sizes)
        made = {
            "input_ids": torch.full((len(rows), length), self.pad_token_id),
            "position_ids": torch.zeros((len(rows), length), dtype=torch.long),
            "labels": torch.full((len(rows), length), IGNORED),
            EXAMPLES: torch.full((len(rows), length), -1),
        }
        segments = torch.full((len(rows), length), -2)  # -2: padding, -1: the prefix, else the example
        for number, row in enumerate(rows):
            place = shared
            made["input_ids"][number, :shared] = torch.tensor(ids[row[0]][:shared])
            made["position_ids"][number, :shared] = torch.arange(shared)
            segments[number, :shared] = -1
            for example, size in zip(row, sizes[number], strict=True):
                here, own = slice(place, place + size), slice(shared, shared + size)
                made["input_ids"][number, here] = torch.tensor(ids[example][own])
                made["position_ids"][number, here] = torch.arange(shared, shared + size)
                segments[number, here] = example
                # From the second on: the first place may hold the label of the example before.
                told = slice(place + 1, place + len(ids[example]) - shared)
                made["labels"][number, told] = torch.tensor(labels[example][shared + 1 :], dtype=torch.long)
                made[EXAMPLES][number, told] = example
                place = here.stop
        made["attention_mask"] = self._mask(segments)
        if self.by_segments:
            made[SEGMENTS] = Segments.after_prefix(shared, sizes, length)
        made[KEPT] = predicting_columns(made["labels"])
        padding = int((segments == -2).sum())
        made[COUNTS] = Counts(sum(map(len, ids)), segments.numel(), padding, len(examples))
        return made

    def _mask(self, segments: torch.Tensor) -> torch.Tensor:
        """[rows, 1, length, length]: True (or 0) where a position may look."""
        of_query, of_key = segments[:, :, None], segments[:, None, :]
        return self._as_attention_takes_it(((of_query == of_key) | ((of_key == -1) & (of_query >= 0))).tril_())

    def _as_attention_takes_it(self, allowed: torch.Tensor) -> torch.Tensor:
        """[rows, 1, length, length] of what is allowed [rows, length, length]: as booleans, or as numbers to add."""
        # A padding position sees itself: no row of nothing, no NaN.
        allowed |= torch.eye(allowed.shape[-1], dtype=torch.bool)
        if not self.additive_mask:
            return allowed[:, None]
        numbers = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)
        return numbers[:, None]

    def _rows(self, lengths: list[int], shared: int, labelled: list[int]) -> list[list[int]]:
        """Which examples stand in which row: as many rows as cost least, none beyond the budget."""
        best, cost, worse = [[e] for e in range(len(lengths))], float("inf"), 0
        fewest = max(1, (shared + sum(lengths)) // self.max_row_tokens)
        for count in range(min(fewest, len(lengths)), len(lengths) + 1):
            rows = _balanced(lengths, count)
            longest = shared + max(sum(lengths[e] for e in row) for row in rows)
            if longest > self.max_row_tokens and count < len(lengths):
                continue
            # The head is computed where any row has a label, so in one row at its labels alone.
            heads = sum(labelled) if count == 1 else min(longest, sum(labelled)) * count
            found = count * longest * (1 + longest / self.break_even) + heads * self.head_share
            if found < cost:
                best, cost, worse = rows, found, 0
            elif (worse := worse + 1) > 2:
                break  # still more rows repeat the prefix still more often
        return best


@dataclass
class PaddedCollator:
    """Examples {"input_ids", "labels"} to a padded batch: what the shared rows are held against, and fall back to.

    keeps_logits: whether the model takes `logits_to_keep`, by the columns of its input.
    """

    pad_token_id: int
    keeps_logits: bool = True

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        length = max(len(example["input_ids"]) for example in examples)
        ids = torch.full((len(examples), length), self.pad_token_id)
        labels = torch.full((len(examples), length), IGNORED)
        mask = torch.zeros((len(examples), length), dtype=torch.long)
        for row, example in enumerate(examples):
            size = len(example["input_ids"])
            ids[row, :size] = torch.tensor(example["input_ids"])
            labels[row, :size] = torch.tensor(_shifted_out(example["labels"]))
            mask[row, :size] = 1  # by place, never by id: SmolLM2's padding token is its turn end
        counts = Counts(int(mask.sum()), mask.numel(), int((mask == 0).sum()), len(examples))
        places = torch.arange(len(examples))[:, None].expand(-1, length).masked_fill(mask == 0, -1)
        made = {"input_ids": ids, "labels": labels, "attention_mask": mask, EXAMPLES: places, COUNTS: counts}
        return {**made, KEPT: predicting_columns(labels)} if self.keeps_logits else made


def predicting_columns(labels: torch.Tensor) -> torch.Tensor:
    """[n] the columns of labels [rows, length] after which any row has a label."""
    return (labels[:, 1:] != IGNORED).any(0).nonzero().squeeze(1)


def shareable_prefix(ids: list[list[int]], labels: list[list[int]]) -> int:
    """Tokens that all examples begin with, up to one before the first labelled token of any.

    The token before a label predicts it, so it must be the example's own. One example alone shares with nobody: 0.
    """
    if len(ids) < 2:
        return 0
    most = min(next((i for i, label in enumerate(row) if label != IGNORED), len(row)) - 1 for row in labels)
    first = ids[0]
    for place in range(max(0, min(most, *map(len, ids)))):
        if any(row[place] != first[place] for row in ids):
            return place
    return max(0, min(most, *map(len, ids)))


def why_padded(model: PreTrainedModel, max_length: int, prompt_learning: bool = False) -> str | None:
    """Why rows can't be shared exactly on this model, in a few words; None where they can."""
    config = model.config.get_text_config()
    attention = config._attn_implementation
    if prompt_learning:
        return "its adapter puts virtual tokens before the input"
    if attention not in ("sdpa", "eager"):
        return f"attention '{attention}' takes no mask of its own (sdpa and eager do)"
    if getattr(config, "output_router_logits", False):
        return "its load-balancing loss counts tokens by a mask of two dimensions"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "some of its layers look back by place in the row"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder and decoder"
    takes = inspect.signature(type(model).forward).parameters
    if "position_ids" not in takes or "logits_to_keep" not in takes:
        return f"{type(model).__name__} takes no {'position_ids' if 'position_ids' not in takes else 'logits_to_keep'}"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention", "sliding_attention"} or getattr(model, "_is_stateful", False):
        return "some of its layers are no attention: they carry a state through the row"
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds or (window and getattr(config, "layer_types", None) is None)
    if slides and window and window < max_length and getattr(config, "use_sliding_window", True):
        return f"its attention looks back {window} tokens, fewer than max_length {max_length}"
    return None


def _shifted_out(labels: Sequence[int]) -> list[int]:
    """Labels without the first: no token comes before it that could predict it."""
    return [IGNORED, *labels[1:]]


def _labelled(labels: list[int]) -> int:
    return sum(label != IGNORED for label in labels)


def _balanced(lengths: list[int], count: int) -> list[list[int]]:
    """The examples on `count` rows of like length: the longest first, each to the row that is shortest so far."""
    rows: list[list[int]] = [[] for _ in range(count)]
    sizes = [0] * count
    for example in sorted(range(len(lengths)), key=lambda e: -lengths[e]):
        shortest = sizes.index(min(sizes))
        rows[shortest].append(example)
        sizes[shortest] += lengths[example]
    return [sorted(row) for row in rows]
