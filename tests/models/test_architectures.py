"""The table of architectures, compared with real models: its names match exactly the layers that they describe."""

import re
import subprocess
import sys
from functools import cache

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

import peft_recipes.models.small_cnn  # noqa: F401  (registers the small CNN)
from peft_recipes.errors import RecipeError
from peft_recipes.models.architecture_table import ARCHITECTURES, head_modules
from peft_recipes.models.architectures import (
    architecture_of,
    component_of,
    parameters_by_component,
    targets,
)
from peft_recipes.models.module_matching import matched_modules, nearest_modules, target_names, unmatched

AUTO_CLASSES = {
    "language-modeling": AutoModelForCausalLM,
    "masked-language-modeling": AutoModelForMaskedLM,
    "text-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
}
ENCODER_DECODERS = ("t5", "mt5", "bart", "mbart", "marian", "pegasus")
CASES = [
    (model_type, task)
    for model_type in ARCHITECTURES
    for task, auto_class in AUTO_CLASSES.items()
    # of an encoder-decoder the decoder alone, or BART's classifier, is nothing that a recipe trains
    if CONFIG_MAPPING[model_type] in auto_class._model_mapping
    and (task == "seq2seq" or model_type not in ENCODER_DECODERS)
]
TRANSFORMERS = [(model_type, task) for model_type, task in CASES if ARCHITECTURES[model_type].attention]

SIZES = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4, intermediate_size=32,
    vocab_size=40, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
T5_SIZES = dict(
    d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=40, pad_token_id=0, eos_token_id=1,
)  # fmt: skip
BART_SIZES = dict(
    d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=40,
    encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=32, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, decoder_start_token_id=2,
)  # fmt: skip
OWN_SIZES = {
    "gpt2": dict(n_embd=16, n_layer=2, n_head=4, vocab_size=40, n_positions=32, bos_token_id=1, eos_token_id=2),
    "distilbert": dict(dim=16, n_layers=2, n_heads=4, hidden_dim=32, vocab_size=40, max_position_embeddings=32),
    # with projections around the blocks, as in OPT-350m: they are no targets
    "opt": {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 8},
    "vit": dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=32),
    **{name: T5_SIZES for name in ("t5", "mt5")},
    **{name: BART_SIZES for name in ("bart", "mbart", "marian", "pegasus")},
    "small-cnn": {},
    "efficientnet": {},
}

# The linear layers of a block, from the models' code and not from the table
LLAMA = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj",
    "mlp.gate_proj mlp.up_proj mlp.down_proj",
)
BERT = (
    "attention.self.query attention.self.key attention.self.value attention.output.dense",
    "intermediate.dense output.dense",
)
T5_ATTENTION = " ".join(f"layer.{part}.{name}" for part in ("0.SelfAttention", "1.EncDecAttention") for name in "qkvo")
T5_MLP, MT5_MLP = (
    " ".join(f"layer.{i}.DenseReluDense.{name}" for i in (1, 2) for name in names.split())
    for names in ("wi wo", "wi_0 wi_1 wo")
)
BART_ATTENTION = " ".join(
    f"{attention}.{name}_proj" for attention in ("self_attn", "encoder_attn") for name in ("q", "k", "v", "out")
)
INSIDE_A_BLOCK = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"], LLAMA),
    **dict.fromkeys(["bert", "roberta"], BERT),
    "gpt2": ("attn.c_attn attn.c_proj", "mlp.c_fc mlp.c_proj"),
    "gpt_neox": ("attention.query_key_value attention.dense", "mlp.dense_h_to_4h mlp.dense_4h_to_h"),
    "opt": ("self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj", "fc1 fc2"),
    "phi": ("self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense", "mlp.fc1 mlp.fc2"),
    "distilbert": ("attention.q_lin attention.k_lin attention.v_lin attention.out_lin", "ffn.lin1 ffn.lin2"),
    "t5": (T5_ATTENTION, T5_MLP),
    "mt5": (T5_ATTENTION, MT5_MLP),
    **dict.fromkeys(["bart", "mbart", "marian", "pegasus"], (BART_ATTENTION, "fc1 fc2")),
    "vit": ("attention.q_proj attention.k_proj attention.v_proj attention.o_proj", "mlp.fc1 mlp.fc2"),
}


def config_of(model_type, **changes):
    return AutoConfig.for_model(model_type, **{**OWN_SIZES.get(model_type, SIZES), **changes})


def meta_model(task, config):
    with torch.device("meta"):
        return AUTO_CLASSES[task].from_config(config)


@cache
def tiny(model_type, task):
    return meta_model(task, config_of(model_type))


def linear_in_blocks(model):
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    return [name for name in layers if re.search(r"\.\d+\.", name)]


