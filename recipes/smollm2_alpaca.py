# /// script
# requires-python = ">=3.10"
# dependencies = ["peft_recipes[benchmarks,embedded]>=0.1.0"]
# ///
"""Instruction-tune SmolLM2-135M-Instruct on Alpaca, in its own chat template, with the loss on the answers only.

    peft-recipes compare smollm2-alpaca --set training.max_steps=60
    python recipes/smollm2_alpaca.py --arm lora
    accelerate launch recipes/smollm2_alpaca.py --arm lora

Base and arms answer the test instructions; they are compared by ROUGE-L, and by what they forgot of plain English and
of a benchmark, which needs the extra `benchmarks` (or --set benchmarks=[]).

With --embedded: the same model from its 4-bit GGUF, 1,000 questions about docstrings, and 60 steps.
"""

from peft import LoraConfig

from peft_recipes import Arm, Dataset, Recipe, main, targets

recipe = Recipe(
    name="smollm2-alpaca",
    title="SmolLM2-135M-Instruct on Alpaca",
    task="sft",
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    dataset=Dataset("tatsu-lab/alpaca", train=5_000, validation=100, test=200),
    evaluate_also={  # forgetting: the loss on plain English, on every token
        "plain": {
            "path": "Salesforce/wikitext",
            "name": "wikitext-2-raw-v1",
            "text": "text",
            "format": "text",
            "test_split": "test",
            "test": 100,
        }
    },
    benchmarks=["arc_easy"],  # what is forgotten
    metric="rougeL",
    generation={"max_new_tokens": 128},
    max_length=256,
    training={
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
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
        {"kind": "coding", "prompt": "Write a Python function that returns the mean of a list of numbers."},
        {"kind": "question", "prompt": "Why is the sky blue?"},
        {
            "kind": "summary",
            "prompt": "Summarize in one sentence: The library was built in 1904. A fire destroyed its roof in 1951, "
            "and the town rebuilt it within two years. Today it holds sixty thousand books and lends tools as well.",
        },
    ],
    embedded={
        "model": "embedded:smollm2-135m-instruct",
        "dataset": {"path": "embedded:docstring-questions", "train": 1_000, "validation": 40, "test": 120},
        "evaluate_also": {"plain": {"path": "embedded:docstring-text", "name": None, "test": 40}},
        "generation": {"max_new_tokens": 64},
        "benchmarks": ["embedded:docstring-choices"],
        "max_length": 128,
        "training": {"max_steps": 60},
        "arms": {  # full, lora: benchmarks/learning_rates/smollm2-alpaca-embedded-scan.json, validation split
            "full": {"learning_rate": 1e-4},
            "lora": {"learning_rate": 3e-3},
            "lora-all": {"learning_rate": 1e-3},
        },
    },
)

if __name__ == "__main__":
    main(recipe)
