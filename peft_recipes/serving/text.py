"""The text of an answer while its tokens arrive: no broken characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what a tokenizer decodes to while bytes of a character are missing


class TextStream:
    """Decodes tokens one by one. stopped: whether a stop string ended the text."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        # Tokens are decoded together with those before them: some tokenizers write a space between two only.
        self._context, self._decoded = 0, 0
        self._held = ""  # text that may become a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token. Returns the text that is certain by now and was not returned before."""
        self._tokens.append(token)
        return self._release(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """Return the rest of the text."""
        return self._release(self._new_text(final=True), final=True)

    def _new_text(self, final: bool) -> str:
        before = self._decode(self._tokens[self._context : self._decoded])
        text = self._decode(self._tokens[self._context :])
        if len(text) <= len(before) or (text.endswith(_INCOMPLETE) and not final):
            return ""
        self._context, self._decoded = self._decoded, len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _release(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