def adapted_modules(model):
    return {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize(("model_type", "task"), TRANSFORMERS)
@pytest.mark.parametrize("which", ["attention", "mlp", "all-linear"])
def test_lora_is_on_exactly_the_layers_that_the_targets_name(model_type, task, which):
    row = ARCHITECTURES[model_type]
    model = AUTO_CLASSES[task].from_config(config_of(model_type))
    attention, mlp = INSIDE_A_BLOCK[model_type]
    inside = {"attention": attention, "mlp": mlp, "all-linear": f"{attention} {mlp}"}[which].split()
    blocks = [f"{blocks}.{block}" for blocks in row.blocks.split(", ") for block in range(2)]
    modules = {name for name, _ in model.named_modules()}  # an encoder has no attention to an encoder
    expected = {f"{block}.{name}" for block in blocks for name in inside} & modules
    if which == "all-linear":  # the same as every linear layer below a numbered block
        assert expected == set(linear_in_blocks(model))
    task_type = TaskType.SEQ_CLS if task == "text-classification" else None
    lora = LoraConfig(r=2, target_modules=targets(model_type, which), task_type=task_type)

    assert set(matched_modules(model, lora)) == expected
    assert adapted_modules(get_peft_model(model, lora)) == expected


@pytest.mark.parametrize(("model_type", "task"), TRANSFORMERS)
def test_a_row_names_the_head_the_embeddings_and_the_layer_class(model_type, task):
    row, model = ARCHITECTURES[model_type], tiny(model_type, task)
    base = model.base_model_prefix if model.base_model is not model else "shared encoder decoder"  # T5's parts
    outside = [name for name, child in model.named_children() if name not in base.split()]
    heads = [name for name in outside if list(getattr(model, name).parameters())]
    assert set(heads) <= set(row.heads) and heads == head_modules(model)

    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    components = {component_of(row, f"{name}.weight") for name in embeddings}
    assert components <= {"embeddings"}

    layer = type(model.get_submodule(matched_modules(model, targets(model_type, "attention"))[0]))
    assert layer.__name__ == row.layer
    assert row.fan_in_fan_out == (layer is Conv1D)


@pytest.mark.parametrize("model_type", [m for m in ARCHITECTURES if ARCHITECTURES[m].attention])
def test_the_targets_match_the_same_layers_in_a_base_model_without_a_head(model_type):
    model = tiny(model_type, next(task for case, task in CASES if case == model_type))
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    for which in ("attention", "mlp", "all-linear"):
        names = targets(model_type, which)
        assert [prefix + name for name in matched_modules(model.base_model, names)] == matched_modules(model, names)


def test_an_efficientnets_targets_are_its_convolutions_without_groups_outside_squeeze_and_excitation():
    model = tiny("efficientnet", "image-classification")
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    expected = [name for name in convolutions if "squeeze_excite" not in name]
    assert matched_modules(model, targets("efficientnet", "convolutions")) == expected
    assert head_modules(model) == ["classifier"]


def test_the_small_cnn_has_linear_layers_and_convolutions_as_targets():
    model = tiny("small-cnn", "image-classification")
    assert matched_modules(model, targets("small-cnn", "all-linear")) == ["fc1", "classifier"]
    assert matched_modules(model, targets("small-cnn", "convolutions")) == ["conv1", "conv2"]
    assert head_modules(model) == ["classifier"]


@pytest.mark.parametrize(("model_type", "task"), CASES)
def test_components_add_up_to_all_parameters(model_type, task):
    model = tiny(model_type, task)
    counts = parameters_by_component(model)
    assert sum(counts.values()) == model.num_parameters()
    assert counts["attention"] == sum(
        p.numel() for n in matched_modules(model, ARCHITECTURES[model_type].group("attention") or ["none"])
        for p in model.get_submodule(n).parameters()
    )  # fmt: skip


# Parameter counts: equal to published ones and to a check by hand


def test_smollm2_counts_of_lora_on_attention():
    config = AutoConfig.for_model(
        "llama", hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    model = meta_model("language-modeling", config)
    assert model.num_parameters() == 134_515_008
    assert lora_parameters(model, r=16, target_modules=targets("llama", "attention")) == 1_843_200


def test_distilbert_counts_of_lora_on_attention_its_head_and_its_components():
    model = meta_model("text-classification", AutoConfig.for_model("distilbert"))
    assert model.num_parameters() == 66_955_010
    assert parameters_by_component(model) == {
        "embeddings": 23_835_648,
        "attention": 6 * 4 * (768 * 768 + 768),
        "mlp": 6 * (2 * 768 * 3072 + 768 + 3072),
        "head": 592_130,
        "other": 6 * 4 * 768,  # the blocks' norms
    }
    assert lora_parameters(model, r=16, target_modules=targets("distilbert", "attention")) == 589_824


def test_gpt2_counts_of_lora_on_all_linear_layers():
    model = meta_model("text-classification", AutoConfig.for_model("gpt2", pad_token_id=0))
    row = architecture_of("gpt2")
    names = targets("gpt2", "all-linear")
    assert lora_parameters(model, r=16, target_modules=names, fan_in_fan_out=row.fan_in_fan_out) == 2_359_296


def lora_parameters(model, **options):
    with torch.device("meta"):
        adapted = get_peft_model(model, LoraConfig(**options))
    return sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)


# Wrong names


def test_a_misspelt_model_type_names_the_nearest():
    with pytest.raises(RecipeError, match=r"Unknown model type 'gtp2'.*Did you mean 'gpt2'\?.*configuration"):
        targets("gtp2", "attention")


@pytest.mark.parametrize(("wrong", "right"), [("atention", "attention"), ("all_linear", "all-linear")])
def test_a_misspelt_group_names_the_nearest(wrong, right):
    with pytest.raises(RecipeError, match=rf"Unknown target group '{wrong}' of 'gpt2'.*Did you mean '{right}'\?"):
        targets("gpt2", wrong)


def test_a_group_that_an_architecture_lacks_is_an_error_with_the_valid_groups():
    with pytest.raises(
        RecipeError, match=r"'small-cnn' has no attention layers to target\. Valid: all-linear, convolut"
    ):
        targets("small-cnn", "attention")


def test_a_wrong_name_among_good_ones_is_found_and_the_nearest_modules_named():
    model = tiny("llama", "language-modeling")
    lora = LoraConfig(target_modules=["q_proj", "v_porj", "mlp.gate_prj"])
    assert unmatched(model, lora) == ["mlp.gate_prj", "v_porj"]
    for right in (["q_proj"], "all-linear", r".*\.q_proj"):
        assert unmatched(model, LoraConfig(target_modules=right)) == []
    assert unmatched(model, LoraConfig(target_modules="q_proj")) == [
        "q_proj"
    ]  # a string is a pattern for the full name
    assert "v_proj" in nearest_modules(model, "v_porj")
    assert nearest_modules(model, "mlp.gate_prj")[0] == "mlp.gate_proj"
    assert nearest_modules(model, "xyzzy") == []
    assert {"q_proj", "down_proj", "lm_head", "embed_tokens"} <= set(target_names(model))


# PEFT's own rules


def test_matching_applies_all_options_of_a_peft_config():
    model = tiny("distilbert", "text-classification")
    everything = LoraConfig(target_modules="all-linear", task_type=TaskType.SEQ_CLS)
    hit = matched_modules(model, everything)
    assert everything.target_modules == "all-linear" and everything.modules_to_save is None  # the config is not changed
    assert "classifier" not in hit and "distilbert.transformer.layer.1.ffn.lin2" in hit

    some = LoraConfig(target_modules=["q_lin", "lin1"], exclude_modules=["lin1"], layers_to_transform=[1])
    assert matched_modules(model, some) == ["distilbert.transformer.layer.1.attention.q_lin"]


def test_a_head_in_modules_to_save_is_not_a_target_even_if_its_name_matches():
    model = AutoModelForSequenceClassification.from_config(config_of("roberta"))
    lora = LoraConfig(target_modules=["dense"], task_type=TaskType.SEQ_CLS)
    hit = matched_modules(model, lora)
    assert "classifier.dense" in matched_modules(model, ["dense"]) and "classifier.dense" not in hit
    assert adapted_modules(get_peft_model(model, lora)) == set(hit)


def test_methods_other_than_lora_are_matched_too():
    model = tiny("gpt2", "language-modeling")
    scaling = IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])
    assert len(matched_modules(model, scaling)) == 4
    assert matched_modules(model, PrefixTuningConfig(num_virtual_tokens=3)) == []
    assert unmatched(model, PrefixTuningConfig(num_virtual_tokens=3)) == []


