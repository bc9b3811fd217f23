"""oneDNN's matrix products: the same outputs, gradients, names and weights as torch's, and torch's own elsewhere."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from transformers.pytorch_utils import Conv1D

from peft_recipes.kernels import lora_linear, onednn_linear

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason="this torch is built without oneDNN")


@pytest.fixture
def on_amd(monkeypatch):
    """Act like an AMD CPU, with layers of any size."""
    onednn_linear.pays.cache_clear()
    monkeypatch.setattr(onednn_linear, "is_amd_cpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(onednn_linear, "LEAST_WEIGHTS", 1)
    yield
    onednn_linear.pays.cache_clear()


def sped_up(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "forward" in vars(module)]


@pytest.mark.parametrize("shape", [(40, 24), (3, 20, 24), (1, 16, 24)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_product_and_its_gradients_equal_torchs(shape, bias, frozen):
    torch.manual_seed(0)
    weight = torch.randn(56, 24, requires_grad=not frozen)
    inputs = [torch.randn(shape, requires_grad=True), weight]
    inputs.append(torch.randn(56, requires_grad=not frozen) if bias else None)
    differentiable = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    results = []
    for function in (F.linear, onednn_linear.linear):
        output = function(*inputs)
        results.append([output.detach(), *torch.autograd.grad(output.sin().sum(), differentiable)])
    assert output.grad_fn.name().startswith("ViewBackward")
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_strided_inputs_and_expanded_gradients_are_supported():
    """DistilBERT's head takes the first token of each text; a sum as loss has an expanded gradient."""
    torch.manual_seed(0)
    x, results = torch.randn(16, 5, 24), []
    for function in (F.linear, onednn_linear.linear):
        weight, bias = torch.ones(56, 24, requires_grad=True), torch.ones(56, requires_grad=True)
        function(x[:, 0], weight, bias).sum().backward()
        of_bias = torch.autograd.grad(function(x[:, 0], weight.detach(), bias).sin().sum(), bias)
        results.append([weight.grad, bias.grad, *of_bias])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_unsupported_tensors_use_torch(monkeypatch):
    monkeypatch.setattr(onednn_linear, "product", None)  # fails if called
    weight = torch.randn(8, 24)
    onednn_linear.linear(torch.randn(3, 24), weight, None)  # few positions, as in generation
    onednn_linear.linear(torch.randn(40, 24).bfloat16(), weight.bfloat16(), None)
    onednn_linear.linear(torch.randn(40, 24, device="meta"), weight.to("meta"), None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert onednn_linear.linear(torch.randn(40, 24), weight, None).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        onednn_linear.linear(torch.randn(40, 24), weight, None)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "distilbert"])
