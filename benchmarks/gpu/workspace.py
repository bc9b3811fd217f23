"""Models with random weights and made rows, as recipes in a folder: what a machine without the Hub can measure.

The lengths of the `alpaca` rows are those of the Alpaca rows of benchmarks/sft_throughput/: the tokens of each of its
steps of eight, the common prefix and the share of labelled tokens; within a step they vary as exp(normal / 2).
"""

from __future__ import annotations

import functools
import json
import math
import random
from pathlib import Path
from typing import Any

ALPACA = Path(__file__).parents[1] / "sft_throughput" / "alpaca-smollm2-135m-batch8-cpu.json"
_ALPACA_BATCH, _WARMUP = 8, 3
WORDS = 4_000  # that the made rows are drawn from
_SPECIAL = ["<pad>", "<eos>", "<unk>"]
_TEMPLATE = (  # adds nothing but the answer's end token, so that rows have the lengths they were made with
    "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
)

# The configurations of the models on the Hub, of which only the shapes matter here.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1_536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8_192,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 1_024, "intermediate_size": 3_072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    },
    "llama3-8b": {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4_096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8_192,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "llama", "vocab_size": 4_096, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
}  # fmt: skip
TITLES = {"smollm2-135m": "SmolLM2-135M", "qwen3-0.6b": "Qwen3-0.6B", "llama3-8b": "Llama-3-8B", "tiny": "tiny Llama"}


@functools.cache
def parameters(shape: str) -> tuple[int, int]:
    """(weights of the matrix products outside the LM head, weights of the LM head) of a shape."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return matrix_parameters(AutoModelForCausalLM.from_config(configuration(shape)))


def matrix_parameters(model: Any) -> tuple[int, int]:
    """(weights of the matrix products outside the LM head, weights of the LM head) of a model that is not quantised."""
    head = model.get_output_embeddings().weight
    outside = {id(model.get_input_embeddings().weight), id(head)}
    body = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and id(p) not in outside
               and "lora_" not in n and "wpe" not in n)  # fmt: skip
    return body, head.numel()


def configuration(shape: str) -> Any:
    """The transformers configuration of a shape."""
    from transformers import AutoConfig

    options = dict(SHAPES[shape])
    return AutoConfig.for_model(options.pop("model_type"), **options, pad_token_id=0, bos_token_id=1, eos_token_id=1)


@functools.cache
def alpaca() -> tuple[list[int], int, float]:
    """(tokens of each step of eight rows, tokens of the common prefix, share of labelled tokens) of Alpaca's rows."""
    arm = json.loads(ALPACA.read_text(encoding="utf-8"))["arms"]["peft-recipes"]
    timed, steps = sum(arm["tokens"][_WARMUP:]), len(arm["tokens"]) - _WARMUP
    # Of each step seven prefixes are not computed, and the last token of each of eight rows.
    prefix = (timed - arm["computed_positions"] - _ALPACA_BATCH * steps) / ((_ALPACA_BATCH - 1) * steps)
    body, head = parameters("smollm2-135m")
    labelled = (arm["needed_operations"] / 4 - body * arm["computed_positions"]) / head
    return arm["tokens"], round(prefix), labelled / timed


def lengths(kind: str, count: int, tiny: bool = False) -> list[tuple[int, int]]:
    """(prompt, answer) tokens of `count` rows, the answer's with its end token. kind: "alpaca", or a length: "2048"."""
    if kind != "alpaca":
        return [(1, int(kind) - 1)] * count
    steps, prefix, share = alpaca()
    draw, made = random.Random(0), []
    for number in range(math.ceil(count / _ALPACA_BATCH)):
        weights = [math.exp(draw.gauss(0, 0.5)) for _ in range(_ALPACA_BATCH)]
        left = steps[number % len(steps)] - _ALPACA_BATCH * (prefix + 3)
        for weight in weights:
            own = 3 + round(left * weight / sum(weights))
            answer = min(max(round(share * (prefix + own)), 2), own - 1)
            made.append((prefix + own - answer, answer))
    return [(min(p, prefix + 8), min(a, 8)) for p, a in made[:count]] if tiny else made[:count]


def rows(kind: str, count: int, tiny: bool = False, pairs: bool = False) -> list[dict[str, str]]:
    """Made rows with prompt and completion, or for DPO prompt, chosen and rejected."""
    draw, prefix, made = random.Random(1), alpaca()[1] if kind == "alpaca" else 0, []

    def words(number: int, start: int = 0) -> str:
        """Words, the first `start` of them the same in all rows; what follows the answers is its end token."""
        return " ".join(f"w{i if i < start else draw.randrange(WORDS)}" for i in range(number))

    for prompt, answer in lengths(kind, count, tiny):
        row = {"prompt": words(prompt, prefix)}
        answers = ("chosen", "rejected") if pairs else ("completion",)
        made.append(row | {name: words(answer - 1) for name in answers})
    return made


def tokenizer() -> Any:
    """A word-level tokenizer of the made rows' words: a token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate([*_SPECIAL, *(f"w{i}" for i in range(WORDS))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                      model_input_names=["input_ids", "attention_mask"])  # fmt: skip
    wrapped.chat_template = _TEMPLATE
    return wrapped


def model_folder(work: Path, shape: str, device: str) -> Path:
    """The folder of a model with random weights and its tokenizer, made on first use.

    Its weights are stored in bf16, except the tiny one's, so that each tool starts from the same values in any dtype.
    """
    folder = work / shape
    if not (folder / "done").is_file():
        import torch
        from transformers import AutoModelForCausalLM, set_seed

        set_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                configuration(shape), dtype=torch.float32 if shape == "tiny" else torch.bfloat16
            )
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        (folder / "done").touch()
    return folder


def recipe_file(
    work: Path, shape: str, kind: str, count: int, device: str, tiny: bool = False, task: str = "sft"
) -> Path:
    """A recipe of `count` made rows on a model of a shape: arms full, lora (r=16, all linear layers) and qlora.

    On a GPU the precision is bf16.
    """
    from peft import LoraConfig

    from peft_recipes import Arm, Dataset, Recipe, targets

    name = f"{shape}-{kind}-{task}"
    data = work / f"{name}-{count}.jsonl"
    made = rows(kind, count + 16, tiny, task == "dpo")
    data.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")

    def lora() -> LoraConfig:
        linear = targets(SHAPES[shape]["model_type"], "all-linear")
        return LoraConfig(r=16, lora_alpha=32, target_modules=linear)

    longest = max(sum(pair) for pair in lengths(kind, count + 16, tiny))
    arms = {"full": Arm(learning_rate=1e-5), "lora": Arm(lora(), learning_rate=1e-4),
            "qlora": Arm(lora(), learning_rate=1e-4, quantise="nf4")}  # fmt: skip
    if task == "dpo":
        del arms["qlora"]
    made = Recipe(
        name=name, task=task, model=str(model_folder(work, shape, device)), arms=arms,
        dataset=Dataset(str(data), train=count, validation=8, test=8), max_length=max(longest, 8),
        max_row_tokens=max(longest, 4_096),
        training={"use_cpu": True, "bf16": False} if device == "cpu" else {"bf16": True}, prompts=[],
    )  # fmt: skip
    path = work / f"{name}.yaml"
    made.to_yaml(path)
    return path