def test_without_targets_pefts_default_applies_or_an_error_names_the_layers():
    assert matched_modules(tiny("gpt2", "language-modeling"), LoraConfig()) == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.1.attn.c_attn",
    ]
    with pytest.raises(RecipeError, match=r"no default for model type 'distilbert'.*q_lin.*targets\('distilbert'"):
        matched_modules(tiny("distilbert", "text-classification"), LoraConfig())


def test_a_model_with_adapters_is_matched_like_its_base():
    model = AutoModelForCausalLM.from_config(config_of("gpt2"))
    before = matched_modules(model, ["c_attn"])
    adapted = get_peft_model(model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert matched_modules(adapted, ["c_attn"]) == before


def test_parameters_of_a_wrapped_layer_belong_to_the_layer():
    row = ARCHITECTURES["distilbert"]
    layer = "base_model.model.distilbert.transformer.layer.0"
    assert component_of(row, f"{layer}.attention.q_lin.base_layer.weight") == "attention"
    assert component_of(row, f"{layer}.ffn.lin1.lora_A.default.weight") == "mlp"
    assert component_of(row, f"{layer}.sa_layer_norm.weight") == "other"
    assert component_of(row, "base_model.model.pre_classifier.modules_to_save.default.weight") == "head"
    assert component_of(row, "base_model.model.distilbert.embeddings.LayerNorm.bias") == "embeddings"


# Architectures without a row

UNKNOWN = {
    # lists of names are exact; Linear and Conv1D
    "bloom": ("self_attention.query_key_value self_attention.dense", "mlp.dense_h_to_4h mlp.dense_4h_to_h"),
    "starcoder2": (LLAMA[0], "mlp.c_fc mlp.c_proj"),
    "openai-gpt": ("attn.c_attn attn.c_proj", "mlp.c_fc mlp.c_proj"),
    # only a pattern distinguishes the MLP's `output.dense` from the attention's and from the classifier's `dense`
    "electra": BERT,
    # the MLP's layers are direct children of the block
    "xglm": ("self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj", "fc1 fc2"),
}


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_targets_without_a_row_come_from_the_blocks_with_a_note(model_type):
    sizes = {"openai-gpt": OWN_SIZES["gpt2"], "xglm": dict(d_model=16, num_layers=2, attention_heads=4, ffn_dim=32)}
    config = AutoConfig.for_model(model_type, **sizes.get(model_type, SIZES))
    task = "text-classification" if model_type in ("electra", "openai-gpt") else "language-modeling"
    model = meta_model(task, config)
    linear = linear_in_blocks(model)
    attention, mlp = (set(names.split()) for names in UNKNOWN[model_type])
    for which, inside in (("attention", attention), ("mlp", mlp), ("all-linear", attention | mlp)):
        expected = [name for name in linear if re.split(r"\.\d+\.", name, maxsplit=1)[1] in inside]
        assert len(expected) == 2 * len(inside)
        assert matched_modules(model, targets(config, which)) == expected
    assert f"no row for model type '{model_type}'" in architecture_of(config).note
    assert architecture_of(config).fan_in_fan_out == (model_type == "openai-gpt")
    counts = parameters_by_component(model)
    assert sum(counts.values()) == model.num_parameters()
    assert counts["embeddings"] > 0


def test_lists_of_blocks_inside_blocks_are_one_architecture():
    config = AutoConfig.for_model("swin", embed_dim=8, depths=[2, 1], num_heads=[2, 2], image_size=32, num_labels=3)
    model = meta_model("image-classification", config)
    linear = linear_in_blocks(model)
    note = architecture_of(config).note
    assert matched_modules(model, targets(config, "all-linear")) == linear
    assert matched_modules(model, targets(config, "mlp")) == [name for name in linear if ".mlp." in name]
    assert "encoder.layers (2 x SwinStage)" in note and "SwinLayer" not in note
    assert "in all-linear alone: downsample.reduction" in note


def test_the_head_without_a_row_is_every_child_outside_the_base_model():
    model = meta_model("text-classification", AutoConfig.for_model("electra", **SIZES))
    assert head_modules(model) == ["classifier"]
    assert parameters_by_component(model)["head"] == sum(p.numel() for p in model.classifier.parameters())


def test_experts_that_no_target_module_reaches_are_named_in_the_note():
    config = AutoConfig.for_model("mixtral", **SIZES)
    assert "target_parameters reaches them: gate_up_proj, down_proj" in architecture_of(config).note
    with pytest.raises(RecipeError, match="'mixtral' has no mlp layers to target"):
        targets(config, "mlp")


def test_a_model_without_linear_layers_in_blocks_is_an_error_with_a_way_out():
    config = AutoConfig.for_model("resnet")
    with pytest.raises(RecipeError, match=r"'resnet' has no all-linear layers to target\. Valid: convolutions"):
        targets(config, "all-linear")
    assert "no repeated blocks with linear layers" in architecture_of(config).note


def test_a_row_of_the_table_has_no_note():
    assert targets(config_of("gpt2"), "attention") == ["attn.c_attn", "attn.c_proj"]
    assert architecture_of(config_of("gpt2")).note == ""


def test_the_table_loads_neither_torch_nor_transformers():
    code = (
        "import sys; from peft_recipes.models.architectures import targets; targets('gpt2', 'mlp'); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "peft_recipes.models.architectures" in loaded
    assert not {"torch", "transformers", "peft"} & set(loaded)
