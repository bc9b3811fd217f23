"""Rows read by each format, with the number of rows that were left out for each reason."""

from __future__ import annotations

import dataclasses
from collections import Counter

from peft_recipes.data import input_target, preferences, prompts, supervised, unpaired
from peft_recipes.data.shapes import detect
from peft_recipes.data.skipped import SkippedRows


def _read(function, rows, source, *arguments):
    skipped = SkippedRows(dataclasses.replace(source, skip_rows=0.99), "train", len(rows))
    made = function(rows, source, *arguments, skipped)
    return made, Counter({reason: len(ids) for reason, ids in skipped.reasons.items()})


def sft_rows(rows, source, chat):
    return _read(
        lambda *arguments: supervised.sft_rows(rows, source, detect(rows, source), *arguments[2:]), rows, source, chat
    )


def preference_rows(rows, source, chat):
    return _read(preferences.preference_rows, rows, source, chat)


def unpaired_rows(rows, source, chat):
    return _read(unpaired.unpaired_rows, rows, source, chat)


def prompt_rows(rows, source, chat, references):
    return _read(prompts.prompt_rows, rows, source, chat, references)


def input_target_rows(rows, source):
    return _read(input_target.input_target_rows, rows, source)
