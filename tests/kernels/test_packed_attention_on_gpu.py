"""The compiled kernels for packed batches on a CUDA GPU; skipped without one."""

from __future__ import annotations

import pytest
import torch
from packed_batches import APART, LONG, PAIRS, SHARED, SYSTEM, example, losses_and_gradients, small, tokens

from peft_recipes import train
from peft_recipes.data.packing import PaddedCollator, SharedPrefixCollator
from peft_recipes.data.preference_packing import PaddedPairsCollator, SharedPromptCollator
from peft_recipes.kernels.packed_attention import FLEX, MASK, VARLEN
from peft_recipes.tasks.causal_losses import labelled_losses, tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def on_gpu(batch):
    from accelerate.utils import send_to_device

    return send_to_device(batch, torch.device("cuda"))


def assert_near(one, two, tolerance):
    """Sorted losses and gradients; relative to the largest of each."""
    torch.testing.assert_close(one[0], two[0], rtol=tolerance, atol=tolerance)
    largest = max(float(g.abs().max()) for g in two[1].values())
    for name, gradient in one[1].items():
        assert float((gradient - two[1][name]).abs().max()) <= tolerance * largest, name


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma3"])
def test_compiled_flex_attention_gives_the_padded_losses_and_gradients(kind):
    model = small(kind).cuda()
    for examples in (SHARED, APART) if kind == "gpt2" else (SHARED, APART, LONG):
        padded = losses_and_gradients(model, on_gpu(PaddedCollator(0)(examples)))
        packed = SharedPrefixCollator.for_model(model, 0, 4096, FLEX)(examples)
        assert_near(losses_and_gradients(model, on_gpu(packed)), padded, 1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_varlen_kernels_give_the_dense_masks_losses_and_gradients(kind):
    model = small(kind).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for collator, batches in ((SharedPrefixCollator, (SHARED, APART, LONG)), (SharedPromptCollator, (PAIRS,))):
            for examples in batches:
                one, two = (
                    losses_and_gradients(model, on_gpu(collator.for_model(model, 0, 4096, kernel)(examples)))
                    for kernel in (VARLEN, MASK)
                )
                assert_near(one, two, 5e-2)


def test_packed_pairs_by_flex_attention():
    model = small("gemma3").cuda()
    padded = losses_and_gradients(model, on_gpu(PaddedPairsCollator(0)(PAIRS)))
    packed = on_gpu(SharedPromptCollator.for_model(model, 0, 4096, FLEX)(PAIRS))
    assert_near(losses_and_gradients(model, packed), padded, 1e-4)


def test_a_new_length_compiles_nothing():
    from torch._dynamo.utils import counters

    model, made = small("llama").cuda(), []
    for i in range(6):
        examples = [example(SYSTEM * 10 + tokens(50 + 9 * i, i), tokens(60 + n, n)) for n in range(2 + i)]
        packed = SharedPrefixCollator.for_model(model, 0, 4096, FLEX)(examples)
        losses_and_gradients(model, on_gpu(packed))
        made.append(counters["stats"]["unique_graphs"])
    assert made[-1] == made[0]


def test_a_step_waits_for_nothing():
    """torch itself reports what makes the host wait."""
    model = small("llama").cuda()
    for kernel in (FLEX, MASK):
        batch = on_gpu(SharedPrefixCollator.for_model(model, 0, 4096, kernel)(SHARED))
        labelled_losses(model, tensors(batch))[0].sum().backward()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            labelled_losses(model, tensors(batch))[0].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_chooses_its_kernel_and_learns(instruct, tmp_path, precision):
    training = {"use_cpu": False, "bf16": precision == "bf16", "fp16": precision == "fp16"}
    data = train(instruct(training=training), "lora", output=tmp_path).data
    chosen = data["training"]["packed_attention"]
    assert data["environment"]["precision"] == precision and chosen["kernel"] in (VARLEN, FLEX, MASK)
    assert len(chosen["milliseconds"]) >= 2
    losses = [loss for _, loss in data["training"]["losses"]]
    assert losses[-1] < losses[0]
