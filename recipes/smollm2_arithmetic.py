# /// script
# requires-python = ">=3.10"
# dependencies = ["peft_recipes[embedded]>=0.1.0"]
# ///
"""Teach SmolLM2-135M-Instruct to solve word problems, and compare the arms by their share of right answers.

    peft-recipes compare smollm2-arithmetic --set training.max_steps=200
    python recipes/smollm2_arithmetic.py --arm lora
    accelerate launch recipes/smollm2_arithmetic.py --arm lora

An answer is right if its last number is that of the reference, as GSM8K is scored.

With --embedded: the same model from its 4-bit GGUF, and problems of two operations made from templates; those of test
have other texts and other numbers than those of train. What to expect: adapters/smollm2-arithmetic/comparison.md.
"""

from peft import LoraConfig

from peft_recipes import Arm, Dataset, Recipe, main, targets

recipe = Recipe(
    name="smollm2-arithmetic",
    title="SmolLM2-135M-Instruct on word problems",
    task="sft",
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    dataset=Dataset(
        "openai/gsm8k",
        name="main",
        prompt="question",
        completion="answer",
        test_split="test",
        validation=100,
        test=200,
    ),
    metric="number",
    max_length=384,
    training={
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "eval_strategy": "steps",
        "eval_steps": 0.25,  # four times per run
    },
    arms={
        "full": Arm(learning_rate=2e-5),
        "lora": Arm(
            LoraConfig(r=16, lora_alpha=16, lora_dropout=0, target_modules=targets("llama", "attention")),  # q, k, v, o
            learning_rate=2e-4,
        ),
        "lora-all": Arm(
            LoraConfig(r=16, lora_alpha=16, lora_dropout=0, target_modules=targets("llama", "all-linear")),
            learning_rate=2e-4,
        ),
    },
    prompts=[
        {"kind": "problem", "prompt": "Tom has 3 boxes with 12 eggs each. He drops 5 eggs. How many eggs are whole?"},
        {"kind": "question", "prompt": "Why is the sky blue?"},
    ],
    embedded={
        "model": "embedded:smollm2-135m-instruct",
        "dataset": {"path": "embedded:arithmetic", "name": None, "train": 1_000, "validation": 40, "test": 200},
        "max_length": 128,
        "training": {"max_steps": 120},
        "arms": {  # full, lora: benchmarks/learning_rates/smollm2-arithmetic-embedded-scan.json, validation split
            "full": {"learning_rate": 1e-4},
            "lora": {"learning_rate": 2e-3},
            "lora-all": {"learning_rate": 1e-3},
        },
    },
)

if __name__ == "__main__":
    main(recipe)
