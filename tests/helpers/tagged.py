"""Tagged sentences for token classification, and small bases whose tokenizers cut words into pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig
from small import BAD, GOOD, sentences, tiny_config

from peft_recipes import Arm, Dataset, Recipe, targets

TAGS = ["O", "B-BAD", "I-BAD", "B-GOOD", "I-GOOD"]


def tags_of(words: list[str]) -> list[str]:
    """BIO tags of a sentence: runs of good and of bad words are entities."""
    kinds = ["GOOD" if word in GOOD else "BAD" if word in BAD else None for word in words]
    return [
        "O" if kind is None else f"{'I' if i and kinds[i - 1] == kind else 'B'}-{kind}" for i, kind in enumerate(kinds)
    ]


def tagged(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in CoNLL's shape, of unequal length: `tokens` and `ner_tags`."""
    texts = [text.split()[: 3 + i % 4] for i, (text, _) in enumerate(sentences(count, seed))]
    return [{"tokens": words, "ner_tags": tags_of(words)} for words in texts]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as jsonl."""
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def without_dropout(base: Path, folder: Path) -> Path:
    """Copy a base without its dropout; a Llama's new head has one, too."""
    import shutil

    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tag_recipe(base: Path, data: Path, kind: str = "distilbert", **changes: Any) -> Recipe:
    """A recipe that runs in two seconds, with the arms full, head and lora."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets(kind, "all-linear"))
    options = {
        "name": "tags",
        "task": "token-classification",
        "model": str(base),
        "dataset": Dataset(str(data), train=96, validation=24, test=40),
        "max_length": 32,
        "training": {"num_train_epochs": 4, "per_device_train_batch_size": 8, "use_cpu": True, "bf16": False},
        "arms": {
            "full": Arm(learning_rate=5e-3),
            "head": Arm("head", learning_rate=2e-2),
            "lora": Arm(lora, learning_rate=2e-2),
        },
    }
    return Recipe(**{**options, **changes})


def wordpiece():
    """A WordPiece tokenizer as BERT's, which cuts the words of the sentences into pieces of at most three letters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = sorted({word for row in tagged(200) for word in row["tokens"]})
    pieces = {word[:3] for word in words} | {f"##{word[i : i + 3]}" for word in words for i in range(3, len(word), 3)}
    vocabulary = {piece: i for i, piece in enumerate([*special, ",", ".", *sorted(pieces)])}
    own = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    own.normalizer = normalizers.BertNormalizer(lowercase=True)
    own.pre_tokenizer, own.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    own.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=own, **names, model_input_names=["input_ids", "attention_mask"], model_max_length=64
    )


def bytelevel():
    """A byte-level BPE as GPT-2's, for which a word with a space before it is another one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    own.train_from_iterator((" ".join(row["tokens"]) for row in tagged(200)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=own, eos_token="<eos>", model_input_names=["input_ids", "attention_mask"]
    )


def base_with(tokenizer: Any, kind: str, folder: Path, width: int = 32) -> Path:
    """Save a small random base with this tokenizer."""
    import transformers

    transformers.set_seed(0)
    transformers.AutoModel.from_config(tiny_config(kind, len(tokenizer), width)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
