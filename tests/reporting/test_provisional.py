"""The report of a comparison whose runs are still being trained: it says so, everywhere, and claims nothing yet."""

from __future__ import annotations

import copy
import io
import re

import pytest
from comparison_fixture import image_comparison
from page import EVIL, Page
from rich.console import Console

from peft_recipes.reporting import advice, below_table, provisional, rows, sentences
from peft_recipes.reporting.html import render_html
from peft_recipes.reporting.markdown import render_markdown
from peft_recipes.reporting.plots import plots
from peft_recipes.reporting.records import records
from peft_recipes.reporting.terminal import render_terminal

ARMS = ("full", "head", "lora", "lora-conv")
MEASURED = ("metric", "metrics", "curves", "training_seconds", "peak_memory_bytes", "checkpoint_bytes", "per_class")


def so_far(done: int, *, state: str = "pending", seconds: float | None = 250.0, **progress) -> dict:
    """Invent a comparison of four arms with three seeds, of which the first `done` runs are finished.

    state and progress: of the run that comes next.
    """
    made = copy.deepcopy(image_comparison())
    made["arms"] = {name: made["arms"][name] for name in ARMS}
    jobs = [("base", 0), *((arm, seed) for seed in range(3) for arm in ARMS)]
    made["provisional"] = {
        "written_at": "2026-11-26T13:05:00+00:00", "finished": done, "of": len(jobs), "expected_seconds": seconds,
        "expected_end": "2026-11-26T13:09:10+00:00" if seconds else None,
        "runs": [
            {"arm": arm, "seed": seed, "state": "ok" if n < done else state if n == done else "pending",
             "step": progress.get("step") if n == done else None, "of": progress.get("of"), "validation": None}
            for n, (arm, seed) in enumerate(jobs)
        ],
    }  # fmt: skip
    if not done:
        made["base"] = {"status": "pending", "error": None, "metrics": {}, "answers": None}
    for name, arm in made["arms"].items():
        finished = [seed for n, (one, seed) in enumerate(jobs) if one == name and n < done]
        arm["seeds"] = finished
        if finished:
            arm["metric"]["values"] = arm["metric"]["values"][: len(finished)]
        else:
            following = jobs[min(done, len(jobs) - 1)][0] == name
            own = {"state": state, **progress} if following else {"state": "pending", "step": 0, "of": None}
            arm |= {**dict.fromkeys(MEASURED), "status": "pending", "progress": {"validation": [], **own}}
    known = [name for name in ARMS[1:] if made["arms"][name]["seeds"] and made["arms"]["full"]["seeds"]]
    made["differences"] = {name: entry for name, entry in made["differences"].items() if name in known}
    return made


def text_of(comparison: dict) -> tuple[str, str, str]:
    """The page's text, the Markdown and the terminal's output on lines of any length."""
    stream = io.StringIO()
    render_terminal(comparison, Console(file=stream, width=110))
    return Page(render_html(comparison)).text, render_markdown(comparison), " ".join(stream.getvalue().split())


@pytest.mark.parametrize("done", [0, 1, 2, 5, 13])
def test_any_state_has_a_report_that_says_how_far_it_is(done):
    comparison = so_far(done, seconds=250.0 if done else None)
    page = Page(render_html(comparison))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert page.balanced and len(ids) == len(set(ids)) and not page.all("script")
    left = ", about 4 min left" if done else ""
    banner = f"Provisional: {done} of 13 runs finished{left}."
    if done == 13:
        banner = "Provisional: all 13 runs finished; the adapters are checked and the report is written next."
    for text in text_of(comparison):
        assert banner in re.sub(r"[\u00a0\n]", " ", text)
        assert not re.search(r"\b(nan|None|inf)\b", text)
    assert records(comparison) and all(sentences.verdict_sentence(comparison, arm) for arm in ARMS)


def test_what_is_still_to_come_is_named():
    assert provisional.to_come(so_far(7)) == (
        "LoRA r=8 (seeds 1 and 2), LoRA r=8 (lora-conv) (seeds 1 and 2), "
        "Full fine-tuning (seed 2) and Head only (seed 2)"
    )
    assert provisional.to_come(so_far(13)) == ""
    grid = provisional.grid(so_far(6, state="running", step=40, of=125))
    assert grid.seeds == ["0", "1", "2"]
    assert grid.lines[1] == (
        "Head only",
        [("ok", "finished"), ("running", "running, 40 of 125"), ("pending", "to come")],
    )


def test_an_arm_under_way_shows_its_step_and_its_validation_so_far():
    comparison = so_far(3, state="running", step=40, of=125, validation=[[20, 0.78], [40, 0.831]])
    row = next(row for row in rows.table(comparison).rows if row.name == "lora")
    assert (row.kind, row.reason) == ("pending", "running, step 40 of 125, validation accuracy 83.1 %")
    for text in text_of(comparison):
        assert "step 40 of 125" in text
    assert {plot.name for plot in plots(comparison)} == {"difference", "loss", "validation"}
    assert "LoRA r=8 from 78.0 % to 83.1 %" in next(p.alt for p in plots(comparison) if p.name == "validation")


