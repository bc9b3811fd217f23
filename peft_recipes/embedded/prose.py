"""Extract the plain English that opens a docstring."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator

_HEADING = re.compile(  # of a section: the prose ends here
    r"(parameters?|args?|arguments|keyword arg(ument)?s?|returns?|yields?|raises?|examples?|notes?|see also|"
    r"references?|attributes|inputs?|outputs?|shape|warnings?|explanation|usage|methods|todo|options)\s*:{0,2}",
    re.IGNORECASE,
)
_UNDERLINE = re.compile(r"\s*[=\-~^*]{3,}\s*")
_SIGNATURE = re.compile(r"[\w.]+\s*\(.*\)(\s*-[->].*)?", re.DOTALL)
# an indented line, code, a directive, an entry of a list or table, a field (`:param x:`, but no role like :class:`X`)
_NOT_PROSE = re.compile(r"\s|>>>|\.\. |@|[-*+] |\d+[.)] |\||\S+\s+-- |:(?![a-z:]+:`)")
_MARKUP = (
    (re.compile(r":[a-z:]+:`[~!]?([^`<]*?)(?:\s*<[^>`]*>)?`"), r"\1"),  # :func:`~torch.add`
    (re.compile(r"``([^`]*)``"), r"\1"),
    (re.compile(r"`([^`<]*?)\s*<[^>`]*>`_{0,2}"), r"\1"),  # `text <address>`_
    (re.compile(r"`([^`]*)`_{0,2}"), r"\1"),
    (re.compile(r"\*\*([^*\s][^*]*)\*\*|(?<!\w)\*([^*\s][^*]*)\*(?!\w)"), r"\1\2"),
    (re.compile(r"\s?\[\w+\]_"), ""),  # [1]_
    (re.compile(r"\s+"), " "),
)


def prose(docstring: str, enough: int = 160, most: int = 600) -> str:
    """Return the opening sentences of a docstring without markup in one line; empty if there are none.

    Takes complete paragraphs up to `enough` characters, cut at the end of a sentence within `most` characters.
    """
    text = ""
    for paragraph in _paragraphs(docstring):
        text = f"{text} {paragraph}".strip()
        if len(text) >= enough:
            break
    if len(text) > most or text.endswith(":"):  # the list after a colon is not included
        text = text[: max(text.rfind(mark, 0, most) for mark in (". ", "! ", "? ")) + 1]
    return text if _reads_like_english(text) else ""


def key_of(text: str) -> str:
    """Return a key that two texts share if they differ only in case, digits and punctuation."""
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def _paragraphs(docstring: str) -> Iterator[str]:
    for number, block in enumerate(re.split(r"\n\s*\n", inspect.cleandoc(docstring))):
        lines = block.strip("\n").split("\n")
        if len(lines) > 1 and _UNDERLINE.fullmatch(lines[1]):
            if number:
                return  # the title of a section
            lines = lines[2:]  # the docstring's own title
        sentence = " ".join(line.strip() for line in itertools.takewhile(_is_prose, lines))
        if not sentence and number:
            return  # code, a list or a table, and the text that belongs to it
        if not sentence or _SIGNATURE.fullmatch(sentence):
            continue
        for pattern, plain in _MARKUP:
            sentence = pattern.sub(plain, sentence)
        if len(sentence) > 1:
            yield sentence if sentence[-1] in ".!?:;," else f"{sentence}."
        if sentence.endswith(":") or len(sentence) < len(" ".join(lines)) / 2:
            return  # followed by a table or code


def _is_prose(line: str) -> bool:
    """Whether a line is not indented, an underline, a list entry or a heading."""
    return not (_NOT_PROSE.match(line) or _UNDERLINE.fullmatch(line) or _HEADING.fullmatch(line.strip()))


def _reads_like_english(text: str) -> bool:
    words = re.findall(r"[A-Za-z]{2,}", text)
    plain = sum(character.isalpha() or character in " ,.'" for character in text)
    coded = re.search(r"[{}%\\$]|::|>>>|https?:|---", text)
    return len(words) >= 6 and plain >= 0.9 * len(text) and text[0].isalpha() and not coded
