"""SmolLM2-135M-Instruct follows instructions: Alpaca in the model's own chat template, the loss on the answers.

peft-recipes compare smollm2-alpaca --set training.max_steps=60
python recipes/smollm2_alpaca.py --arm lora
accelerate launch recipes/smollm2_alpaca.py --arm lora
"""

from peft import LoraConfig

from peft_recipes import Arm, Dataset, Recipe, main, targets

recipe = Recipe(
    name="smollm2-alpaca",
    title="SmolLM2-135M-Instruct on Alpaca",
    task="sft",
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    dataset=Dataset("tatsu-lab/alpaca", train=5_000, validation=100, test=200),
    evaluate_also={  # what tuning on instructions makes the model forget: plain English, the loss on every token
        "plain": {
            "path": "Salesforce/wikitext",
            "name": "wikitext-2-raw-v1",
            "text": "text",
            "format": "text",
            "test_split": "test",
            "test": 100,
        }
    },
    max_length=256,
    training={
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "eval_strategy": "steps",
        "eval_steps": 0.25,  # four times a run
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
        "dataset": {"path": "embedded:docstring-questions", "train": 1_000, "validation": 8, "test": 40},
        "evaluate_also": {"plain": {"path": "embedded:docstring-text", "name": None, "test": 40}},
        "max_length": 128,
        "training": {"max_steps": 10, "eval_steps": 0.5},
        "arms": {  # rates: benchmarks/learning_rates/smollm2-alpaca-embedded-scan.json, on the validation split
            "full": {"learning_rate": 1e-4},
            "lora": {"learning_rate": 1e-2},
            "lora-all": {"learning_rate": 1e-3},
        },
    },
)

if __name__ == "__main__":
    main(recipe)
