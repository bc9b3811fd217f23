"""Remove credentials from text and data before a tracker, a file or the terminal gets them."""

from __future__ import annotations

import os
import re
import textwrap
from typing import Any

_IN_URL = re.compile(r"(\w+://)[^/\s@'\"]*@")
_QUERY = re.compile(r"([?&][\w-]*(?:token|key|password|secret|signature|sig)=)[^&\s'\"]+", re.IGNORECASE)
_SECRET_NAMES = re.compile(r"_(?:API_?KEY|TOKEN|PASSWORD|SECRET\w*)$|^WANDB_API_KEY$|^HF_TOKEN$", re.IGNORECASE)
_LONGEST = 200  # characters of an error that are shown
_SHORTEST = 8  # a shorter value may be an ordinary word of the text


def scrubbed(data: Any) -> Any:
    """Return text or JSON data without the credentials of URLs, and without the values of secret variables."""
    if isinstance(data, dict):
        return {key: scrubbed(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [scrubbed(value) for value in data]
    if not isinstance(data, str):
        return data
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _SECRET_NAMES.search(name):
            data = data.replace(value, "***")
    return _QUERY.sub(r"\1***", _IN_URL.sub(r"\1", data))


def one_line(error: BaseException) -> str:
    """The first words of an error, without credentials and without a full stop."""
    text = scrubbed(" ".join(str(error).split()) or type(error).__name__)
    return (
        textwrap.shorten(text, _LONGEST, placeholder=" ...").rstrip(".") if len(text) > _LONGEST else text.rstrip(".")
    )
