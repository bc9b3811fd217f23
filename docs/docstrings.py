"""A griffe extension: "name: what it is." in a docstring becomes a list with one item per parameter or field.

Docstrings in the code are plain text, read as such in an editor. mkdocs.yml names this file under the handler's
`extensions`.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_RAISES = re.compile(r"(?<=[.\s])(Raises? [A-Z]\w+)")


class ParameterLists(griffe.Extension):
    """Rewrites the docstrings of functions and dataclasses before they are rendered."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        self._rewrite(func, [parameter.name for parameter in func.parameters])

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        self._rewrite(cls, [name for name, member in cls.members.items() if member.is_attribute])

    def _rewrite(self, thing: griffe.Object, names: list[str]) -> None:
        if thing.docstring is not None and not re.search(r"^(Args|Attributes|Raises):", thing.docstring.value, re.M):
            thing.docstring.value = as_list(thing.docstring.value, names)


def as_list(docstring: str, names: list[str]) -> str:
    """The docstring with each "name: ..." (or "name, other: ...") of `names` as an item of a Markdown list."""
    found = sections(docstring, names)
    if not found:
        return docstring
    lines = [docstring[: found[0][2]].rstrip(), ""]
    for number, (named, text, _) in enumerate(found):
        last = number == len(found) - 1
        text, after = _cut(text) if last else (text, "")
        lines.append(f"- {', '.join(f'**`{name}`**' for name in named)}: {' '.join(text.split())}")
        if after:
            lines += ["", after]
    return "\n".join(lines)


def sections(docstring: str, names: list[str]) -> list[tuple[list[str], str, int]]:
    """(names, what the docstring says about them, where that begins), in the order of the docstring."""
    if not names:
        return []
    one = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    starts = list(re.finditer(rf"(?:(?<=^)|(?<=[.)]\s)|(?<=\n))\s*((?:{one})(?:,\s(?:{one}))*):\s", docstring))
    ends = [*(start.start() for start in starts), len(docstring)][1:]
    return [
        (re.split(r",\s", start[1]), docstring[start.end() : end], start.start(1))
        for start, end in zip(starts, ends, strict=True)
    ]


def _cut(text: str) -> tuple[str, str]:
    """The last item, and what follows it and is about the whole: a new paragraph, or what is raised."""
    paragraph = re.search(r"\n\s*\n", text)
    raises = _RAISES.search(text)
    ends = [match.start() for match in (paragraph, raises) if match]
    end = min(ends, default=len(text))
    return text[:end].strip(), text[end:].strip()
