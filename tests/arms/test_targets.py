"""Which layers the targets of an arm reach on bases without a row in the table of architectures."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from peft import LoraConfig
from transformers import AutoConfig

from peft_recipes import Arm, Dataset, Recipe, RecipeError
from peft_recipes.arms.apply import fit_targets
from peft_recipes.models.architectures import architecture_of, targets
from peft_recipes.models.module_matching import matched_modules

_TEXT = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
_MOE = dict(_TEXT, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts_per_tok=2)
_LINEAR = dict(linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
_LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
_VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28,
               patch_size=14)  # fmt: skip
_CLIP = dict(_VISION, model_type="clip_vision_model")
SMALL = {
    "qwen3_next": dict(_MOE, **_LINEAR, head_dim=8, layer_types=["linear_attention", "full_attention"]),
    "qwen2_moe": _MOE,
    "jamba": dict(_TEXT, num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4),
    "mixtral": dict(_TEXT, num_local_experts=4),
    "deepseek_v3": dict(
        _TEXT,
        **_LATENT,
        n_routed_experts=4,
        moe_intermediate_size=8,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    ),
    "phi3": _TEXT,
    "falcon": dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4),
    "mpt": dict(d_model=16, n_heads=4, n_layers=2, vocab_size=64),
    "gpt_oss": dict(_TEXT, num_local_experts=4, head_dim=8),
    "mamba": dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4),
    "gemma3": {"text_config": dict(_TEXT, head_dim=8), "vision_config": _VISION},
    "llava": {"text_config": dict(_TEXT, model_type="llama"), "vision_config": _CLIP},
    "qwen2_vl": {"text_config": _TEXT, "vision_config": dict(depth=2, embed_dim=16, hidden_size=16, num_heads=2)},
    "llama4": {
        "text_config": dict(_TEXT, num_local_experts=2, intermediate_size_mlp=32, head_dim=8),
        "vision_config": dict(_VISION, intermediate_size=64),
    },
}
LLAMA = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}


def model_of(config):
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config)


def recipe_with(names) -> Recipe:
    return Recipe(
        name="any", task="language-modeling", model="any/base", dataset=Dataset("rows.jsonl", text="text"),
        training={"max_steps": 1}, arms={"lora": Arm(LoraConfig(target_modules=names))},
    )  # fmt: skip


@pytest.mark.parametrize("model_type", SMALL)
@pytest.mark.parametrize("group", LLAMA)
def test_named_targets_that_all_hit_stay_as_they_are(model_type, group):
    config = AutoConfig.for_model(model_type, **SMALL[model_type])
    model = model_of(config)
    if _hits(model, LLAMA[group]):
        fitted, notes = fit_targets(recipe_with(LLAMA[group]), config)
        assert (set(fitted.arms["lora"].peft.target_modules), notes) == (set(LLAMA[group]), [])
    elif architecture_of(config).group(group):
        fitted, notes = fit_targets(recipe_with(LLAMA[group]), config)
        assert len(notes) == 1 and f"another architecture's {group}" in notes[0]
        assert matched_modules(model, fitted.arms["lora"].peft)


def _hits(model, names) -> bool:
    return all(matched_modules(model, [name]) for name in names)


@pytest.mark.parametrize("model_type", SMALL)
def test_a_group_has_no_router_no_vision_tower_and_no_head(model_type):
    config = AutoConfig.for_model(model_type, **SMALL[model_type])
    model = model_of(config)
    row = architecture_of(config)
    for which in ("attention", "mlp", "all-linear"):
        hit = matched_modules(model, row.group(which)) if row.group(which) else []
        assert not [name for name in hit if re.search(r"vision|visual|router|(^|[._])gate$|lm_head|score", name)]
    assert hit


@pytest.mark.parametrize("model_type", ["resnet", "regnet", "mobilenet_v2", "efficientnet", "poolformer"])
def test_a_convolutional_classifier_has_convolutions_as_targets(model_type):
    config = AutoConfig.for_model(model_type)
    with pytest.raises(RecipeError, match=f"'{model_type}' has no all-linear layers to target. Valid: convolutions"):
        targets(config, "all-linear")
    with torch.device("meta"):
        model = transformers.AutoModelForImageClassification.from_config(config)
    hit = [model.get_submodule(name) for name in matched_modules(model, targets(config, "convolutions"))]
    assert hit and all(isinstance(layer, torch.nn.Conv2d) and layer.groups == 1 for layer in hit)


def test_convolutions_that_change_their_weights_are_no_targets():
    with pytest.raises(RecipeError, match="'bit' has no convolutions layers to target"):
        targets(AutoConfig.for_model("bit"), "convolutions")


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga", "loftq", "pissa_niter_4"])
def test_an_initialisation_that_needs_more_than_the_base_is_refused(init):
    method = LoraConfig(target_modules=["q_proj"])
    method.init_lora_weights = init
    assert any(f"init_lora_weights: '{init}'" in problem for problem in Arm(method).problems("arms.lora"))


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "pissa", "olora", "mica"])
def test_an_initialisation_from_the_base_alone_is_accepted(init):
    assert Arm(LoraConfig(target_modules=["q_proj"], init_lora_weights=init)).problems("arms.lora") == []
