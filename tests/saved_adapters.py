"""Adapters that plain PEFT makes and saves, random but not zero: what a user gets from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


def lora(**options: Any) -> LoraConfig:
    """A LoRA of rank 2 on the attention of a Llama, not zero at its start."""
    given = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return LoraConfig(**{**given, **options})


def saved(base: Path, folder: Path, config: PeftConfig | None = None, seed: int = 0, labels: int = 0) -> Path:
    """An adapter of a base, drawn from a seed, saved in a folder; with labels: of a classifier of as many classes."""
    torch.manual_seed(seed)
    if labels:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, pad_token_id=0)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
    made = get_peft_model(model, config or lora())
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                weight.normal_(std=0.3)  # so that an adapter's answers are told from another's
    made.save_pretrained(folder)
    return folder
