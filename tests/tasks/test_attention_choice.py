"""The attention kernel of packed batches: exact on a first batch, then the fastest; the recipe's wherever exact."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from peft_recipes import RecipeError, train
from peft_recipes.data.packing import PaddedCollator, SharedPrefixCollator
from peft_recipes.hardware.device import Hardware
from peft_recipes.kernels.packed_attention import FLEX, MASK, PARTS, VARLEN
from peft_recipes.tasks import attention_choice, causal_trainer
from peft_recipes.tasks.attention_choice import Trial, as_before, choose_attention
from peft_recipes.tasks.registry import task_of

_EXAMPLES = [{"input_ids": [5, 6, 7, 8, 9 + i], "labels": [-100, -100, -100, 8, 9 + i]} for i in range(3)]


class Batch(dict):
    """A batch that knows the kernel it is for."""


@pytest.fixture
def gpu(monkeypatch):
    """A trial as on a GPU; gaps, milliseconds and gradient norms by kernel, as given."""
    monkeypatch.setattr(Trial, "device", "cuda")
    monkeypatch.setattr(Trial, "autocast", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(attention_choice, "release_memory", lambda device: None)

    def trial(gaps=None, steps=None, half=torch.bfloat16):
        from causal_models import model_of

        def step(trial, kernel):
            found = (steps or {}).get(kernel, (10.0, 1.0))
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(attention_choice, "_step", step)
        model = model_of("llama")

        def gap(model, first, second):
            return (gaps or {}).get((first["kernel"], second["kernel"]), 1e-7)

        def collator(kernel):
            return lambda examples: Batch(kernel=kernel)

        return Trial(model, model.config, collator, _EXAMPLES, Batch(kernel="padded"), gap, None, half)

    return trial


def test_the_fastest_exact_kernel_is_chosen(gpu):
    times = {VARLEN: (8.0, 1.0), FLEX: (6.0, 1.01), MASK: (20.0, 1.0)}
    choice = choose_attention(gpu(steps=times))
    assert choice.kernel == FLEX and "fastest of 3" in choice.why
    assert choice.milliseconds == {VARLEN: 8.0, FLEX: 6.0, MASK: 20.0} and set(choice.gaps) == {VARLEN, FLEX, MASK}


def test_a_few_per_cent_decide_nothing(gpu):
    """So that two arms, whose trials differ by chance, have the same kernel."""
    assert choose_attention(gpu(steps={VARLEN: (10.0, 1.0), FLEX: (9.7, 1.0)})).kernel == VARLEN


def test_a_kernel_that_is_not_exact_is_left_out(gpu):
    choice = choose_attention(gpu(gaps={(FLEX, "padded"): 0.02}, steps={FLEX: (1.0, 1.0)}))
    assert choice.kernel == VARLEN and "differ by 2.0e-02" in choice.left_out[FLEX]


def test_flash_attention_may_round_as_half_precision_does(gpu):
    rounding = {(PARTS, "padded"): 1e-7, (VARLEN, PARTS): 5e-3}
    assert choose_attention(gpu(gaps=rounding)).kernel == FLEX  # nothing else rounds here

    def later(trial, base=attention_choice._rounding):
        return 3 * 2e-3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_choice, "_rounding", later)
        assert choose_attention(gpu(gaps=rounding)).kernel == VARLEN
        assert choose_attention(gpu(gaps={(PARTS, "padded"): 0.1})).kernel == FLEX  # the layout itself is wrong


def test_a_kernel_that_fails_in_the_trial_is_left_out(gpu):
    failed = {VARLEN: RuntimeError("no kernel image"), FLEX: torch.OutOfMemoryError("17 GB"), MASK: (20.0, 1.0)}
    choice = choose_attention(gpu(steps=failed))
    assert choice.kernel == MASK and choice.left_out == {
        VARLEN: "RuntimeError: no kernel image", FLEX: "it runs out of memory"
    }  # fmt: skip


def test_a_kernel_with_other_gradients_is_left_out(gpu):
    choice = choose_attention(gpu(steps={VARLEN: (1.0, 1.5), FLEX: (5.0, 1.0), MASK: (9.0, 1.0)}))
    assert choice.kernel == FLEX and "gradients' norm is 1.5 instead of 1" in choice.left_out[VARLEN]


def test_fp32_has_no_flash_attention(gpu):
    assert set(choose_attention(gpu(half=None)).gaps) == {FLEX, MASK}


def test_the_recipes_kernel_is_taken_where_it_is_exact(gpu):
    choice = choose_attention(gpu(), MASK)
    assert choice.kernel == MASK and choice.why == "the recipe sets it" and not choice.milliseconds
    assert choose_attention(gpu(gaps={(MASK, "padded"): 0.5}), MASK).kernel is None


def test_a_step_of_the_trial_changes_nothing():
    """Neither gradients nor the random state remain."""
    from causal_models import model_of

    model = model_of("llama").train()
    before = torch.get_rng_state()
    padded = PaddedCollator(0)(_EXAMPLES)
    trial = Trial(model, model.config, lambda kernel: SharedPrefixCollator.for_model(model, 0, 4096, kernel), _EXAMPLES,
                  padded, causal_trainer.largest_gap, lambda *of: causal_trainer.labelled_losses(*of)[0])  # fmt: skip
    choice = attention_choice.AttentionChoice()
    attention_choice._time(trial, [PARTS, MASK], choice)
    assert set(choice.milliseconds) == {PARTS, MASK} and not choice.left_out
    assert torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in model.parameters())


def test_a_trials_choice_is_kept_for_a_resumed_run_and_the_other_arms(tmp_path):
    timed = {"kernel": "flex", "milliseconds": {"flex": 1.0}}
    asked = []

    def choose(kernel, exact=("flex", "mask"), own=timed):
        asked.append(kernel)
        facts = own if kernel is None else {"kernel": kernel if kernel in exact else None}
        return SimpleNamespace(attention=facts)

    one, other, comparison = (tmp_path / name for name in ("one", "other", "comparison"))
    assert as_before([one, comparison], None, choose)[1] == timed and asked == [None]
    assert as_before([one], None, choose)[1] == timed and asked[-1] == "flex"  # resumed
    assert as_before([other, comparison], None, choose)[1] == timed and asked[-1] == "flex"  # another arm
    assert as_before([other], "mask", choose)[1] == {"kernel": "mask"}  # the recipe's
    # On an arm for which it is not exact the trial is made anew; without a trial nothing is kept.
    quick = {"kernel": "parts"}
    last = as_before([tmp_path / "last", comparison], None, partial(choose, exact=(), own=quick))
    assert last[1] == quick and asked[-2:] == ["flex", None] and not (tmp_path / "last").exists()


def test_run_json_names_the_kernel(instruct, tmp_path):
    data = train(instruct(), "lora", output=tmp_path / "own").data["training"]["packed_attention"]
    assert data["kernel"] == "parts" and data["gaps"]["parts"] < 1e-4 and data["why"] == "exact on a first batch"
    run = train(instruct(packed_attention="mask"), "lora", output=tmp_path / "mask")
    assert run.data["training"]["packed_attention"]["kernel"] == "mask"
    assert run.data["training"]["packed_attention"]["left_out"] == {"parts": "the recipe sets another"}
    assert json.loads((run.folder / "run.json").read_text())["training"]["batches"] == "shared-prefix"


def test_an_unknown_kernel_names_the_nearest(instruct):
    with pytest.raises(RecipeError, match="flex"):
        instruct(packed_attention="flexx")


@pytest.mark.parametrize("changes", [{"packed_attention": "flex"}, {"attention": "flex_attention"}], ids=str)
def test_a_gpus_kernel_is_refused_on_the_cpu(instruct, tmp_path, changes):
    with pytest.raises(RecipeError, match="CUDA GPU alone, and this run is on cpu"):
        train(instruct(**changes), "lora", output=tmp_path)


def test_flash_attention_is_refused_in_fp32(instruct):
    with pytest.raises(RecipeError, match="half precision alone"):
        task_of(instruct(packed_attention="varlen")).check_arguments(None, Hardware("cuda", "", "fp32", 1))