def test_a_models_loss_gradients_names_and_weights_do_not_change(on_amd, tiny, kind):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if kind == "distilbert" else AutoModelForCausalLM
    own = auto.from_pretrained(tiny(kind)).eval()
    ids = torch.randint(3, 30, (4, 12))
    labels = torch.tensor([0, 1, 0, 1]) if kind == "distilbert" else ids
    fast = copy.deepcopy(own)
    onednn_linear.speed_up(fast)
    assert sped_up(fast) and not sped_up(own)
    fast = copy.deepcopy(fast)  # like trl's reference model: a copy uses its own weights
    for model in (own, fast):
        model(input_ids=ids, labels=labels).loss.backward()
    assert list(own.state_dict()) == list(fast.state_dict())
    for (name, one), (_, two) in zip(own.named_parameters(), fast.named_parameters(), strict=True):
        assert torch.equal(one, two) and (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        sped_up(fast)[0].weight.mul_(2)
        assert not torch.allclose(fast(input_ids=ids).logits, own(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_gives_the_same_logits_and_merges(on_amd, tiny, kind):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from peft_recipes import targets

    results = []
    ids = torch.randint(3, 30, (4, 12))
    for fast in (False, True):
        base = AutoModelForCausalLM.from_pretrained(tiny(kind)).eval()
        if fast:
            onednn_linear.speed_up(base)
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=targets(kind, "attention"), init_lora_weights=False)
        model = get_peft_model(base, config).eval()
        adapted = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        assert isinstance(merged.get_output_embeddings(), nn.Linear)
        torch.testing.assert_close(merged(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-5)
        results.append(adapted.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def adapted(kind, tiny, fast, **options):
    """Return a small model with a non-zero LoRA, on a base with or without oneDNN."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    from peft_recipes import Arm, targets
    from peft_recipes.arms.apply import apply_arm

    base = AutoModelForCausalLM.from_pretrained(tiny(kind))
    if fast:
        onednn_linear.speed_up(base)
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets(kind, "attention"), init_lora_weights=False)
    for name, value in options.items():
        setattr(config, name, value)
    return apply_arm(base, Arm(config, learning_rate=1e-3), "language-modeling", [])[0].train()


@pytest.fixture
def lora_calls(monkeypatch):
    """The calls of the LoRA product."""
    calls, apply = [], lora_linear._LoraProduct.apply
    monkeypatch.setattr(lora_linear._LoraProduct, "apply", lambda *args: calls.append(args) or apply(*args))
    return calls


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_in_one_operation_equals_pefts_with_its_gradients(on_amd, tiny, kind, lora_calls):
    ids, results = torch.randint(3, 30, (4, 12)), []
    for fast in (False, True):
        model = adapted(kind, tiny, fast)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert bool(lora_calls) == fast
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert gradients and all("lora_" in name for name in gradients)
        results.append({"loss": loss.detach(), **gradients})
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def do_nothing(*_):
    """A hook."""


def test_anything_but_plain_lora_uses_pefts_forward(on_amd, tiny, lora_calls):
    ids = torch.randint(3, 30, (4, 12))

    def logits(model, **options):
        lora_calls.clear()
        return model(input_ids=ids, **options).logits.detach()

    for options in ({"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}, {"bias": "all"}):
        logits(adapted("gpt2" if "bias" in options else "llama", tiny, True, **options))
        assert not lora_calls, options
    model = adapted("llama", tiny, True, lora_dropout=0.5).eval()
    expected = logits(model)
    assert lora_calls  # no dropout in evaluation
    with model.disable_adapter():
        assert not torch.allclose(logits(model), expected) and not lora_calls
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert not lora_calls
    model.unmerge_adapter()
    logits(model)
    assert lora_calls
    mixed = logits(model, adapter_names=["default", "__base__", "default", "__base__"])
    assert not lora_calls
    torch.testing.assert_close(mixed[::2], expected[::2], rtol=1e-4, atol=1e-5)
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.register_full_backward_hook(do_nothing)
    logits(model)
    assert 0 < len(lora_calls) < len([m for m in model.modules() if type(m) is LoraLinear])
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(copied), expected, rtol=1e-5, atol=1e-6)
        assert lora_calls
        with torch.no_grad():
            copied.get_parameter("base_model.model.lm_head.weight").mul_(2)
        assert not torch.allclose(logits(copied), logits(model))


def test_a_run_has_the_same_metrics(on_amd, instruct, tmp_path, monkeypatch):
    from peft_recipes import train

    losses, calls, product = [], [], onednn_linear.product
    monkeypatch.setattr(onednn_linear, "product", lambda *args: calls.append(args) or product(*args))
    for amd in (True, False):
        onednn_linear.pays.cache_clear()
        monkeypatch.setattr(onednn_linear, "is_amd_cpu", lambda amd=amd: amd)
        assert onednn_linear.pays() == amd
        calls.clear()
        run = train(instruct(), "lora", output=tmp_path / str(amd))
        assert bool(calls) == amd
        losses.append((run.metrics["test"]["loss"], run.metrics["validation"]["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_it_is_used_only_on_an_amd_cpu_without_a_gpu(on_amd, monkeypatch):
    assert onednn_linear.pays()
    onednn_linear.pays.cache_clear()
    monkeypatch.setattr(onednn_linear, "is_amd_cpu", lambda: False)
    layer = nn.Sequential(nn.Linear(8, 8))
    onednn_linear.speed_up(layer)
    assert not onednn_linear.pays() and not sped_up(layer)
    onednn_linear.pays.cache_clear()
    monkeypatch.setattr(onednn_linear, "is_amd_cpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not onednn_linear.pays()


def test_a_missing_or_wrong_product_is_not_used(on_amd, monkeypatch):
    def gone(*_):
        raise RuntimeError("no such operator")

    for wrong in (gone, lambda a, b, bias=None: a @ b.t() + 1):
        onednn_linear.pays.cache_clear()
        monkeypatch.setattr(onednn_linear, "product", wrong)
        assert not onednn_linear.pays()


def test_gpt2s_conv1d_is_supported(on_amd):
    torch.manual_seed(0)
    own = nn.Sequential(Conv1D(12, 20))
    fast = copy.deepcopy(own)
    onednn_linear.speed_up(fast)
    x = torch.randn(2, 30, 20)
    assert sped_up(fast) == [fast[0]] and type(fast[0]) is Conv1D
    torch.testing.assert_close(fast(x), own(x), rtol=1e-5, atol=1e-5)
