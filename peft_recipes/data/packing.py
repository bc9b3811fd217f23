"""Exact prefix-shared packing: the examples of a batch in one sequence (or a few) behind their common token prefix.

`position_ids` of each example continue from the prefix, and a 4-D mask lets each example see the prefix and itself. By
causality each token sees what it sees in a padded batch, so losses and gradients are the same. The prefix is computed
once, and nothing is padded but the end of the shorter sequences. The last token of an example predicts nothing, so only
its label is kept. (With dropout the examples share the prefix's random draw; everything else is equal.)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from peft_recipes.kernels.packed_attention import MASK, Preparation, kernels_for, windows_of
from peft_recipes.kernels.segments import Part, Segments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100  # the label that transformers and torch's cross_entropy ignore

# Keys of a batch besides the model's own.
COUNTS = "counts"  # the batch's Counts, for the trainer
EXAMPLES = "example_ids"  # [sequences, length]: the example that a label belongs to, -1 for none
SEGMENTS = "segments"  # the Segments of packed sequences, for packed_attention.py
COMPLETIONS = "completion_mask"  # [2 pairs, length]: the tokens of the answers, chosen ones first, as in trl
REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")  # [pairs]: log-probabilities under the reference model
KEPT = "logits_to_keep"  # the columns whose next token is labelled: the LM head is computed for these alone
PREDICTING = "predicting_columns"  # the same, where the model takes no such argument

# Attention over a sequence costs as much as all else at about this many positions per unit of hidden size: measured on
# SmolLM2-135M (a third of the matrix products' time at 640 positions, hidden size 576); by operations it would be six.
_BREAK_EVEN = 3
_SHORT = 1_024  # below this length attention does not matter, however small the hidden size

_DENSE = Preparation(MASK)


@dataclass(frozen=True)
class Counts:
    """A batch's tokens, the positions that the model computes, the padding among them, and the number of examples."""

    tokens: int
    computed: int
    padding: int
    examples: int


class Piece(NamedTuple):
    """Consecutive tokens of a packed sequence.

    labels: of these tokens; one more than `ids` where the last token was left out. position: the first position id.
    branch: 0 of an example's only piece or a pair's prompt, 1 and 2 of the answers to the prompt before them, which see
    it but not each other. example: of the labels.
    """

    ids: list[int]
    labels: list[int]
    position: int
    branch: int = 0
    example: int = -1


