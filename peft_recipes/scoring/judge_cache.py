"""judgements.jsonl: a judge's replies by question, so that no question is asked twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from peft_recipes.recipe.judge import Judge

FILE = "judgements.jsonl"  # in the comparison's folder


class Replies:
    """The replies of one judge in a folder. A line is appended for each, so that a killed comparison keeps them."""

    def __init__(self, folder: Path, judge: Judge):
        self.path, self.judge = folder / FILE, judge
        self._replies: dict[str, str] = {}
        if self.path.is_file():
            self._read()

    def __contains__(self, question: str) -> bool:
        return self._key(question) in self._replies

    def __getitem__(self, question: str) -> str:
        return self._replies[self._key(question)]

    def add(self, question: str, reply: str) -> None:
        """Store a reply, on disk as well."""
        key = self._key(question)
        self._replies[key] = reply
        line = json.dumps({"key": key, "judge": self.judge.model, "reply": reply}, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def _read(self) -> None:
        """Read the lines that are complete; a line that was cut short is ended, so that the next one starts anew."""
        text = self.path.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                self._replies[entry["key"]] = str(entry["reply"])
        if text and not text.endswith("\n"):
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def _key(self, question: str) -> str:
        """A hash of the judge, how it is asked, and the question: prompt, template, both answers, their order."""
        judge = self.judge
        asked = [judge.model, judge.base_url, judge.max_new_tokens, judge.options, question]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]
