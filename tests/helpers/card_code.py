"""The Python code of a model card, as a reader would copy it."""

from __future__ import annotations

import re


def code_in(card: str) -> str:
    """Return the code of the card's first Python block."""
    return re.search(r"^(`{3,})python\n(.*?)^\1$", card, re.DOTALL | re.MULTILINE)[2]
