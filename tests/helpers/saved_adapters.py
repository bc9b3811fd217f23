"""Adapters made and saved by plain PEFT, with random weights: like those a user downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


def lora(**options: Any) -> LoraConfig:
    """A LoRA of rank 2 on the attention layers of a Llama, with lora_B not initialised to zeros."""
    defaults = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return LoraConfig(**{**defaults, **options})


def saved(
    base: Path, folder: Path, config: PeftConfig | None = None, seed: int = 0, labels: int = 0,
    auto_class: Any = AutoModelForCausalLM,
) -> Path:  # fmt: skip
    """Save an adapter with random weights. labels: a classifier's number of classes; 0: a model of auto_class."""
    torch.manual_seed(seed)
    if labels:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, pad_token_id=0)
    else:
        model = auto_class.from_pretrained(base)
    adapted = get_peft_model(model, config or lora())
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                weight.normal_(std=0.3)  # large, so that adapters differ clearly in their outputs
    adapted.save_pretrained(folder)
    return folder
