# /// script
# requires-python = ">=3.10"
# dependencies = ["peft_recipes[embedded]>=0.1.0"]
# ///
"""Continue pretraining GPT-2 on Python code, and measure how much plain English it forgets: 5,000 examples, 1 epoch.

    peft-recipes compare gpt2-code
    python recipes/gpt2_code.py --arm lora
    accelerate launch recipes/gpt2_code.py --arm lora

With --embedded: a small GPT-2 pretrained on docstrings for about a minute, and 500 functions of the standard library.
benchmarks/learning_rates/gpt2-code-embedded.json has the learning rates tried for it and the validation losses: 5.01
for full, 5.75 for lora, 5.96 for lora-c-attn.
"""

from peft import LoraConfig

from peft_recipes import Arm, Dataset, Recipe, main, targets


def lora(target_modules: list[str]) -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=target_modules)


recipe = Recipe(
    name="gpt2-code",
    title="GPT-2 on Python code",
    task="language-modeling",
    model="openai-community/gpt2",
    dataset=Dataset("flytech/python-codes-25k", text="output", train=5_000, validation=200, test=500),
    evaluate_also={  # forgetting: the loss on plain English
        "plain": {
            "path": "Salesforce/wikitext",
            "name": "wikitext-2-raw-v1",
            "text": "text",
            "test_split": "test",
            "test": 200,
        }
    },
    max_length=256,
    training={
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "eval_strategy": "steps",
        "eval_steps": 0.25,  # four times per run
    },
    arms={
        "full": Arm(learning_rate=5e-5),
        "lora": Arm(lora([*targets("gpt2", "attention"), "mlp.c_proj"]), learning_rate=5e-4),  # every c_attn and c_proj
        "lora-c-attn": Arm(lora(["attn.c_attn"]), learning_rate=5e-4),
    },
    prompts=[
        {"kind": "coding", "prompt": "def mean(values):\n"},
        {"kind": "coding", "prompt": "def read_lines(path):\n"},
    ],
    embedded={
        "model": "embedded:gpt2-docstrings",
        "dataset": {
            "path": "embedded:stdlib-functions",
            "text": "text",
            "train": 500,
            "validation": 50,
            "test": 200,
        },
        "evaluate_also": {"plain": {"path": "embedded:docstring-text", "name": None, "test": 100}},
        "arms": {  # learning rates: benchmarks/learning_rates/gpt2-code-embedded.json, on the validation split
            "full": {"learning_rate": 1e-3},
            "lora": {"learning_rate": 1e-2},
            "lora-c-attn": {"learning_rate": 1e-2},
        },
    },
)

if __name__ == "__main__":
    main(recipe)
