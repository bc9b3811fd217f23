"""Each attention kernel for packed batches gives the padded batch's losses and gradients."""

from __future__ import annotations

import pickle

import pytest
import torch
from packed_batches import (
    APART,
    LONG,
    PAIRS,
    SHARED,
    SYSTEM,
    WINDOW,
    example,
    losses_and_gradients,
    small,
    tensors,
    tokens,
)
from torch.nn.attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from peft_recipes.data.packing import SEGMENTS, PaddedCollator, SharedPrefixCollator, why_padded
from peft_recipes.data.preference_packing import PaddedPairsCollator, SharedPromptCollator
from peft_recipes.kernels import flex_segments, packed_attention, varlen_attention
from peft_recipes.kernels.packed_attention import FLEX, KERNELS, MASK, PARTS, VARLEN, Preparation, kernels_for
from peft_recipes.kernels.segments import Part, Segments, for_varlen
from peft_recipes.recipe.validation import PACKED_ATTENTION
from peft_recipes.tasks.causal_losses import labelled_losses


def assert_same(model, packed, padded):
    (one, gradients), (two, others) = losses_and_gradients(model, packed), padded
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == others.keys() and gradients
    largest = max(float(g.abs().max()) for g in others.values())
    for name, gradient in gradients.items():
        assert float((gradient - others[name]).abs().max()) <= 1e-5 * largest, name


