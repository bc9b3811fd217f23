# /// script
# requires-python = ">=3.10"
# dependencies = ["peft_recipes[embedded]>=0.1.0"]
# ///
"""Align SmolLM2-135M-Instruct with preferences by DPO: no reward model, and the untrained base as reference.

    peft-recipes compare smollm2-dpo --set training.max_steps=100
    python recipes/smollm2_dpo.py --arm lora
    accelerate launch recipes/smollm2_dpo.py --arm lora

With --embedded: the same model from its 4-bit GGUF, 160 questions about docstrings, each with the right answer and
another object's, and 20 steps. benchmarks/learning_rates/smollm2-dpo-embedded.json has the learning rates tried for
it (12 steps) and the preference accuracies on 24 validation pairs: 0.79 for full, 0.75 for lora.
"""

from peft import LoraConfig

from peft_recipes import Arm, Dataset, Recipe, main, targets

recipe = Recipe(
    name="smollm2-dpo",
    title="SmolLM2-135M-Instruct on preferences",
    task="dpo",
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    dataset=Dataset("trl-lib/ultrafeedback_binarized", test_split="test", train=5_000, validation=200, test=500),
    max_length=512,
    training={
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "warmup_steps": 0.1,
        "beta": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 0.25,  # four times per run
    },
    arms={
        "full": Arm(learning_rate=1e-6),
        "lora": Arm(
            LoraConfig(r=16, lora_alpha=16, lora_dropout=0, target_modules=targets("llama", "attention")),  # q, k, v, o
            learning_rate=1e-5,
        ),
    },
    prompts=[
        {"kind": "coding", "prompt": "Write a Python function that returns the mean of a list of numbers."},
        {"kind": "question", "prompt": "Why is the sky blue?"},
    ],
    embedded={
        "model": "embedded:smollm2-135m-instruct",
        "dataset": {
            "path": "embedded:docstring-preferences",
            "test_split": None,
            "train": 160,
            "validation": 24,
            "test": 80,
        },
        "max_length": 128,
        "training": {"max_steps": 20, "eval_steps": 0.5},
        "prompts": [{"kind": "question", "prompt": "What does numpy.cumsum do?"}],
        "arms": {  # learning rates: benchmarks/learning_rates/smollm2-dpo-embedded.json, validation split, 12 steps
            "full": {"learning_rate": 3e-5},
            "lora": {"learning_rate": 1e-3},
        },
    },
)

if __name__ == "__main__":
    main(recipe)
