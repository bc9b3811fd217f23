"""Adapt an ImageNet model to rotated and noisy digits.

peft-recipes compare vision-shift --embedded --arms full,head,lora
python recipes/vision_shift.py --arm lora
"""

from peft import LoraConfig

from peft_recipes import Arm, Dataset, Recipe, main, targets

recipe = Recipe(
    name="vision-shift",
    title="An ImageNet model adapted to turned and noisy digits",
    task="image-classification",
    model="google/efficientnet-b0",
    dataset=Dataset(
        "ylecun/mnist",
        labels=[str(digit) for digit in range(10)],
        train=800,
        validation=1_000,
        test=5_000,
        test_split="test",
        transform={"rotation": 45, "noise": 0.15},
        image_size=64,
    ),
    evaluate_also={"clean": {"transform": None}},
    training={"num_train_epochs": 5, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 128},
    arms={
        "full": Arm(learning_rate=3e-3),
        "head": Arm("head", learning_rate=3e-3),
        "lora": Arm(
            LoraConfig(r=8, lora_alpha=16, target_modules=targets("efficientnet", "convolutions")), learning_rate=3e-3
        ),
    },
    embedded={
        "model": "embedded:efficientnet-lite0",
        "dataset": {"path": "embedded:mnist", "train": 800, "validation": 200, "test": 1_200, "test_split": None},
    },
)

if __name__ == "__main__":
    main(recipe)
