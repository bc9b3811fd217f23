"""Pretrain a small GPT-2 on docstrings: about a minute on two cores, with the same result every time.

The number of steps is fixed, not the time, so that a slow machine gets the same model as a fast one.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft_recipes.embedded.cache import quiet_bars, say

if TYPE_CHECKING:
    import torch
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"
_DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


@dataclass(frozen=True)
class Pretraining:
    """Sizes and schedule: the best of a dozen trials at equal computing time, about a minute on two cores.

    A width of 384 reads half as many tokens in that time; learning rates of 5e-4 and 2e-3 were worse than 1e-3 (at 8e-3
    the model only learns token frequencies); longer sequences were worse.
    """

    n_embd: int = 256
    n_layer: int = 2
    n_head: int = 4
    vocab_size: int = 5120  # large enough that a LoRA r=16 on every linear layer is under 5 % of the model
    n_positions: int = 512
    row_length: int = 128
    rows_per_step: int = 4
    steps: int = 700
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    validation_rows: int = 96
    seed: int = 0


def pretrain(texts: list[str], folder: Path, settings: Pretraining | None = None) -> float:
    """Train a tokenizer and a model on `texts`, save both to `folder` and return the validation loss in nats per token.

    Raises:
        ValueError: the texts are too few for the validation rows and one batch.
    """
    import torch

    settings = settings or Pretraining()
    texts = random.Random(settings.seed).sample(texts, len(texts))  # validation rows from all libraries
    tokenizer = train_tokenizer(texts, settings)
    rows = packed_rows(texts, tokenizer, settings.row_length)
    validation, rows = rows[: settings.validation_rows], rows[settings.validation_rows :]
    if len(rows) < settings.rows_per_step:
        raise ValueError(f"{len(rows)} rows of {settings.row_length} tokens are not enough to train on")
    model = _new_model(tokenizer, settings)
    _fit(model, rows, settings)
    model.config.update(dict.fromkeys(_DROPOUT, 0.1))  # GPT-2's own, for fine-tuning
    with quiet_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    with torch.inference_mode():
        losses = [_loss(model, batch).item() * len(batch) for batch in validation.split(settings.rows_per_step)]
    return sum(losses) / len(validation)


def train_tokenizer(texts: list[str], settings: Pretraining) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE like GPT-2's, with a padding token that is not the end-of-text token."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, settings.vocab_size, 0, show_progress=False, special_tokens=[END, PAD])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.to_str()),
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=PAD,
        model_max_length=settings.n_positions,
        clean_up_tokenization_spaces=False,
    )


def packed_rows(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> torch.Tensor:
    """Pack the texts, each with an end token, into (rows, length) token ids; the incomplete last row is dropped."""
    import torch

    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    ids = [token for text in encoded for token in [*text.ids, tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // length * length], dtype=torch.long).view(-1, length)


def _new_model(tokenizer: PreTrainedTokenizerFast, settings: Pretraining) -> GPT2LMHeadModel:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=settings.n_positions,
        n_embd=settings.n_embd,
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **dict.fromkeys(_DROPOUT, 0.0),  # a minute is too short to overfit
    )
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random state as it was
        torch.manual_seed(settings.seed)
        return GPT2LMHeadModel(config).float()


def _fit(model: GPT2LMHeadModel, rows: torch.Tensor, settings: Pretraining) -> None:
    import torch

    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    others = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99), fused=True)
    generator = torch.Generator().manual_seed(settings.seed)
    examples = settings.steps * settings.rows_per_step
    epochs = -(-examples // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(epochs)])[:examples]
    model.train()
    for step, batch in enumerate(order.split(settings.rows_per_step)):
        warmup = min(1.0, (step + 1) / settings.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * warmup * cosine
        # rows are shorter than the context: random start positions train every position embedding
        starts = torch.randint(settings.n_positions - settings.row_length + 1, (len(batch), 1), generator=generator)
        loss = _loss(model, rows[batch], starts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % max(1, settings.steps // 5) == 0:
            say(f"  step {step + 1} of {settings.steps}: loss {loss.item():.2f}")
    model.eval()


def _loss(model: GPT2LMHeadModel, ids: torch.Tensor, starts: torch.Tensor | int = 0) -> torch.Tensor:
    """Mean next-token cross-entropy of (rows, length) ids at positions from `starts` on."""
    import torch
    import torch.nn.functional as F

    positions = (starts + torch.arange(ids.shape[1])).expand(ids.shape)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
