"""Rows that can't be used: left out up to a share of their split, counted by reason, listed with their ids."""

from __future__ import annotations

from peft_recipes.errors import RecipeError
from peft_recipes.recipe.dataset import Dataset

EMPTY, NO_PROMPT, ENDS_WITHOUT = "an empty answer", "no prompt", "no answer of the assistant at its end"
_LISTED = 10  # ids in a note


class SkippedRows:
    """The rows of one split that are left out. total: the rows of the split."""

    def __init__(self, source: Dataset, split: str, total: int):
        self.source, self.split, self.total = source, split, total
        self._rows: dict[str, list[str]] = {}
        self.blank = 0  # rows without a text, of data where that is usual: any number may be left out

    def add(self, row: str, reason: str) -> None:
        """Leave out a row. reason: completes "row 3 has", such as "an empty answer"."""
        self._rows.setdefault(reason, []).append(row)

    @property
    def reasons(self) -> dict[str, list[str]]:
        """The ids of the rows that are left out for each reason, in the order of the data."""
        return {reason: sorted(rows, key=lambda row: (len(row), row)) for reason, rows in self._rows.items()}

    def check(self) -> None:
        """Raise RecipeError, with the first three rows, if more are left out than `dataset.skip_rows` allows.

        One row always may, so that small files do not fail for one of them.
        """
        count = sum(map(len, self.reasons.values()))
        if count <= max(1, int(self.source.skip_rows * self.total + 1e-9)) and count < self.total:
            return
        shown = [f"row {row} has {reason}" for reason, rows in self.reasons.items() for row in rows[:3]][:3]
        if count == self.total:
            what_to_do = "No row is left."
        else:
            share = -(-100 * count // self.total) / 100
            what_to_do = f"Correct them, or leave them out: --set dataset.skip_rows={share:g}."
        if "chat template" in shown[0]:
            what_to_do += " Or name another template: --set dataset.chat_template=chatml (or a file with a Jinja one)."
        raise RecipeError(
            f"dataset '{self.source.path}': {count} of {self.total} rows of '{self.split}' can't be used: "
            f"{'; '.join(shown)}{', ...' if count > len(shown) else ''}. {what_to_do}"
        )

    def notes(self) -> list[str]:
        """A line for each reason, with the number of rows and the ids of the first ones."""
        lines = [f"{self.blank} {self.split} rows without a text were left out."] if self.blank else []
        for reason, rows in self.reasons.items():
            listed = ", ".join(rows[:_LISTED]) + (", ..." if len(rows) > _LISTED else "")
            one = len(rows) == 1
            lines.append(
                f"{len(rows)} {self.split} row{'' if one else 's'} {'was' if one else 'were'} left out: "
                f"{reason} ({listed})."
            )
        return lines
