"""The table of methods: paper, default options, a starting learning rate and limits, one row per method.

`--arms lora,dora,ia3` takes a name that the recipe lacks from this table (selection.py), so any method runs on any
recipe. Importing this module loads neither torch nor peft.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LORA_LR = 2e-4  # QLoRA's; a recipe's own LoRA arm replaces it for every row with like_lora (selection.py)


@dataclass(frozen=True)
class Method:
    """One row of the table. `selection.arm_of` builds an arm from it for a base and a task.

    config: the class name of its PeftConfig, or "bitfit".
    options: what differs from PEFT's defaults. arm: further fields of the Arm.
    targets: which layers, a key of `selection._TARGETS` ("" for none).
    fitted: options that must divide the base's widths, with the largest value of each.
    like_lora: scale the learning rate with that of the recipe's own LoRA arm.
    defaults: where they come from; a learning rate it does not mention is ours.
    cannot: the limits, in a few words each; selection.py or PEFT reports them when they are hit.
    merges: whether it can be merged into the base.
    """

    name: str
    title: str
    config: str
    learning_rate: float
    paper: str
    arxiv: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: str = "all-linear"
    fitted: Mapping[str, int] = field(default_factory=dict)
    arm: Mapping[str, Any] = field(default_factory=dict)
    defaults: str = "PEFT's"
    cannot: tuple[str, ...] = ()
    merges: bool = True
    like_lora: bool = False


_LORA = {"r": 16, "lora_alpha": 32}
_PROMPT = {"num_virtual_tokens": 20}
_NO_CONV = ("conv layers and GPT-2's Conv1D",)
_NOT_MERGED = ("conv layers", "merging: it changes the input, not a weight")
_RELOAD = "loading without the base's weights: each load decomposes them again"

_ROWS = (
    Method("lora", "LoRA", "LoraConfig", LORA_LR, "LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685",
           _LORA, like_lora=True, defaults="r 16, alpha 32 on all linear layers: LoRA Without Regret (Schulman et al. "
           "2025); learning rate: QLoRA's"),
    Method("rslora", "rsLoRA", "LoraConfig", LORA_LR, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
           "2312.03732", {"r": 16, "lora_alpha": 8, "use_rslora": True}, like_lora=True,
           defaults="alpha / sqrt(r) = 2, the same scaling as lora at this rank"),
    Method("dora", "DoRA", "LoraConfig", LORA_LR, "DoRA: Weight-Decomposed Low-Rank Adaptation", "2402.09353",
           {**_LORA, "use_dora": True}, defaults="as lora, the paper's", like_lora=True,
           cannot=("speed: each step computes the norm of every adapted weight",)),
    Method("pissa", "PiSSA", "LoraConfig", LORA_LR,
           "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models", "2404.02948",
           {"r": 16, "lora_alpha": 16, "init_lora_weights": "pissa"}, like_lora=True,
           defaults="alpha = r as in the paper: the adapter starts as exactly what is taken out of the weight",
           cannot=("conv layers", _RELOAD)),
    Method("olora", "OLoRA", "LoraConfig", LORA_LR, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
           "2406.01775", {"r": 16, "lora_alpha": 16, "init_lora_weights": "olora"}, like_lora=True,
           defaults="alpha = r, as pissa", cannot=(*_NO_CONV, _RELOAD)),
    Method("loraplus", "LoRA+", "LoraConfig", LORA_LR / 4, "LoRA+: Efficient Low Rank Adaptation of Large Models",
           "2402.12354", _LORA, arm={"lora_plus_ratio": 16.0}, like_lora=True,
           defaults="B's learning rate is 16 times A's, as in PEFT's create_loraplus_optimizer; A's is a quarter of "
           "LoRA's, so that the two are on either side of it"),
    Method("adalora", "AdaLoRA", "AdaLoraConfig", 1e-3,
           "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", "2303.10512",
           {"init_r": 12, "target_r": 8, "lora_alpha": 32, "tinit": 100, "tfinal": 300, "total_step": 1_000,
            "orth_reg_weight": 0.1},
           defaults="ranks from 12 to 8 on average, alpha 32, orthogonality weight 0.1; the ranks are fixed for the "
           "first 10 % of the steps and the last 30 %",
           cannot=("resuming midway: PEFT saves no state of its rank budget, so an interrupted run starts over",)),
    Method("ia3", "(IA)3", "IA3Config", 3e-3,
           "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", "2205.05638",
           targets="ia3", defaults="keys, values and the last MLP layer, learning rate 3e-3: the paper's"),
    Method("vera", "VeRA", "VeraConfig", 4e-3, "VeRA: Vector-based Random Matrix Adaptation", "2310.11454", {"r": 256},
           cannot=("conv layers",), defaults="r 256, learning rate 4e-3: the paper's for instruction tuning"),
    Method("oft", "OFT", "OFTConfig", 4e-4, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
           "2306.07280", defaults="blocks of 32, PEFT's", cannot=("GPT-2's Conv1D",)),
    Method("boft", "BOFT", "BOFTConfig", 1e-3, "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization",
           "2311.06243", {"boft_block_size": 4, "boft_n_butterfly_factor": 1},
           defaults="blocks of 4, one factor: PEFT's", cannot=("GPT-2's Conv1D",)),
    Method("loha", "LoHa", "LoHaConfig", 1e-3,
           "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", "2108.06098",
           {"r": 8, "alpha": 16}, defaults="r 8, PEFT's; alpha 2 r, as lora", cannot=("GPT-2's Conv1D",)),
    Method("lokr", "LoKr", "LoKrConfig", 1e-3,
           "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", "2309.14859",
           {"r": 8, "alpha": 16}, defaults="r 8, PEFT's; alpha 2 r, as lora", cannot=("GPT-2's Conv1D",)),
    Method("fourierft", "FourierFT", "FourierFTConfig", 3e-3,
           "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", "2405.03003",
           {"n_frequency": 1_000, "scaling": 150.0}, cannot=("conv layers",),
           defaults="1,000 frequencies, scaling 150: PEFT's"),
    Method("randlora", "RandLoRA", "RandLoraConfig", 1e-3,
           "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", "2502.00987", {"r": 32},
           cannot=("conv layers",)),
    Method("gralora", "GraLoRA", "GraloraConfig", LORA_LR,
           "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning", "2505.20355",
           {"r": 32, "alpha": 64}, cannot=("conv layers",), like_lora=True),
    Method("hira", "HiRA", "HiraConfig", 1e-3,
           "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models (ICLR 2025)", "",
           {"r": 32}),
    Method("vblora", "VB-LoRA", "VBLoRAConfig", 5e-3,
           "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", "2405.15179",
           {"r": 4, "num_vectors": 256, "topk": 2}, fitted={"vector_length": 256}, cannot=("conv layers",)),
    Method("waveft", "WaveFT", "WaveFTConfig", 3e-3,
           "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets", "2505.12532",
           {"n_frequency": 1_000}, cannot=("conv layers",)),
    Method("delora", "DeLoRA", "DeloraConfig", 1e-3, "Decoupling Angles and Strength in Low-rank Adaptation",
           "2503.18225", {"r": 8}, cannot=_NO_CONV),
    Method("hra", "HRA", "HRAConfig", 1e-3,
           "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
           "2405.17484", {"r": 8}, cannot=("GPT-2's Conv1D",)),
    Method("miss", "MiSS", "MissConfig", LORA_LR,
           "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", "2409.15371",
           fitted={"r": 64}, cannot=_NO_CONV, like_lora=True),
    Method("shira", "SHiRA", "ShiraConfig", 1e-3, "Sparse High Rank Adapters", "2406.13175",
           {"r": 32, "random_seed": 0}, cannot=_NO_CONV),
    Method("c3a", "C3A", "C3AConfig", 1e-2, "Parameter-Efficient Fine-Tuning via Circular Convolution", "2407.19342",
           fitted={"block_size": 256}, cannot=_NO_CONV),
    Method("road", "RoAd", "RoadConfig", 3e-3,
           "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability", "2409.00119",
           fitted={"group_size": 64}, cannot=_NO_CONV),
    Method("ln-tuning", "LN tuning", "LNTuningConfig", 1e-3,
           "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", "2312.11420", targets="norms",
           cannot=("a base without norm layers",)),
    Method("bitfit", "BitFit", "bitfit", 1e-3,
           "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models", "2106.10199",
           targets="", defaults="every bias of the base; learning rate: the largest the paper tries",
           cannot=("a base without biases (Llama, T5)", "quantised bases",
                   "PEFT's format: a safetensors file of biases")),
    Method("prompt-tuning", "Prompt tuning", "PromptTuningConfig", 1e-2,
           "The Power of Scale for Parameter-Efficient Prompt Tuning", "2104.08691", _PROMPT, targets="prompts",
           merges=False, defaults="20 virtual tokens, as PEFT's examples", cannot=_NOT_MERGED),
    Method("prefix-tuning", "Prefix tuning", "PrefixTuningConfig", 1e-2,
           "Prefix-Tuning: Optimizing Continuous Prompts for Generation", "2101.00190", _PROMPT, targets="prefix",
           merges=False, defaults="20 virtual tokens; learning rate: PEFT's examples'",
           cannot=("encoders without past_key_values (DistilBERT)", *_NOT_MERGED)),
    Method("p-tuning", "P-tuning", "PromptEncoderConfig", 1e-3, "GPT Understands, Too", "2103.10385",
           {**_PROMPT, "encoder_hidden_size": 128}, targets="prompts", merges=False, cannot=_NOT_MERGED,
           defaults="20 virtual tokens behind an encoder of width 128: PEFT's examples'"),
    Method("adaption-prompt", "LLaMA-Adapter", "AdaptionPromptConfig", 9e-3,
           "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention", "2303.16199",
           {"adapter_len": 10}, targets="upper layers", merges=False,
           defaults="10 tokens, learning rate 9e-3, all layers but the first two",
           cannot=("other bases than Llama, Mistral and GPT-2",
                   "classification and reward: PEFT stores no head with it", "kto and grpo: trl's LM head for them")),
    Method("trainable-tokens", "Trainable tokens", "TrainableTokensConfig", 1e-3,
           "PEFT's documentation, Trainable Tokens", "", targets="embeddings",
           defaults="the embeddings of the tokenizer's special tokens",
           cannot=("classification and reward: PEFT stores no head with it", "images")),
    Method("qlora", "QLoRA", "LoraConfig", LORA_LR, "QLoRA: Efficient Finetuning of Quantized LLMs", "2305.14314",
           _LORA, arm={"quantise": "nf4"}, like_lora=True,
           defaults="NF4, double quantisation, all linear layers: the paper's; r and alpha as lora",
           cannot=("Apple's GPU", "conv layers", "exact merging: the adapter is merged into dequantised weights")),
    Method("lora-int8", "LoRA, int8 base", "LoraConfig", LORA_LR,
           "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", "2208.07339", _LORA,
           arm={"quantise": "int8"}, like_lora=True, defaults="as lora; outliers above 6, the paper's",
           cannot=("Apple's GPU", "conv layers",
                   "exact merging: int8 layers round their inputs, a merged model does not")),
)  # fmt: skip

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}

_MANY = "it mixes the adapters of several tasks, and a recipe is one task"
_UNTRIED = "no defaults were tried here; a recipe can use its PeftConfig directly"
# Methods of PEFT or another library that the table leaves out, with the reason; `--arms all` reports them.
NOT_IN_TABLE: dict[str, str] = {
    "bottleneck": "the `adapters` library has no release for transformers 5, and PEFT's own is the adaption prompt",
    **dict.fromkeys(("multitask-prompt-tuning", "poly", "xlora"), _MANY),
    "cpt": "it needs labelled examples inside its prompt, which a recipe does not have",
    "cartridge": "it distils one long context, and a recipe has many examples",
    **dict.fromkeys(("adamss", "beft", "deft", "frod", "glora", "lily", "osf", "peanut", "psoft", "pvera", "shadow",
                     "supertuning", "tinylora", "unilora"), _UNTRIED),
}  # fmt: skip


def table() -> dict[str, Any]:
    """Return the table as plain data for `peft-recipes methods --json`: "methods", and "left_out" with reasons."""
    rows = []
    for method in METHODS.values():
        row = dataclasses.asdict(method)
        del row["fitted"]
        rows.append({**row, "targets": method.targets or None, "arxiv": method.arxiv or None})
    return {"methods": rows, "left_out": NOT_IN_TABLE}
