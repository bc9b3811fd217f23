# /// script
# requires-python = ">=3.10"
# dependencies = ["peft_recipes[embedded]>=0.1.0"]
# ///
"""Fine-tune DistilBERT on pairs of sentences: whether two say the same (MRPC of GLUE), 3,300 pairs, 3 epochs.

    peft-recipes compare distilbert-pairs
    python recipes/distilbert_pairs.py --arm lora
    accelerate launch recipes/distilbert_pairs.py --arm lora

With --embedded: all-MiniLM-L6-v2 rewritten as a DistilBERT, and 1,200 pairs of an object's name and a paragraph:
whether it is of that object's docstring or of another's in the same library. Neither text alone gives the answer away.
"""

from peft import LoraConfig

from peft_recipes import Arm, Dataset, Recipe, main, targets

recipe = Recipe(
    name="distilbert-pairs",
    title="DistilBERT on sentence pairs (MRPC)",
    task="text-classification",
    model="distilbert/distilbert-base-uncased",
    dataset=Dataset(
        "nyu-mll/glue",
        name="mrpc",
        text=["sentence1", "sentence2"],
        labels=["not_equivalent", "equivalent"],
        validation=368,  # of train: GLUE's own validation split is the test split here, its test labels are hidden
        test=None,
        test_split="validation",
    ),
    max_length=128,
    training={
        "num_train_epochs": 3,
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
            "path": "embedded:docstring-pairs",
            "name": None,
            "text": ["object", "paragraph"],
            "labels": None,
            "train": 1_200,
            "validation": 240,
            "test": 600,
            "validation_split": "validation",
            "test_split": "test",
        },
        "max_length": 64,
        # Learning rates by validation loss:
        # peft-recipes scan distilbert-pairs --embedded --arms full --learning-rates 5e-5,1e-4,2e-4,4e-4 --budget 4m
        # and the same with --arms head,lora --learning-rates 1e-3,3e-3,1e-2,3e-2
        "arms": {
            "full": {"learning_rate": 1e-4},
            "head": {"learning_rate": 3e-3},
            "lora": {"learning_rate": 3e-3},
        },
    },
)

if __name__ == "__main__":
    main(recipe)