@dataclass
class SharedPrefixCollator:
    """Collate examples {"input_ids", "labels"} to sequences that share their common prefix.

    break_even: length at which attention costs as much as everything else; with every kernel but the dense mask a
    sequence's length costs nothing by itself. head_share: the LM head's cost per position, relative to the rest.
    max_row_tokens: the longest sequence; a longer example gets its own. prepare: of the attention kernel that the batch
    is for (packed_attention.py). Picklable, for a DataLoader's workers.

    Returns input_ids, position_ids, labels, example_ids [sequences, length], logits_to_keep [columns that predict a
    label], the batch's Counts and its Segments, from which the model's attention follows.
    """

    pad_token_id: int
    break_even: float = 2_000
    head_share: float = 0.0
    max_row_tokens: int = 4_096
    prepare: Preparation = _DENSE

    @property
    def kernel(self) -> str:
        return self.prepare.kernel

    @classmethod
    def for_model(
        cls, model: PreTrainedModel, pad_token_id: int, max_row_tokens: int, kernel: str | None = None
    ) -> SharedPrefixCollator:
        """A collator with the costs of this model. kernel: of its attention; None: the likeliest to be fastest."""
        config = model.config.get_text_config()
        head = config.vocab_size * config.hidden_size
        body = max(model.num_parameters(exclude_embeddings=True), 1)
        kernel = kernel or next(iter(kernels_for(config, model.device.type)), MASK)
        return cls(
            pad_token_id,
            break_even=max(_BREAK_EVEN * config.hidden_size, _SHORT) if kernel == MASK else float("inf"),
            head_share=head / body,
            max_row_tokens=max_row_tokens,
            prepare=Preparation(kernel, windows_of(config)),
        )

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        ids = [list(example["input_ids"]) for example in examples]
        labels = [_predictable(example["labels"]) for example in examples]
        shared = shareable_prefix(ids, labels)
        lengths = [len(tokens) - shared for tokens in ids]
        sequences = []
        for packed in self._assign(lengths, shared, [sum(x != IGNORED for x in row) for row in labels]):
            pieces = []
            for i, after in zip(packed, [*packed[1:], None], strict=True):
                # An example's last token predicts nothing and no later token sees it. It is left out where another
                # example follows, whose first position then holds its label: that has none of its own.
                last = len(ids[i]) - (lengths[i] > 1 and after is not None and lengths[after] > 0)
                pieces.append(Piece(ids[i][shared:last], labels[i][shared:], shared, example=i))
            sequences.append(pieces)
        return self._pack(ids[0][:shared], sequences, sum(map(len, ids)), len(examples))

    def _pack(self, prefix: list[int], sequences: list[list[Piece]], tokens: int, examples: int) -> dict[str, Any]:
        """The batch of sequences that begin with the prefix; `tokens` and `examples` are for its Counts."""
        length = len(prefix) + max(sum(len(piece.ids) for piece in pieces) for pieces in sequences)
        shape = (len(sequences), length)
        batch: dict[str, Any] = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "position_ids": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED),
            EXAMPLES: torch.full(shape, -1),
        }
        for row, pieces in enumerate(sequences):
            start = 0
            for piece in (Piece(prefix, [], 0), *pieces):
                stop = start + len(piece.ids)
                batch["input_ids"][row, start:stop] = torch.tensor(piece.ids, dtype=torch.long)
                batch["position_ids"][row, start:stop] = torch.arange(piece.position, piece.position + len(piece.ids))
                labelled = slice(start + 1, start + len(piece.labels))  # no token of the piece predicts its first
                batch["labels"][row, labelled] = torch.tensor(piece.labels[1:], dtype=torch.long)
                batch[EXAMPLES][row, labelled] = piece.example
                start = stop
        segments = Segments([_parts(len(prefix), pieces) for pieces in sequences], length)
        batch[SEGMENTS] = self.prepare(segments)
        batch[KEPT] = predicting_columns(batch["labels"])
        filled = sum(len(prefix) + sum(len(piece.ids) for piece in pieces) for pieces in sequences)
        batch[COUNTS] = Counts(tokens, length * len(sequences), length * len(sequences) - filled, examples)
        return batch

    def _assign(self, lengths: list[int], shared: int, labelled: list[int]) -> list[list[int]]:
        """The examples of each sequence: as many sequences as cost least, none beyond max_row_tokens."""
        best, lowest, worse = [[i] for i in range(len(lengths))], float("inf"), 0
        fewest = max(1, (shared + sum(lengths)) // self.max_row_tokens)
        for count in range(min(fewest, len(lengths)), len(lengths) + 1):
            sequences = _balanced(lengths, count)
            longest = shared + max(sum(lengths[i] for i in packed) for packed in sequences)
            if longest > self.max_row_tokens and count < len(lengths):
                continue
            # The head is computed for the columns that any sequence has labels in; in one sequence, for its labels.
            heads = sum(labelled) if count == 1 else min(longest, sum(labelled)) * count
            cost = count * longest * (1 + longest / self.break_even) + heads * self.head_share
            if cost < lowest:
                best, lowest, worse = sequences, cost, 0
            elif (worse := worse + 1) > 2:
                break  # more sequences repeat the prefix more often
        return best


@dataclass
class PaddedCollator:
    """Collate examples {"input_ids", "labels"} to a padded batch, where prefix-shared packing is not exact.

    keeps_logits: whether the model takes `logits_to_keep` as columns of its input.
    """

    pad_token_id: int
    keeps_logits: bool = True

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        lengths = [len(example["input_ids"]) for example in examples]
        labels = _padded([_predictable(example["labels"]) for example in examples], IGNORED)
        # The mask is made from lengths: SmolLM2's padding token is also its end of turn.
        mask = _padded([[1] * length for length in lengths], 0)
        batch = {
            "input_ids": _padded([example["input_ids"] for example in examples], self.pad_token_id),
            "labels": labels,
            "attention_mask": mask,
            EXAMPLES: _padded([[i] * length for i, length in enumerate(lengths)], -1),
            COUNTS: Counts(sum(lengths), mask.numel(), mask.numel() - sum(lengths), len(examples)),
        }
        return {**batch, KEPT if self.keeps_logits else PREDICTING: predicting_columns(labels)}


def predicting_columns(labels: torch.Tensor) -> torch.Tensor:
    """[n] the columns of labels [sequences, length] before a label of any sequence."""
    return (labels[:, 1:] != IGNORED).any(0).nonzero().squeeze(1)


def shareable_prefix(ids: list[list[int]], labels: list[list[int]]) -> int:
    """The length of the examples' common prefix, which ends one token before the first label of any.

    The token before a label predicts it, so each example needs its own. A single example shares nothing: 0.
    """
    if len(ids) < 2:
        return 0
    first_label = min(next((i for i, x in enumerate(row) if x != IGNORED), len(row)) for row in labels)
    return max(0, min(first_label - 1, common_prefix(ids)))


def why_padded(model: PreTrainedModel, max_length: int, prompt_learning: bool = False) -> str | None:
    """Why prefix-shared packing would not be exact on this model, in a few words; None where it is."""
    config = model.config.get_text_config()
    attention = config._attn_implementation
    if prompt_learning:
        return "its adapter puts virtual tokens before the input"
    if attention not in ("sdpa", "eager", "flex_attention") and "flash" not in (attention or ""):
        return f"attention '{attention}' takes no mask of its own (sdpa, eager, flex and flash attention do)"
    if hasattr(config, "output_router_logits") and getattr(config, "router_aux_loss_coef", 0.0):
        return "its load-balancing loss counts tokens by a mask of two dimensions"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "some of its layers look back by position in the sequence"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder and decoder"
    takes = inspect.signature(type(model).forward).parameters
    if "position_ids" not in takes or "logits_to_keep" not in takes:
        return f"{type(model).__name__} takes no {'position_ids' if 'position_ids' not in takes else 'logits_to_keep'}"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention", "sliding_attention"} or getattr(model, "_is_stateful", False):
        return "some of its layers are no attention: they carry a state through the sequence"
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds or (window and getattr(config, "layer_types", None) is None)
    looks_back = slides and window and window < max_length and getattr(config, "use_sliding_window", True)
    # The kernels take a layer's window from the call of its attention; a dense mask is one for all layers.
    if looks_back and (attention == "eager" or not _hands_its_window(type(model))):
        return f"its attention looks back {window} tokens, fewer than max_length {max_length}"
    return None


@functools.cache
def _hands_its_window(model_class: type) -> bool:
    """Whether a model's layers tell their attention function how far they look back."""
    return "sliding_window=" in inspect.getsource(inspect.getmodule(model_class))


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """The number of tokens that all sequences begin with."""
    columns = enumerate(zip(*sequences, strict=False))
    return next((i for i, tokens in columns if len(set(tokens)) > 1), min(map(len, sequences)))


def _predictable(labels: Sequence[int]) -> list[int]:
    """Labels without the first: no token comes before it that could predict it."""
    return [IGNORED, *labels[1:]][: len(labels)]


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value)