def by_hand(q, k, v, cu_q, cu_k, max_q, max_k, scale=None, window=None):
    """Flash attention's varlen kernel in its documented words: each sequence alone, the last query at the last key."""
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(q) == cu_q[-1] and len(k) == len(v) == cu_k[-1]
    outputs = []
    for i in range(len(cu_q) - 1):
        own = (t[a:b].transpose(0, 1)[None] for t, a, b in zip(
            (q, k, v), (cu_q[i], cu_k[i], cu_k[i]), (cu_q[i + 1], cu_k[i + 1], cu_k[i + 1]), strict=True
        ))  # fmt: skip
        one, two, three = own
        before = two.shape[2] - one.shape[2]
        mask = torch.ones(one.shape[2], two.shape[2], dtype=torch.bool).tril(before)
        if window is not None:
            mask = mask.triu(before - window + 1)
        out = scaled_dot_product_attention(one, two, three, mask, scale=scale, enable_gqa=one.shape[1] != two.shape[1])
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def on_cpu(monkeypatch):
    """Let FlexAttention differentiate on the CPU, uncompiled, and varlen kernels run in fp32, by hand."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(varlen_attention, "kernel", lambda implementation: by_hand)
    monkeypatch.setattr(varlen_attention, "_half", lambda device: torch.float32)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma3"])
def test_every_kernel_gives_the_padded_batchs_losses_and_gradients(kind, on_cpu):
    model = small(kind)
    for examples in (SHARED, APART) if kind == "gpt2" else (SHARED, APART, LONG):
        padded = losses_and_gradients(model, PaddedCollator(0)(examples))
        for kernel in KERNELS:
            for budget in (4096, 30):
                collator = SharedPrefixCollator.for_model(model, 0, budget, kernel)
                assert_same(model, collator(examples), padded)


def test_a_score_cap_is_flex_attentions(on_cpu):
    model = small("gemma2")
    padded = losses_and_gradients(model, PaddedCollator(0)(SHARED))
    model.set_attn_implementation("flex_attention")
    assert_same(model, SharedPrefixCollator.for_model(model, 0, 4096)(SHARED), padded)
    model.config.attn_logit_softcapping = None
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    uncapped, _ = losses_and_gradients(model, SharedPrefixCollator.for_model(model, 0, 4096)(SHARED))
    assert float((uncapped - padded[0]).abs().max()) > 1e-3  # the cap is felt


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_packed_pairs_are_the_same_with_every_kernel(kind, on_cpu):
    model = small(kind)
    padded = losses_and_gradients(model, PaddedPairsCollator(0)(PAIRS))
    for kernel in KERNELS:
        for budget in (4096, 24):
            assert_same(model, SharedPromptCollator.for_model(model, 0, budget, kernel)(PAIRS), padded)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_recomputed_attention_is_the_same(kernel, reentrant, on_cpu):
    """Gradient checkpointing runs attention again in the backward pass."""
    model = small("gemma3")
    padded = losses_and_gradients(model, PaddedCollator(0)(SHARED))
    model.train()  # no dropout in this model
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(model, SharedPrefixCollator.for_model(model, 0, 4096, kernel)(SHARED), padded)


def segments_of(collator, examples) -> Segments:
    return collator(examples)[SEGMENTS]


LAYOUTS = {
    "behind a prefix": (SharedPrefixCollator, SHARED, 4096),
    "several rows, one padded": (SharedPrefixCollator, SHARED, 30),
    "pairs": (SharedPromptCollator, PAIRS, 4096),
    "pairs in rows": (SharedPromptCollator, PAIRS, 24),
    "nothing shared": (SharedPrefixCollator, APART, 4096),
    "longer than a block": (SharedPrefixCollator, LONG, 4096),
}


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mask_is_that_of_the_parts(layout, window):
    kind, examples, budget = LAYOUTS[layout]
    segments = segments_of(kind(0, max_row_tokens=budget), examples)
    wanted = torch.zeros(len(segments.rows), 1, segments.length, segments.length, dtype=torch.bool)
    for allowed, row in zip(wanted[:, 0], segments.rows, strict=True):
        for part in segments.complete(row):
            attended = [k for start, stop in part.sees for k in range(start, stop)]
            for q in range(part.start, part.stop):
                visible = [*attended, *range(part.start, q + 1)]
                allowed[q, visible if window is None else visible[-window:]] = True
    assert torch.equal(segments.mask(window=window), wanted)
    if window is None:  # as a GPU makes it
        assert torch.equal(segments.mask(window=segments.length), wanted)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("layout", ["longer than a block", "several rows, one padded", "pairs"])
def test_the_block_mask_is_the_one_that_torch_would_evaluate(layout, window):
    kind, examples, budget = LAYOUTS[layout]
    segments = segments_of(kind(0, max_row_tokens=budget, prepare=Preparation(FLEX, (None, 40))), examples)
    window = window if window and window < segments.length else None
    own, dense = flex_segments.block_mask(segments, window, "cpu"), segments.mask(window=window)
    length = segments.length
    theirs = flex_attention.create_block_mask(
        lambda row, head, q, k: dense[row, 0, q, k], len(segments.rows), None, length, length, device="cpu"
    )
    assert own.shape == theirs.shape
    assert torch.equal(own.to_dense() > 0, theirs.to_dense() > 0)
    if window is None:
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(own, name), getattr(theirs, name)), name
        assert int(own.full_kv_num_blocks.sum()) > 0 or length < 2 * flex_segments.BLOCK
    grid = torch.arange(length)
    visible = own.mask_mod(torch.arange(len(segments.rows))[:, None, None], None, grid[:, None], grid)
    assert torch.equal(visible, dense[:, 0])


def test_varlen_takes_the_prefix_before_each_example():
    segments = Segments([[Part(0, 3), Part(3, 5, ((0, 3),)), Part(5, 9, ((0, 3),))]], 9)
    prepared = for_varlen(segments)
    assert prepared["cu_seqlens_q"].tolist() == [0, 3, 5, 9] and prepared["cu_seqlens_k"].tolist() == [0, 3, 8, 15]
    assert (prepared["max_seqlen_q"], prepared["max_seqlen_k"]) == (4, 7)
    assert prepared["keys"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8]


def test_without_a_prefix_varlen_is_padding_free_packing():
    """The lengths are those that transformers reads from position_ids, and no key is copied."""
    from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

    batch = SharedPrefixCollator(0, prepare=Preparation(VARLEN))(APART)
    prepared = batch[SEGMENTS].prepared
    (starts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(batch["position_ids"])
    assert torch.equal(prepared["cu_seqlens_q"], starts) and torch.equal(prepared["cu_seqlens_k"], starts)
    assert prepared["max_seqlen_q"] == prepared["max_seqlen_k"] == longest and "keys" not in prepared


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_transformers_own_packing_by_position_ids_agrees(kind):
    """Without a mask sdpa makes its own from position_ids that begin anew, as flash attention would."""
    model = small(kind)
    batch = SharedPrefixCollator.for_model(model, 0, 4096)(APART)
    ours = losses_and_gradients(model, batch)
    del batch[SEGMENTS]
    assert_same(model, batch, ours)


def test_the_kernels_of_a_model():
    config = small("llama").config
    assert kernels_for(config, "cpu") == kernels_for(config, "meta") == (PARTS, MASK)
    assert kernels_for(config, "cuda", half=True) == (VARLEN, FLEX, MASK)
    assert kernels_for(config, "cuda") == (FLEX, MASK)  # flash attention's kernels take half precision alone
    assert kernels_for(config, "mps") == (MASK,)
    config.attention_dropout = 0.1  # which flex has not
    assert kernels_for(config, "cuda", half=True) == (MASK,)
    config.attention_dropout, config._attn_implementation = 0.0, "flash_attention_2"
    assert kernels_for(config, "cuda", half=True) == (VARLEN,) and not kernels_for(config, "cuda")
    assert KERNELS == PACKED_ATTENTION


def test_an_option_that_a_kernel_lacks_takes_the_dense_mask(monkeypatch):
    """Attention dropout in training: only the parts have it."""
    model = small("gpt2").train()
    taken = []
    dense = packed_attention.sdpa_attention_forward
    monkeypatch.setattr(packed_attention, "sdpa_attention_forward", lambda *a, **k: taken.append(1) or dense(*a, **k))
    for kernel, layers in ((PARTS, 0), (FLEX, 2)):
        batch = SharedPrefixCollator.for_model(model, 0, 4096, kernel)(SHARED)
        losses_and_gradients(model, batch)
        assert len(taken) == layers


def test_windows_are_packed_where_layers_name_them():
    model = small("gemma3")
    assert why_padded(model, 64) is None
    model.set_attn_implementation("eager")
    assert "looks back 6 tokens" in why_padded(model, 64)
    assert why_padded(model, WINDOW) is None


def test_a_compiled_model_with_windows_is_padded():
    """Its layers have one mask: a dense one, or a BlockMask where that is exact."""
    from peft_recipes.tasks.causal_trainer import CausalTrainer

    model, options = small("gemma3"), (None, 64, 4096, SHARED)
    assert CausalTrainer.collator_for(model, 0, *options).why_padded is None
    assert "one mask for all layers" in CausalTrainer.collator_for(model, 0, *options, compiled=True).why_padded
    segments = SharedPrefixCollator.for_model(model, 0, 4096)(SHARED)[SEGMENTS]
    with pytest.raises(RuntimeError, match="batches=padded"):
        packed_attention.compilable_mask(segments, model.config, "cpu")
    for kernel, kind in ((FLEX, flex_attention.BlockMask), (MASK, torch.Tensor)):
        segments = SharedPrefixCollator.for_model(small("llama"), 0, 4096, kernel)(SHARED)[SEGMENTS]
        assert isinstance(packed_attention.compilable_mask(segments, small("llama").config, "cpu"), kind)


def test_a_block_mask_alone_is_understood(on_cpu):
    """What a compiled model is given."""
    model = small("llama")
    batch = SharedPrefixCollator.for_model(model, 0, 4096, FLEX)(SHARED)
    padded = losses_and_gradients(model, PaddedCollator(0)(SHARED))
    batch["attention_mask"] = packed_attention.compilable_mask(batch.pop(SEGMENTS), model.config, "cpu")
    inputs = {**tensors(batch), "attention_mask": batch["attention_mask"]}
    model.zero_grad()
    losses = labelled_losses(model, inputs)[0]
    torch.testing.assert_close(losses[losses != 0].sort().values, padded[0])


def test_collators_work_in_a_dataloaders_workers():
    for kernel in KERNELS:
        collator = SharedPrefixCollator.for_model(small("gemma3"), 0, 4096, kernel)
        assert pickle.loads(pickle.dumps(collator)) == collator
        loader = torch.utils.data.DataLoader(SHARED, batch_size=4, collate_fn=collator, num_workers=1)
        (batch,), here = list(loader), collator(SHARED)
        assert batch[SEGMENTS].rows == here[SEGMENTS].rows
        for name, value in here[SEGMENTS].prepared.items():
            assert batch[SEGMENTS].prepared[name] == value if isinstance(value, int) else torch.equal(
                batch[SEGMENTS].prepared[name], value
            )  # fmt: skip


def test_segments_move_with_the_batch():
    from accelerate.utils import send_to_device

    batch = SharedPrefixCollator.for_model(small("llama"), 0, 4096, VARLEN)(SHARED)
    moved = send_to_device(batch, torch.device("meta"), non_blocking=True)[SEGMENTS]
    assert moved.prepared["keys"].device.type == "meta" and moved.prepared["max_seqlen_q"] == 10


def test_flex_attention_is_compiled_once_for_all_lengths(monkeypatch):
    """A new length, or another layout of it, makes no new graph; several rows make one, and gradients another."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    kernel = torch.compile(flex_attention.flex_attention, dynamic=True, backend=backend)
    model = small("llama")
    monkeypatch.setattr(flex_segments, "_flex", lambda: kernel)
    torch._dynamo.reset()
    with torch.no_grad():
        for i in range(6):
            examples = [example(SYSTEM * 10 + tokens(50 + 9 * i, i), tokens(60 + n, n)) for n in range(2 + i)]
            labelled_losses(model, tensors(SharedPrefixCollator.for_model(model, 0, 4096, FLEX)(examples)))
    assert len(compiled) == 1
