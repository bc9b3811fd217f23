# /// script
# requires-python = ">=3.10"
# dependencies = ["peft_recipes[embedded]>=0.1.0"]
# ///
"""Fine-tune DistilBERT to classify IMDB film reviews as positive or negative: 5,000 reviews, 128 tokens, 2 epochs.

    peft-recipes compare distilbert-imdb
    python recipes/distilbert_imdb.py --arm lora
    accelerate launch recipes/distilbert_imdb.py --arm lora

With --embedded: all-MiniLM-L6-v2 rewritten as a DistilBERT, and 800 docstrings classified by the library they
document (6 classes). benchmarks/learning_rates/distilbert-imdb-embedded.json has the learning rates tried for it and
the validation accuracies: 0.82 for full, 0.83 for head, 0.84 for lora. recipes/plain_loop.py is the same comparison
in plain PEFT and transformers.
"""

from peft import LoraConfig

from peft_recipes import Arm, Dataset, Recipe, main, targets

recipe = Recipe(
    name="distilbert-imdb",
    title="DistilBERT on IMDB reviews",
    task="text-classification",
    model="distilbert/distilbert-base-uncased",
    dataset=Dataset(
        "stanfordnlp/imdb",
        labels=["neg", "pos"],
        train=5_000,
        validation=500,
        test=1_000,
        test_split="test",
        seed=42,  # IMDB's rows are sorted by label
    ),
    # No evaluate_also: with a new head there is no accuracy before tuning, so forgetting can't be measured.
    max_length=128,
    training={
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 32,
        "train_sampling_strategy": "group_by_length",  # less padding
    },
    arms={
        "full": Arm(learning_rate=5e-5),
        "head": Arm("head", learning_rate=1e-3),
        "lora": Arm(
            LoraConfig(r=16, lora_alpha=16, target_modules=targets("distilbert", "attention")),  # q, k, v, out
            learning_rate=5e-4,
        ),
    },
    embedded={
        "model": "embedded:distilbert-minilm-l6",
        "dataset": {
            "path": "embedded:docstring-topics",
            "labels": None,
            "train": 800,
            "validation": 150,
            "test": 400,
            "test_split": None,
        },
        "arms": {  # learning rates: benchmarks/learning_rates/distilbert-imdb-embedded.json, on the validation split
            "full": {"learning_rate": 1e-4},
            "head": {"learning_rate": 2e-2},
            "lora": {"learning_rate": 3e-3},
        },
    },
)

if __name__ == "__main__":
    main(recipe)
