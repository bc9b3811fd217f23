"""The tokenizer of an export: the adapter's own, with a chat template that servers can read."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

from peft_recipes.exporting.subject import Subject
from peft_recipes.exporting.templates import servable_template


def save_tokenizer(subject: Subject, folder: Path) -> None:
    """Save the tokenizer of an adapter (its own, else its base's) into a folder."""
    tokenizer = copy.copy(subject.tokenizer)
    tokenizer.chat_template = servable_template(tokenizer.chat_template)
    tokenizer.save_pretrained(folder)
    if subject.opened is not None and (subject.folder / "tokenizer.model").is_file():
        shutil.copy(subject.folder / "tokenizer.model", folder / "tokenizer.model")
