# /// script
# requires-python = ">=3.10"
# dependencies = ["peft_recipes[embedded]>=0.1.0"]
# ///
"""Fine-tune GPT-2 to detect spam in text messages: 747 of each class, split 70/10/20, 5 epochs, batch size 8.

    peft-recipes compare gpt2-sms-spam
    python recipes/gpt2_sms_spam.py --arm lora
    accelerate launch recipes/gpt2_sms_spam.py --arm lora

With --embedded: a small GPT-2 pretrained on docstrings for about a minute, and 1,000 docstrings classified by the
library they document (6 classes). benchmarks/learning_rates/gpt2-sms-spam-embedded.json has the learning rates tried
for it and the validation accuracies: 0.72 for full, 0.36 for head, 0.63 for lora.
"""

from peft import LoraConfig

from peft_recipes import Arm, Dataset, Recipe, main, targets

recipe = Recipe(
    name="gpt2-sms-spam",
    title="GPT-2 on SMS spam",
    task="text-classification",
    model="openai-community/gpt2",
    dataset=Dataset(
        "ucirvine/sms_spam",
        text="sms",
        labels=["ham", "spam"],
        balance=True,  # 747 messages of each
        train=0.7,
        validation=0.1,
        test=0.2,
        seed=123,
    ),
    # No evaluate_also: with a new head there is no accuracy before tuning, so forgetting can't be measured.
    max_length=128,
    training={
        "num_train_epochs": 5,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "weight_decay": 0.1,
        "train_sampling_strategy": "group_by_length",  # less padding
    },
    arms={
        "full": Arm(learning_rate=5e-5),
        "head": Arm("head", learning_rate=1e-3),
        "lora": Arm(LoraConfig(r=16, lora_alpha=16, target_modules=targets("gpt2", "all-linear")), learning_rate=5e-4),
    },
    embedded={
        "model": "embedded:gpt2-docstrings",
        "dataset": {
            "path": "embedded:docstring-topics",
            "text": "text",
            "labels": None,
            "train": 1_000,
            "validation": 150,
            "test": 300,
        },
        "training": {"num_train_epochs": 3},
        "arms": {  # learning rates: benchmarks/learning_rates/gpt2-sms-spam-embedded.json, on the validation split
            "full": {"learning_rate": 3e-4},
            "head": {"learning_rate": 1e-3},
            "lora": {"learning_rate": 3e-3},
        },
    },
)

if __name__ == "__main__":
    main(recipe)