def _parts(prefix: int, pieces: list[Piece]) -> list[Part]:
    """A sequence's parts for segment_attention.py. A prompt (branch 0) and its first answer attend alike: one part."""
    sees = ((0, prefix),) if prefix else ()
    parts = [Part(0, prefix)] if prefix else []
    start = prompt_start = prompt_stop = prefix
    for piece in pieces:
        stop = start + len(piece.ids)
        if piece.branch == 0:
            parts.append(Part(start, stop, sees))
            prompt_start, prompt_stop = start, stop
        elif piece.branch == 1:
            parts[-1] = Part(parts[-1].start, stop, sees)
        else:
            prompt = ((prompt_start, prompt_stop),) if prompt_stop > prompt_start else ()
            parts.append(Part(start, stop, sees + prompt))
        start = stop
    return parts


def _balanced(lengths: list[int], count: int) -> list[list[int]]:
    """The examples in `count` sequences of similar length: the longest first, each to the shortest sequence so far."""
    sequences: list[list[int]] = [[] for _ in range(count)]
    totals = [0] * count
    for example in sorted(range(len(lengths)), key=lambda e: -lengths[e]):
        shortest = totals.index(min(totals))
        sequences[shortest].append(example)
        totals[shortest] += lengths[example]
    return [sorted(packed) for packed in sequences]
