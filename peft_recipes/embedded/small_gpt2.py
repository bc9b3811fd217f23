"""A small GPT-2 that has read the installed libraries' docstrings: about a minute on two cores, the same every time.

A fixed number of steps, not a fixed time, so that a slow machine ends with the same model as a fast one.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft_recipes.embedded.cache import quiet_bars, say

if TYPE_CHECKING:
    import torch
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"


@dataclass(frozen=True)
class Pretraining:
    """Sizes and schedule: the best of a dozen tries at equal computing time, about a minute on two cores.

    Small and narrow beat wide (a width of 384 reads half as many tokens in the time), a learning rate of 1e-3 beat 5e-4
    and 2e-3 (at 8e-3 nothing is learned but the tokens' frequencies), short rows beat long ones.
    """

    n_embd: int = 256
    n_layer: int = 2
    n_head: int = 4
    vocab_size: int = 5120  # large enough that a LoRA r=16 on every linear layer is under 5 % of the whole
    n_positions: int = 512
    row_length: int = 128
    rows_per_step: int = 4
    steps: int = 700
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    validation_rows: int = 96
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """Losses in nats a token on rows that were not trained on, there and by the tokens' frequencies alone."""

    validation_loss: float
    unigram_loss: float
    trained_tokens: int


def pretrain(texts: list[str], folder: Path, settings: Pretraining | None = None) -> Outcome:
    """Train tokenizer and model on `texts` and write both to `folder`.

    Raises:
        ValueError: the texts are too few to fill the validation rows and one batch.
    """
    settings = settings or Pretraining()
    texts = random.Random(settings.seed).sample(texts, len(texts))  # so that the validation rows are of every library
    tokenizer = train_tokenizer(texts, settings)
    rows = packed_rows(texts, tokenizer, settings.row_length)
    held, rows = rows[: settings.validation_rows], rows[settings.validation_rows :]
    if len(rows) < settings.rows_per_step:
        raise ValueError(f"{len(rows)} rows of {settings.row_length} tokens are not enough to train on")
    model = _new_model(tokenizer, settings)
    _fit(model, rows, settings)
    outcome = Outcome(
        validation_loss=_validation_loss(model, held, settings),
        unigram_loss=unigram_loss(rows, held, len(tokenizer)),
        trained_tokens=settings.steps * settings.rows_per_step * settings.row_length,
    )
    model.config.update({"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1})  # GPT-2's own, for fine-tuning
    with quiet_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return outcome


def train_tokenizer(texts: list[str], settings: Pretraining) -> PreTrainedTokenizerFast:
    """GPT-2's kind of tokenizer: byte-level BPE. Its pad token is a token of its own, never the end of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=PAD,
        model_max_length=settings.n_positions,
        clean_up_tokenization_spaces=False,
    )


def packed_rows(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> torch.Tensor:
    """(rows, length) token ids: the texts one after another, an end token after each; what fills no row is dropped."""
    import torch

    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    ids = [token for text in encoded for token in [*text.ids, tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // length * length], dtype=torch.long).view(-1, length)


def unigram_loss(rows: torch.Tensor, held: torch.Tensor, vocab_size: int) -> float:
    """What knowing the tokens' frequencies alone (add-one smoothed) costs on `held`, in nats a token."""
    counts = Counter(rows.flatten().tolist())
    total = rows.numel() + vocab_size
    targets = held[:, 1:].flatten().tolist()
    return sum(math.log(total / (counts[token] + 1)) for token in targets) / len(targets)


def _new_model(tokenizer: PreTrainedTokenizerFast, settings: Pretraining) -> GPT2LMHeadModel:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=settings.n_positions,
        n_embd=settings.n_embd,
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,  # a minute is too short to overfit
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(settings.seed)
        return GPT2LMHeadModel(config).float()


def _fit(model: GPT2LMHeadModel, rows: torch.Tensor, settings: Pretraining) -> None:
    import torch

    decayed = [weight for weight in model.parameters() if weight.dim() >= 2]
    others = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99), fused=True)
    generator = torch.Generator().manual_seed(settings.seed)
    model.train()
    for step, batch in enumerate(_batches(len(rows), settings, generator)):
        share = min(1.0, (step + 1) / settings.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * share * cosine
        # a row is shorter than the model is long: it starts anywhere, so that every position is learned
        starts = torch.randint(settings.n_positions - settings.row_length + 1, (len(batch), 1), generator=generator)
        loss = _loss(model, rows[batch], starts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % max(1, settings.steps // 5) == 0:
            say(f"  step {step + 1} of {settings.steps}: loss {loss.item():.2f}")
    model.eval()


def _batches(rows: int, settings: Pretraining, generator: torch.Generator) -> list[torch.Tensor]:
    """Row numbers a step: every row once in a random order, then all again in another."""
    import torch

    wanted = settings.steps * settings.rows_per_step
    order = torch.cat([torch.randperm(rows, generator=generator) for _ in range(-(-wanted // rows))])[:wanted]
    return list(order.view(settings.steps, settings.rows_per_step))


def _loss(model: GPT2LMHeadModel, ids: torch.Tensor, starts: torch.Tensor | int = 0) -> torch.Tensor:
    """Mean cross-entropy of the next tokens of (rows, length) ids that stand at positions from `starts` on."""
    import torch
    import torch.nn.functional as F

    positions = (starts + torch.arange(ids.shape[1])).expand(ids.shape)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def _validation_loss(model: GPT2LMHeadModel, held: torch.Tensor, settings: Pretraining) -> float:
    import torch

    with torch.inference_mode():
        losses = [_loss(model, rows).item() * len(rows) for rows in held.split(settings.rows_per_step)]
    return sum(losses) / len(held)
