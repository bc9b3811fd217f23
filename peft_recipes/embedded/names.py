"""Tagged sentences from docstrings: which words name a class, a function, a parameter or a value.

The tags come from the markup of the libraries' own authors (roles such as :class:`Tensor`, backticks, *emphasis*),
which is removed, so that a model has to read them from the words around.
"""

from __future__ import annotations

import inspect
import itertools
import random
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from peft_recipes.embedded import datasets
from peft_recipes.embedded.documentation import Documented
from peft_recipes.embedded.prose import key_of

if TYPE_CHECKING:
    from datasets import Dataset

SENTENCES = 6_000
SENTENCES_PER_OBJECT = 3
_WORDS = range(6, 41)  # in a sentence
_KINDS = {
    "class": "CLASS", "exc": "CLASS", "func": "FUNCTION", "meth": "FUNCTION", "function": "FUNCTION",
    "method": "FUNCTION",
}  # fmt: skip
_MARK = re.compile(
    r":(?:py:)?(?P<role>[a-z]+):`(?P<target>[^`<]+?)(?:\s*<[^>`]*>)?`"
    r"|``(?P<code>[^`]+)``"
    r"|`(?P<name>[^`<]+?)(?:\s*<[^>`]*>)?`_{0,2}"
    r"|(?<![\w*])\*(?P<emphasis>\w+)\*(?![\w*])"
)
# A parameter where it is documented: `x : int`, `x (int): ...`, `:param int x:`.
_PARAMETER = re.compile(r"^\s*(?::param(?: [\w.]+)? (\w+):|\*{0,2}(\w+(?:, \*{0,2}\w+)*) ?(?:\([^)]*\))? ?: ?\S)", re.M)
_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_VALUE = re.compile(r"None|True|False|-?\d+(\.\d+)?|-?inf|nan|'[\w-]+'|\"[\w-]+\"")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`:*])")
_WRITTEN_IN_C = ("ndarray", "nditer", "ufunc", "flatiter")  # classes that numpy documents like functions
_CODE = re.compile(r" : |[{}%\\$<>=|]|::|https?:|---|\[\w+\]_|\.\.|`|\*")
_NOT_TEXT = re.compile(r">>>|\.\. |@|[-*+#] |\d+[.)] |\||[=\-~^*]{3,}|.*::$")


def docstring_names() -> dict[str, Dataset]:
    """`text`: a sentence of a docstring; `spans`: start, end and label (CLASS, FUNCTION, PARAMETER, VALUE) of names."""
    from datasets import Dataset

    uses = datasets.objects_by_use()
    known = _known(datasets.objects())
    rows: dict[str, dict[str, Any]] = {}
    for row in uses["topics"] + uses["pretraining"] + uses["other"]:
        for sentence in itertools.islice(tagged_sentences(row.docstring, known), SENTENCES_PER_OBJECT):
            rows.setdefault(key_of(sentence["text"]), sentence)
    chosen = list(rows.values())
    chosen = random.Random(datasets.SEED).sample(chosen, min(SENTENCES, len(chosen)))
    return {"train": Dataset.from_list(chosen)}


def inputs() -> dict[str, Any]:
    """What determines the rows, as `datasets.inputs`, and the code here."""
    return {**datasets.inputs(), "names": inspect.getsource(sys.modules[__name__])}


def _known(objects: list[Documented]) -> dict[str, str]:
    """The label of the last parts of names that are all of functions or all of classes, and of no parameter."""
    kinds: dict[str, set[str]] = {}
    for row in objects:
        kinds.setdefault(row.name.rpartition(".")[2], set()).add(row.kind)
    parameters = set().union(*(_parameters(row.docstring) for row in objects))
    known = {
        name: _KINDS[next(iter(found))]
        for name, found in kinds.items()
        if len(found) == 1 and "method" not in found and name not in parameters  # a method's name is often a noun
    }
    return known | dict.fromkeys(_WRITTEN_IN_C, "CLASS")


def _parameters(docstring: str) -> set[str]:
    return {name for pair in _PARAMETER.findall(docstring) for name in re.findall(r"\w+", " ".join(pair))}


def tagged_sentences(docstring: str, known: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the sentences of a docstring in which every marked name has a label, without their markup.

    known: the label of names by themselves ("cumsum": "FUNCTION"). A sentence in which one of its names also stands
    without markup is left out.
    """
    parameters = _parameters(docstring)
    for block in _blocks(docstring):
        for marked in _SENTENCE_END.split(block):
            if sentence := _unmarked(marked, parameters, known):
                yield sentence


def _blocks(docstring: str) -> Iterator[str]:
    """Yield runs of lines of one indentation, joined: paragraphs, and the descriptions of parameters."""
    lines: list[str] = []
    indentation = 0
    for line in [*docstring.split("\n"), ""]:
        text, own = line.strip(), len(line) - len(line.lstrip())
        ends = not text or own != indentation or _NOT_TEXT.match(text) or _PARAMETER.match(line)
        if ends and lines:
            yield " ".join(" ".join(lines).split())
            lines = []
        if text and not (_NOT_TEXT.match(text) or _PARAMETER.match(line)):
            lines.append(text)
            indentation = own


def _unmarked(marked: str, parameters: set[str], known: dict[str, str]) -> dict[str, Any] | None:
    """A sentence as text and spans; None if it does not read like one, or a marked name has no label."""
    text, spans, end = "", [], 0
    for match in _MARK.finditer(marked):
        name = next(value for key, value in match.groupdict().items() if value and key != "role")
        name = (name.rpartition(".")[2] if name.startswith("~") else name.lstrip("!.")).removesuffix("()")
        label = _label(name, match["role"], parameters, known)
        if label is None:
            return None
        text += marked[end : match.start()]
        spans.append({"start": len(text), "end": len(text) + len(name), "label": label})
        text, end = text + name, match.end()
    text += marked[end:]
    names = [text[span["start"] : span["end"]] for span in spans]
    repeated = any(len(re.findall(rf"(?<!\w){re.escape(name)}(?!\w)", text)) > names.count(name) for name in names)
    words = len(text.split())
    if not spans or repeated or words not in _WORDS or not text[0].isupper() or text[-1] != "." or _CODE.search(text):
        return None
    return {"text": text, "spans": spans}


def _label(name: str, role: str | None, parameters: set[str], known: dict[str, str]) -> str | None:
    if name in parameters:
        return "PARAMETER"
    if _VALUE.fullmatch(name):
        return "VALUE"
    if not _NAME.fullmatch(name):
        return None
    return _KINDS.get(role or "") or known.get(name.rpartition(".")[2])
