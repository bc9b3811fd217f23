"""Pairs of answers: what is asked, how replies are read, and what a pair scores."""

from __future__ import annotations

import pytest

from peft_recipes.scoring.preferences import (
    FIRST,
    INVALID,
    SECOND,
    TEMPLATE,
    TIE,
    Pair,
    counts,
    judged,
    outcome,
    question,
    read_reply,
)


@pytest.mark.parametrize(
    "reply, meaning",
    [
        *((text, FIRST) for text in ("A", "a", " A.", "[[A]]", "**A**", "Answer A", "Answer: A", "A\nIt is right.")),
        *((text, SECOND) for text in ("B", "(B)", '"B"', "B: the first is wrong", "<think>A or B?</think>\n\nB")),
        *((text, TIE) for text in ("tie", "Tie.", "TIE", "a tie", "[[tie]]")),
        *(
            (text, INVALID)
            for text in ("", "C", "Both", "A better one is B", "A's better", "I can't", "AB", "<think>A")
        ),
    ],
)
def test_a_reply_is_one_word_or_invalid(reply, meaning):
    assert read_reply(reply) == meaning


@pytest.mark.parametrize(
    "own_first, own_second, score",
    [
        (FIRST, SECOND, 1.0),
        (SECOND, FIRST, 0.0),
        (FIRST, FIRST, 0.5),  # contradicts itself
        (SECOND, SECOND, 0.5),
        (TIE, TIE, 0.5),
        (FIRST, TIE, 0.5),
        (INVALID, SECOND, 0.5),
    ],
)
def test_an_answer_wins_if_it_is_preferred_in_both_orders(own_first, own_second, score):
    assert outcome(own_first, own_second) == score


def test_both_orders_are_asked_of_a_pair_and_braces_stay_as_they_are():
    pair = Pair(0, "say {first}", "one {second}", "two")
    own_first, own_second = pair.questions("{prompt} | {first} | {second}")
    assert own_first == "say {first} | one {second} | two" and own_second == "say {first} | two | one {second}"
    assert question(TEMPLATE, "P", "F", "S").index("P") < question(TEMPLATE, "P", "F", "S").index("F\n")


def test_the_outcomes_and_the_reasons_of_ties_are_counted():
    pairs = [Pair(i, f"p{i}", "own", "full") for i in range(4)] + [Pair(4, "p4", "the same", "the same ")]
    both = [("A", "B"), ("B", "A"), ("A", "A"), ("well", "tie")]  # won, lost, contradicted, unreadable
    template = "{prompt} {first} {second}"
    replies = {
        asked: reply
        for pair, given in zip(pairs, both, strict=False)
        for asked, reply in zip(pair.questions(template), given, strict=True)
    }
    columns = judged(pairs, replies, template)
    assert columns["id"] == [0, 1, 2, 3, 4] and columns["preference"] == [1.0, 0.0, 0.5, 0.5, 0.5]
    assert columns["own_first"] == [FIRST, SECOND, FIRST, INVALID, None]
    assert counts(columns) == {
        "pairs": 5, "wins": 1, "ties": 3, "losses": 1, "identical": 1, "contradictions": 1, "unreadable": 1,
        FIRST: 4, SECOND: 2, TIE: 1, INVALID: 1,
    }  # fmt: skip
