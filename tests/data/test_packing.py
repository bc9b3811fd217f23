"""Prefix-shared packing gives the losses and gradients of a padded batch."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
import transformers
from causal_models import KINDS, VOCABULARY, model_of
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from peft_recipes import train
from peft_recipes.data.packing import (
    COUNTS,
    IGNORED,
    KEPT,
    SEGMENTS,
    PaddedCollator,
    SharedPrefixCollator,
    shareable_prefix,
    why_padded,
)
from peft_recipes.tasks import causal_trainer
from peft_recipes.tasks.causal_losses import example_sums, labelled_losses, largest_gap
from peft_recipes.tasks.registry import task_of


def example(prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def tokens(count: int, seed: int) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(3, VOCABULARY) for i in range(count)]


SYSTEM = tokens(9, 99)
BATCHES = {
    "common prefix, prompts of unequal length": [
        example(SYSTEM + tokens(n, n), tokens(m, n + 50)) for n, m in ((3, 4), (7, 2), (1, 9), (5, 5))
    ],
    "no common prefix": [example(tokens(n, n), tokens(n + 1, n + 9)) for n in (4, 8, 6)],
    "one example": [example(SYSTEM + tokens(4, 1), tokens(6, 2))],
    "prefixes of each other": [
        example(SYSTEM, tokens(8, 7)[:2]), example(SYSTEM, tokens(8, 7)[:5]), example(SYSTEM, tokens(8, 7))
    ],
    "the same example twice": [example(SYSTEM, tokens(3, 1))] * 2,
    "every token labelled": [{"input_ids": t, "labels": t} for t in (SYSTEM + tokens(5, 1), SYSTEM + tokens(9, 2))],
    "truncated in the answer": [
        {k: v[:14] for k, v in example(SYSTEM + tokens(n, n), tokens(20, n)).items()} for n in (1, 2, 4)
    ],
}  # fmt: skip


def loss_and_gradients(model, batches):
    """The mean loss over the labelled tokens of accumulated batches, and its gradients."""
    model.zero_grad()
    count = sum(int((b["labels"][:, 1:] != IGNORED).sum()) for b in batches)
    total = 0.0
    for batch in batches:
        inputs = {k: v for k, v in batch.items() if k != COUNTS}
        loss = labelled_losses(model, inputs)[0].sum() / count
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, first, second):
    (one, grads), (two, others) = loss_and_gradients(model, first), loss_and_gradients(model, second)
    assert one == pytest.approx(two, rel=1e-5)
    assert grads.keys() == others.keys() and grads
    largest = max(float(g.abs().max()) for g in others.values())
    for name, gradient in grads.items():
        assert float((gradient - others[name]).abs().max()) <= 1e-5 * largest, name


@pytest.mark.parametrize(("attention", "kernel"), [("sdpa", "parts"), ("sdpa", "mask"), ("eager", "mask")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BATCHES)
def test_packing_gives_the_padded_batchs_loss_and_gradients(kind, attention, kernel, name):
    model = model_of(kind, attention)
    shared, padded = SharedPrefixCollator.for_model(model, 0, 4096, kernel), PaddedCollator(0)
    assert SharedPrefixCollator.for_model(model, 0, 4096).kernel == ("parts" if attention == "sdpa" else "mask")
    assert_same(model, [shared(BATCHES[name])], [padded(BATCHES[name])])


@pytest.mark.parametrize("budget", [1, 20, 30, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_sequences_gives_the_same_loss_and_gradients(kind, budget):
    model, examples = model_of(kind), BATCHES["common prefix, prompts of unequal length"]
    shared = SharedPrefixCollator.for_model(model, 0, budget)(examples)
    assert shared["input_ids"].shape[0] == {1: 4, 20: 4, 30: 2, 4096: 1}[budget]
    assert_same(model, [shared], [PaddedCollator(0)(examples)])


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_batches_give_the_same_loss_and_gradients(kind):
    model = model_of(kind)
    shared, padded = SharedPrefixCollator.for_model(model, 0, 4096), PaddedCollator(0)
    batches = list(BATCHES.values())[:4]
    assert_same(model, [shared(b) for b in batches], [padded(b) for b in batches])


@pytest.mark.parametrize("kind", KINDS)
def test_the_padded_reference_is_transformers_own_loss(kind):
    model, batch = model_of(kind), PaddedCollator(0)(BATCHES["no common prefix"])
    mine, _ = loss_and_gradients(model, [batch])
    own = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss.item()
    assert mine == pytest.approx(own, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_gets_the_same_gradients(kind):
    targets = ["attn.c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"]
    model = get_peft_model(model_of(kind), LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    examples = BATCHES["common prefix, prompts of unequal length"]
    shared = SharedPrefixCollator.for_model(model.get_base_model(), 0, 4096)
    assert_same(model, [shared(examples)], [PaddedCollator(0)(examples)])


def test_the_prefix_is_computed_once_and_nothing_is_padded():
    examples = BATCHES["common prefix, prompts of unequal length"]
    counts = SharedPrefixCollator(0)(examples)[COUNTS]
    lengths = [len(e["input_ids"]) for e in examples]
    assert (counts.tokens, counts.examples, counts.padding) == (sum(lengths), 4, 0)
    # The last token of an example predicts nothing: it is left out, except for the sequence's last example.
    assert counts.computed == sum(lengths) - 3 * len(SYSTEM) - 3
    padded = PaddedCollator(0)(examples)[COUNTS]
    assert (padded.tokens, padded.computed) == (sum(lengths), 4 * max(lengths))


def test_the_prefix_ends_one_token_before_the_first_label():
    first, second = example([1, 2, 3, 4], [5, 6]), example([1, 2, 3, 4, 7], [8])
    assert shareable_prefix([first["input_ids"], second["input_ids"]], [first["labels"], second["labels"]]) == 3
    assert shareable_prefix([first["input_ids"]], [first["labels"]]) == 0


def test_packing_gives_the_loss_of_each_example():
    model, examples = model_of("llama"), BATCHES["common prefix, prompts of unequal length"]
    batch = SharedPrefixCollator.for_model(model, 0, 4096)(examples)
    sums = example_sums(model, batch, len(examples))
    for row, one in zip(sums, examples, strict=True):
        ids = torch.tensor([one["input_ids"]])
        loss = model(input_ids=ids, labels=torch.tensor([one["labels"]])).loss.item()
        labelled = sum(label != IGNORED for label in one["labels"])
        assert row[0].item() == pytest.approx(loss * labelled, rel=1e-5) and row[1] == labelled


def test_a_model_that_ignores_the_mask_is_detected():
    model, examples = model_of("llama"), BATCHES["common prefix, prompts of unequal length"]
    shared, padded = SharedPrefixCollator.for_model(model, 0, 4096)(examples), PaddedCollator(0)(examples)
    assert largest_gap(model, shared, padded) < 1e-5
    shared["attention_mask"] = shared.pop(SEGMENTS).mask()  # attention over the full sequence
    assert largest_gap(model, shared, padded) < 1e-5
    shared["attention_mask"] = torch.ones_like(shared["attention_mask"]).tril()
    assert largest_gap(model, shared, padded) > 1e-3


def test_alora_is_padded():
    examples, options = BATCHES["common prefix, prompts of unequal length"], (None, 64, 4096)
    for tokens, why in ((None, None), ([5, 6], "its adapter looks for its invocation tokens once per sequence")):
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=tokens)
        model = get_peft_model(model_of("llama"), config)
        assert causal_trainer.CausalTrainer.collator_for(model, 0, *options, examples)[1] == why


def test_an_empty_example_leaves_the_one_before_complete():
    examples = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [], "labels": []}]
    batch = SharedPrefixCollator(0)(examples)
    assert batch["labels"].tolist() == [[IGNORED, 2, 3]] and batch["input_ids"].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_attn_implementation": "paged"}, "takes no mask"),
        ({"sliding_window": 8, "_attn_implementation": "eager"}, "looks back 8 tokens"),
    ],
)
def test_packing_that_is_not_exact_says_why(change, reason):
    model = model_of("qwen2")
    assert why_padded(model, 64) is None
    if "sliding_window" in change:
        model.config.use_sliding_window = True
        model.config.layer_types = ["sliding_attention"] * 2
    for key, value in change.items():
        setattr(model.config, key, value)
    assert reason in why_padded(model, 64)


def test_a_model_without_position_ids_is_padded():
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert "takes no position_ids" in why_padded(model, 64)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("arm", ["full", "lora"])
def test_a_run_has_the_same_losses_packed_or_padded(instruct, tmp_path, arm, accumulation):
    training = {"num_train_epochs": 1, "per_device_train_batch_size": 8 // accumulation, "use_cpu": True,
                "gradient_accumulation_steps": accumulation,
                "train_sampling_strategy": "sequential"}  # fmt: skip  # padded ones would be grouped by length
    runs = {}
    for batches in ("shared-prefix", "padded"):
        runs[batches] = train(instruct(batches=batches, training=training), arm, output=tmp_path / batches).data
    shared, padded = runs["shared-prefix"], runs["padded"]
    assert shared["training"]["batches"] == "shared-prefix" and padded["training"]["batches"].startswith("padded")
    for (_, one), (_, two) in zip(shared["training"]["losses"], padded["training"]["losses"], strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert shared["metrics"]["test"]["loss"] == pytest.approx(padded["metrics"]["test"]["loss"], rel=1e-4)
    assert shared["training"]["tokens"] == padded["training"]["tokens"]
    assert shared["training"]["computed_tokens"] < padded["training"]["computed_tokens"]


@pytest.mark.parametrize("arm", ["lora", "full"])
def test_gradient_checkpointing_gives_the_same_losses(instruct, tmp_path, arm):
    """The recomputed forward pass must use the same attention."""
    plain, recomputed = (
        train(instruct(training={"gradient_checkpointing": on}), arm, output=tmp_path / str(on)) for on in (False, True)
    )
    assert recomputed.data["training"]["batches"] == "shared-prefix"
    one, two = ([loss for _, loss in run.data["training"]["losses"]] for run in (plain, recomputed))
    assert one == pytest.approx(two, rel=1e-5)


def test_a_run_whose_first_batch_differs_is_padded_and_says_so(instruct, tmp_path, monkeypatch):
    monkeypatch.setattr(causal_trainer, "largest_gap", lambda *_: 0.01)
    data = train(instruct(), "lora", output=tmp_path).data
    assert "losses of a first batch differ by 1.0e-02" in data["training"]["batches"]
    assert any("padded, without prefix sharing" in note for note in data["notes"])


def test_virtual_tokens_are_padded_and_trained(instruct, tmp_path):
    from peft_recipes import Arm

    arm = Arm(PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), learning_rate=1e-2)
    data = train(instruct(arms={"prompt": arm}), "prompt", output=tmp_path).data
    assert "virtual tokens" in data["training"]["batches"]
    assert data["metrics"]["test"]["loss"] > 0


def test_logits_beyond_the_limit_use_trls_head_with_the_same_losses(instruct, tmp_path, monkeypatch):
    recipe = instruct()
    direct = train(recipe, "lora", output=tmp_path / "direct").data
    monkeypatch.setattr(causal_trainer, "LOGITS_BYTES", 0)
    chunked = train(recipe, "lora", output=tmp_path / "chunked").data
    for (_, one), (_, two) in zip(direct["training"]["losses"], chunked["training"]["losses"], strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert direct["metrics"]["test"]["loss"] == pytest.approx(chunked["metrics"]["test"]["loss"], rel=1e-4)


def test_the_kept_columns_are_those_that_predict_a_label(instruct):
    prepared = task_of(instruct()).prepare()
    batch = PaddedCollator(0)([prepared.splits["train"][i] for i in range(3)])
    assert set(batch[KEPT].tolist()) == {int(c) - 1 for _, c in (batch["labels"] != IGNORED).nonzero()}


def test_token_losses_are_torchs_cross_entropy_with_its_gradient():
    from peft_recipes.kernels.token_losses import token_losses

    torch.manual_seed(0)
    logits, targets = 5 * torch.randn(300, 40), torch.randint(40, (300,))
    targets[::7] = IGNORED
    weights = torch.rand(300)
    own, theirs = (logits.clone().requires_grad_() for _ in range(2))
    losses = token_losses(own * 1.0, targets, IGNORED)
    wanted = torch.nn.functional.cross_entropy(theirs, targets, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(losses, wanted)
    (losses * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(own.grad, theirs.grad)


def test_token_losses_refuse_a_second_backward():
    from peft_recipes.kernels.token_losses import token_losses

    losses = token_losses(torch.randn(4, 9, requires_grad=True) * 1.0, torch.arange(4), IGNORED).sum()
    losses.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        losses.backward()


@pytest.mark.parametrize("approximate", ["none", "tanh", "silu"])
def test_recomputed_activations_give_the_same_gradients_to_the_bit(approximate):
    from peft_recipes.kernels import activations

    torch.manual_seed(0)
    gate, up = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16)
    given = torch.randn(5, 8)

    def gradients(within):
        gate.zero_grad()
        up.zero_grad()
        with within:
            inner = gate(given)
            inner = torch.nn.functional.silu(inner) if approximate == "silu" else torch.nn.functional.gelu(
                inner, approximate=approximate)  # fmt: skip
            made = (inner * up(given)).square().sum()
        made.backward()
        return [p.grad.clone() for p in (*gate.parameters(), *up.parameters())]

    for one, two in zip(gradients(contextlib.nullcontext()), gradients(activations.recomputed()), strict=True):
        assert torch.equal(one, two)


def test_recomputing_keeps_fewer_bytes():
    """The output of silu is freed after the forward pass."""
    from peft_recipes.kernels import activations
    from peft_recipes.planning.step_memory import LiveBytes

    def live_bytes(within):
        given = torch.randn(64, 256, requires_grad=True)
        up = torch.randn(64, 256, requires_grad=True)
        live = LiveBytes()
        with live, within:
            made = (torch.nn.functional.silu(given * 2) * (up * 2)).sum()
        assert made.requires_grad
        return live.live

    assert live_bytes(contextlib.nullcontext()) - live_bytes(activations.recomputed()) == 64 * 256 * 4


def test_activations_without_a_backward_pass_are_freed():
    """DoRA's norms are detached: they once leaked 8 MB a step."""
    import weakref

    from peft_recipes.kernels import activations

    weight = torch.randn(4, 4, requires_grad=True)
    with activations.recomputed():
        product = weight * 2
        kept = weakref.ref(product)
        norm = torch.linalg.norm(product, dim=1).detach()
    del product
    assert kept() is None and norm.shape == (4,)


def test_gpt2s_fused_activation_gives_the_same_outputs():
    from transformers.activations import NewGELUActivation

    from peft_recipes.kernels import activations

    plain, fused = (model_of("gpt2") for _ in range(2))
    activations.fuse(fused)
    assert not any(isinstance(m, NewGELUActivation) for m in fused.modules())
    ids = torch.randint(3, VOCABULARY, (2, 20))
    torch.testing.assert_close(plain(ids).logits, fused(ids).logits, rtol=1e-5, atol=1e-6)
    assert fused.config.activation_function == plain.config.activation_function == "gelu_new"