def test_the_first_validation_of_an_arm_is_in_the_figure():
    comparison = so_far(3, state="paused", step=20, of=125, validation=[[20, 0.78]])
    assert "LoRA r=8 from 78.0 % to 78.0 %" in next(p.alt for p in plots(comparison) if p.name == "validation")


def test_without_full_there_is_no_verdict_and_it_says_so():
    comparison = so_far(1)
    assert sentences.verdict_headline(comparison, "lora") == "LoRA r=8 has no result yet: not begun."
    comparison["arms"]["lora"] = image_comparison()["arms"]["lora"]
    assert "; full fine-tuning has no result yet to compare it with (not begun)." in sentences.verdict_headline(
        comparison, "lora"
    )


def test_a_verdict_that_may_change_is_worded_as_such():
    comparison = so_far(5)
    assert sentences.verdict_headline(comparison, "lora").startswith("So far: LoRA r=8 is worse than full fine-tuning")
    page, markdown, terminal = text_of(comparison)
    assert "worse so far" in page and "Verdict so far" in page and "worse so far" in terminal
    assert "Verdict so far" in markdown
    final = {key: value for key, value in comparison.items() if key != "provisional"}
    assert not any("so far" in text.lower() for text in text_of(final))


def test_advice_is_about_failed_arms_only():
    comparison = so_far(5)
    comparison["arms"]["head"] = image_comparison()["arms"]["lora-wide"]
    assert len(advice.next_steps(comparison)) == 1 and "ran out of memory" in advice.next_steps(comparison)[0]


def test_an_interrupted_one_says_how_to_go_on():
    comparison = so_far(5, seconds=None)
    comparison["provisional"]["interrupted"] = True
    for text in text_of(comparison):
        assert "Provisional: interrupted with 5 of 13 runs finished. The same command continues." in text.replace(
            "\u00a0", " "
        )


def test_between_two_looks_the_verdicts_are_said_to_be_those_of_the_last():
    comparison = so_far(9)
    design = {"seeds": [0, 1, 2, 3, 4], "first": 3, "arms": list(ARMS), "decided": {}, "ended": None}
    comparison["design"] = {**design, "seeds_of": {arm: [0, 1] for arm in ARMS}}
    assert "The first look is at 3 seeds; before it there is no interval" in below_table.planned(comparison)[0]
    made = {"head": {"seeds": 3, "verdict": "worse"}, "lora": {"seeds": 3, "verdict": "worse"}}
    comparison["design"] = {**design, "decided": made, "seeds_of": {arm: [0, 1, 2] for arm in ARMS}}
    (line,) = below_table.planned(comparison)
    assert "The last look was at 3 seeds: LoRA r=8 (lora-conv) is open." in line and "ended" not in line
    assert "of 13 runs at most finished, about 4 min left at most" in provisional.banner(comparison)
    assert not sentences.verdict_headline(comparison, "lora").startswith("So far")


@pytest.mark.parametrize(("status", "words"), [("stopped", "stopped by hand"), ("dropped", "dropped")])
def test_an_arm_that_was_ended_early_is_a_row_of_a_finished_comparison_without_a_verdict(status, words):
    comparison = image_comparison()
    progress = {"state": status, "step": 50, "of": 125, "validation": [[50, 0.7]], "reason": "far behind\nfull"}
    comparison["arms"]["lora-r2"] |= {**dict.fromkeys(MEASURED), "status": status, "error": None, "progress": progress}
    row = next(row for row in rows.table(comparison).rows if row.name == "lora-r2")
    assert (row.kind, row.reason) == ("pending", f"{words}, step 50 of 125, validation accuracy 70.0 %: far behind")
    assert "Provisional" not in "".join(text_of(comparison))
    assert sentences.verdict_headline(comparison, "lora-r2").startswith("LoRA r=2 has no result: ")


def test_untrusted_words_are_text():
    comparison = so_far(3, state="stopped", step=1, of=2, reason=EVIL)
    comparison["provisional"]["runs"][3]["state"] = comparison["provisional"]["written_at"] = EVIL
    page = Page(render_html(comparison))
    assert not page.all("script") and "alert('x')" in page.text
    assert "<script" not in render_markdown(comparison)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, ""), (0, "less than a minute"), (49, "less than a minute"), (250, "about 4 min"), (6000, "about 1.7 h"),
     (300_000, "about 3.5 days")],
)  # fmt: skip
def test_a_time_left_is_rounded(seconds, words):
    assert provisional.duration(seconds) == words


def test_a_stopped_arm_is_not_what_the_report_leads_with():
    made = copy.deepcopy(image_comparison())
    made["arms"]["lora"]["unfinished"] = [{"seed": 2, "state": "stopped"}]
    assert sentences.headline_arm(made) == "lora-conv"
    for arm in made["arms"].values():  # none is left
        arm["unfinished"] = [{"seed": 2, "state": "dropped"}]
    assert sentences.headline_arm(made) == "lora"
    assert not any("more seeds" in step.lower() for step in advice.next_steps(made))
