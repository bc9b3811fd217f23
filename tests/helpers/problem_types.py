"""A pair, a multi-label and a regression data set in GLUE's shapes, and recipes of a tiny base that learn them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from small import BAD, FILLER, GOOD, sentences, tokenizer

KINDS = ("pairs", "several", "number")
METRIC = {"pairs": "mcc", "several": "micro_f1", "number": "pearson"}
_LABEL = {"pairs": "label", "several": "labels", "number": "score"}
NAMES = ("bad", "film", "good")


def rows(kind: str, count: int = 72) -> list[dict]:
    """pairs: whether both texts are of one mood. several: which of three topics a text has. number: its good words."""
    draw, made = random.Random(1), []
    texts = [text for text, _ in sentences(2 * count, seed=5)]
    moods = [label for _, label in sentences(2 * count, seed=5)]
    for i in range(count):
        if kind == "pairs":
            other = 2 * i + 1 if i % 2 else (2 * i + 2) % (2 * count)
            made.append({"sentence1": texts[2 * i], "sentence2": texts[other],
                         "label": int(moods[2 * i] == moods[other]), "idx": i})  # fmt: skip
        elif kind == "several":
            groups = dict(zip(NAMES, (BAD, ["film", "saw"], GOOD), strict=True))
            words = draw.sample(FILLER, 4) + [draw.choice(group) for group in (GOOD, BAD) if draw.random() < 0.5]
            labels = [name for name, group in groups.items() if set(group) & set(words)]
            made.append({"text": " ".join(words), "labels": labels})
        else:
            good = draw.randint(0, 4)
            words = draw.sample(GOOD, good) + draw.sample(BAD, 4 - good) + draw.sample(FILLER, 2)
            draw.shuffle(words)
            made.append({"text": " ".join(words), "score": good + 0.25 * (i % 3)})
    return made


def write_rows(kind: str, folder: Path, **options) -> Path:
    path = folder / f"{kind}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows(kind, **options)) + "\n")
    return path


def pair_tokenizer():
    """The words' tokenizer with BERT's template: <eos> first and between, and token_type_ids."""
    from tokenizers.processors import TemplateProcessing

    words = tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", pair="<eos> $A <eos> $B:1 <eos>:1", special_tokens=[("<eos>", words.eos_token_id)]
    )
    words.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return words


def save_base(kind: str, folder: Path) -> Path:
    """A tiny BERT or DistilBERT without dropout, with `pair_tokenizer`."""
    import transformers
    from small import tiny_config

    words = pair_tokenizer()
    transformers.set_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
        )  # fmt: skip
    else:
        config = tiny_config("distilbert", len(words))
        config.dropout = config.attention_dropout = config.seq_classif_dropout = 0.0
    shutil.rmtree(folder, ignore_errors=True)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def recipe_of(kind: str, data: Path, base: Path, architecture: str = "distilbert", **training):
    """A recipe that learns one of `KINDS` in a second."""
    from peft import LoraConfig

    from peft_recipes import Arm, Dataset, Recipe, targets

    columns = {"text": ["sentence1", "sentence2"]} if kind == "pairs" else {}
    return Recipe(
        name=kind, task="text-classification", model=str(base), metric=METRIC[kind], max_length=24,
        dataset=Dataset(str(data), label=_LABEL[kind], train=40, validation=12, test=20, **columns),
        training={"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
                  "use_cpu": True, "bf16": False, **training},
        arms={"full": Arm(learning_rate=2e-3), "head": Arm("head", learning_rate=1e-2),
              "lora": Arm(LoraConfig(r=4, target_modules=targets(architecture, "attention")), learning_rate=1e-2)},
        threads=1,
    )  # fmt: skip
