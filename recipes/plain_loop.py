# /// script
# requires-python = ">=3.10"
# dependencies = ["peft_recipes[embedded]>=0.1.0"]
# ///
"""Full fine-tuning against LoRA in plain PEFT and transformers, as `peft-recipes compare distilbert-imdb` automates it.

    python recipes/plain_loop.py                # DistilBERT on IMDB, from the Hub
    python recipes/plain_loop.py --embedded     # on stand-ins that need no Hub

Not a recipe: read it to see what a recipe does. It prints test accuracy, trained parameters and training seconds of
both arms. A recipe adds several seeds, a confidence interval and a verdict, learning rates from a scan, peak memory,
guards, resuming and a model card.
"""

import argparse
import time

from datasets import ClassLabel, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="distilbert/distilbert-base-uncased", help="a DistilBERT: Hub id or folder")
    parser.add_argument(
        "--dataset", default="stanfordnlp/imdb", help="Hub id, or a csv with the columns text and label"
    )
    parser.add_argument(
        "--examples", type=int, default=6_000, help="three quarters for training, a quarter for testing"
    )
    parser.add_argument("--max-steps", type=int, default=-1, help="optimizer steps (default: 2 epochs)")
    parser.add_argument("--output", default="runs/plain-loop", help="where the models are saved")
    parser.add_argument("--embedded", action="store_true", help="use the stand-in model and data, which need no Hub")
    args = parser.parse_args(argv)

    # Each arm has its own learning rate: LoRA's best is about ten times that of full fine-tuning.
    learning_rates = {"full": 5e-5, "lora": 5e-4}
    if args.embedded:
        from peft_recipes.embedded.stand_ins import dataset, model_folder

        args.model, data = model_folder("distilbert-minilm-l6"), dataset("docstring-topics")["train"]
        learning_rates, args.examples = {"full": 1e-4, "lora": 3e-3}, min(args.examples, 1_200)
    elif args.dataset.endswith(".csv"):
        data = load_dataset("csv", data_files=args.dataset, split="train")
    else:
        data = load_dataset(args.dataset, split="train")

    # Both arms are trained and tested on the same examples.
    if not isinstance(data.features["label"], ClassLabel):
        data = data.class_encode_column("label")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = data.shuffle(seed=42).select(range(min(args.examples, len(data))))
    data = data.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=128), batched=True)
    splits = data.train_test_split(test_size=0.25, seed=42)

    for arm, learning_rate in learning_rates.items():
        set_seed(0)  # the same new head for both arms
        model = AutoModelForSequenceClassification.from_pretrained(
            args.model, num_labels=data.features["label"].num_classes
        )
        if arm == "lora":
            config = LoraConfig(
                r=16,
                lora_alpha=16,
                target_modules=["q_lin", "k_lin", "v_lin", "out_lin"],
                # The head is new: without this it would not be saved, and be random after a reload.
                modules_to_save=["pre_classifier", "classifier"],
            )
            model = get_peft_model(model, config)
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=f"{args.output}/{arm}",
                learning_rate=learning_rate,
                num_train_epochs=2,
                max_steps=args.max_steps,
                per_device_train_batch_size=16,
                train_sampling_strategy="group_by_length",  # less padding
                seed=0,  # the same order of examples for both arms
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=splits["train"],
            eval_dataset=splits["test"],
            processing_class=tokenizer,  # pads each batch to its longest example
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        accuracy = trainer.evaluate()["eval_accuracy"]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{arm}: test accuracy {accuracy:.3f}, {trained:,} trained parameters, {seconds:.1f} seconds of training")
        trainer.save_model()  # for LoRA the adapter and the head alone


if __name__ == "__main__":
    main()
