"""Preferences between two models' answers: what a judge is asked, how its replies are read, and what a pair scores.

Every pair is asked in both orders. An answer wins if it is preferred in both, and a judge that contradicts itself says
"tie" (Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", NeurIPS, 3.4: judges favour a
position).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TEMPLATE = """\
Two assistants answered the same request. Decide which of the two answers is better: it does what was asked, what it \
says is right, and it is easy to follow. Neither its position nor its length makes an answer better.

### Request
{prompt}

### Answer A
{first}

### Answer B
{second}

### Your decision
Reply with A if answer A is better, with B if answer B is better, or with tie if they are equally good. Reply with \
that one word and nothing else."""

FIRST, SECOND, TIE, INVALID = "first", "second", "tie", "invalid"
_PLACEHOLDER = re.compile(r"\{(prompt|first|second)\}")
_THOUGHTS = re.compile(r".*</think>", re.DOTALL)
# One word, alone in its line or before a punctuation mark: "A better one is B" is no decision for A.
_REPLY = re.compile(r"\W*(?:answer\b)?\W*(a\s+tie|tie|a|b)(?:[^\w\s'’]|[ \t]*\n|\s*\Z)", re.IGNORECASE)
_MEANINGS = {"a": FIRST, "b": SECOND}


@dataclass(frozen=True)
class Pair:
    """Two answers to the prompt of example `id`: the arm's own and full fine-tuning's."""

    id: Any
    prompt: str
    own: str
    full: str

    @property
    def identical(self) -> bool:
        """Whether the answers are the same: a tie, of which no judge is asked."""
        return self.own.strip() == self.full.strip()

    def questions(self, template: str) -> tuple[str, str]:
        """Return what the judge is asked: with the arm's answer first, and with it second."""
        orders = ((self.own, self.full), (self.full, self.own))
        return tuple(question(template, self.prompt, first, second) for first, second in orders)


def question(template: str, prompt: str, first: str, second: str) -> str:
    """Fill a template. Braces in the prompt or the answers stay as they are."""
    values = {"prompt": prompt, "first": first, "second": second}
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def read_reply(reply: str) -> str:
    """Return FIRST, SECOND, TIE or INVALID for a judge's reply: "A", "[[B]]", "Answer: A.", "tie"."""
    match = _REPLY.match(_THOUGHTS.sub("", reply))
    return INVALID if match is None else _MEANINGS.get(match[1].lower(), TIE)


def outcome(own_first: str, own_second: str) -> float:
    """Return what an arm's answer scores, 1 (win), 0.5 (tie) or 0 (loss), from the readings of both orders."""
    if (own_first, own_second) == (FIRST, SECOND):
        return 1.0
    return 0.0 if (own_first, own_second) == (SECOND, FIRST) else 0.5


def judged(pairs: Sequence[Pair], replies: dict[str, str], template: str) -> dict[str, list[Any]]:
    """Return the columns of preferences.parquet, one row per pair.

    replies: the judge's reply to each question. preference: 1, 0.5 or 0. own_first and own_second: which answer was
    preferred with the arm's own in that position, FIRST, SECOND, TIE or INVALID; None for identical answers.
    """
    columns: dict[str, list[Any]] = {"id": [], "preference": [], "own_first": [], "own_second": []}
    for pair in pairs:
        readings = (None, None)
        if not pair.identical:
            readings = tuple(read_reply(replies[asked]) for asked in pair.questions(template))
        columns["id"].append(pair.id)
        columns["preference"].append(0.5 if pair.identical else outcome(*readings))
        columns["own_first"].append(readings[0])
        columns["own_second"].append(readings[1])
    return columns


def counts(columns: dict[str, list[Any]]) -> dict[str, int]:
    """Count the outcomes of an arm's pairs, and the reasons of ties.

    wins, ties and losses add up to the pairs. Of the ties, identical have the same answer, in contradictions one
    position was preferred in both orders, and unreadable have an invalid reply. first, second, tie and invalid count
    the replies.
    """
    scores, orders = Counter(columns["preference"]), list(zip(columns["own_first"], columns["own_second"], strict=True))
    replies = Counter(reading for order in orders for reading in order if reading is not None)
    return {
        "pairs": len(orders),
        "wins": scores[1.0],
        "ties": scores[0.5],
        "losses": scores[0.0],
        "identical": orders.count((None, None)),
        "contradictions": sum(a == b and a in (FIRST, SECOND) for a, b in orders),
        "unreadable": sum(INVALID in order for order in orders),
        **{reply: replies[reply] for reply in (FIRST, SECOND, TIE, INVALID)},
    }
