"""Scored answers in the reports: ends, lengths, alarms, and the examples on which the arms differ."""

from __future__ import annotations

import io
import re

import pytest
from comparison_fixture import crowded_comparison, disagreement, image_comparison, sft_comparison, with_scored_answers
from markdown_it import MarkdownIt
from page import EVIL, Page
from rich.console import Console

from peft_recipes.reporting import advice, answer_figures, differing, rows, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.html import render_html
from peft_recipes.reporting.markdown import render_markdown
from peft_recipes.reporting.records import records
from peft_recipes.reporting.terminal import render_terminal


def scored(**by_arm: float) -> dict:
    comparison = sft_comparison(metric="rougeL", higher_is_better=True, margin=0.01)
    for arm in comparison["arms"].values():
        arm["metric"] = {"mean": 0.4, "sd": None, "values": [0.4]}
    return with_scored_answers(comparison, **by_arm)


def printed(comparison: dict, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    render_terminal(comparison, console)
    return console.file.getvalue()


def everywhere(comparison: dict) -> list[str]:
    """The three reports as text on one line each."""
    page = (
        Page(render_html(comparison, []))
        .text.replace("\N{NO-BREAK SPACE}", " ")
        .replace("\N{NON-BREAKING HYPHEN}", "-")
    )
    markdown = Page(MarkdownIt("commonmark").enable("table").render(render_markdown(comparison))).text
    return [" ".join(text.split()) for text in (page, markdown, printed(comparison, 300))]


def test_the_base_and_every_arm_have_figures_of_their_answers():
    table = rows.table(scored())
    assert [column.key for column in table.more][:5] == [
        f"answers:{name}" for name in ("ended", "answer_tokens", "empty_answers", "bits_per_byte", "loss")
    ]
    for row in table.rows:
        figures = [str(row.cells[f"answers:{name}"]) for name in ("ended", "answer_tokens", "empty_answers")]
        assert figures == ["97.0 %", "41 tokens", "0.5 %"], row.name
    assert str(table.rows[0].cells["answers:loss"]) == "2.214"
    assert records(scored())[0]["ended"] == 0.97 and "ended" not in records(sft_comparison())[0]


def test_a_comparison_without_answers_has_no_columns_for_them():
    for comparison in (image_comparison(), sft_comparison()):
        assert not [column for column in rows.table(comparison).columns if column.key.startswith("answers:")]
        assert answer_figures.alarms(comparison) == []


def test_an_arm_that_does_not_stop_is_seen_at_once():
    comparison = scored(lora=0.03, full=0.9)
    line = "LoRA r=16 ends 3.0 % of its answers itself; the others are cut at 64 tokens."
    assert answer_figures.alarms(comparison) == [line]
    for report in everywhere(comparison):
        assert line in report
    comparison = scored(base=0.0)
    comparison["answers_cut_at"] = None
    (line,) = answer_figures.alarms(comparison)
    assert line == "The untuned base never ends an answer itself: all of them are cut at the limit on new tokens."


def test_empty_answers_are_an_alarm():
    comparison = scored()
    comparison["arms"]["full"]["metrics"]["test"]["empty_answers"] = 0.34
    assert answer_figures.alarms(comparison) == ["Full fine-tuning leaves 34 % of its answers empty."]


def test_a_verdict_on_a_loss_alone_says_so():
    caveat = 'Compared by the loss alone: no answers were scored (the option "metric: rougeL" does that).'
    assert caveat in sentences.caveats(sft_comparison(), "lora")
    for report in everywhere(sft_comparison()):
        assert caveat in report
    assert "Compared by the loss alone: no answers were scored." in sentences.caveats(
        sft_comparison(task="language-modeling"), "lora"
    )
    for other in (scored(), image_comparison(), image_comparison(metric="loss")):
        assert not [line for line in sentences.caveats(other, "lora") if "loss alone" in line]


def test_the_columns_that_decide_come_first():
    first = "Test ROUGE-L | Against full | Verdict | Trained parameters | Training time | Peak memory | Checkpoint"
    assert f"| Arm | {first} |" in render_markdown(scored())
    assert "## More figures\n\n| Arm | Ended answers | Answer length |" in render_markdown(scored())
    assert [column.title for column in rows.table(scored()).first] == first.split(" | ")


@pytest.mark.parametrize("comparison", [scored(), image_comparison(), crowded_comparison()])
def test_a_terminal_of_100_columns_has_the_columns_that_decide(comparison):
    shown = printed(comparison, 100)
    assert max(map(len, shown.splitlines())) <= 100
    (missing,) = re.findall(r"\(no room here for (.*?): they are", " ".join(shown.split()))
    decide = [c.short or c.title for c in rows.table(comparison).first if not c.key.startswith("split:")]
    assert len(decide) == 7 and not set(decide) & set(missing.split(", "))


# Where the arms differ


def test_the_counts_of_differing_examples_are_in_every_report():
    comparison = sft_comparison(disagreements={"lora": disagreement()})
    line = (
        "LoRA r=16 is right where full fine-tuning is wrong on 12, and wrong where it is right on 15, of 200 test "
        "examples (seed 0). On 3 they give different answers with the same score."
    )
    for report in everywhere(comparison):
        assert line in report
    (arm,) = differing.differing(sft_comparison(disagreements={"lora-all": disagreement("score")}))
    assert arm.line.startswith("LoRA r=16 (lora-all) scores higher than full fine-tuning on 12 and lower on 15, of 200")


def test_the_page_has_every_example_and_markdown_one_each_way():
    comparison = sft_comparison(disagreements={"lora-all": disagreement(), "lora": disagreement("score")})
    assert [arm.name for arm in differing.differing(comparison)] == ["lora", "lora-all"]
    html, markdown = render_html(comparison, []), render_markdown(comparison)
    assert html.count('<article class="differing">') == 2 * 4
    assert "score 0.83" in html and "score 0.25" in html and "LoRA r=16 better: 12 (2 shown)" in html
    assert html.count('<a href="#differing">') == 1
    assert markdown.count("- Prompt: What is 3 + 4?") == 2
    page = Page(html)
    assert page.balanced and not page.open


def test_an_example_without_its_text_is_named_by_its_id():
    entry = disagreement(text="spam", prompt=None)
    html = render_html(image_comparison(disagreements={"lora": entry}), [])
    assert "test-0</h3>" in html and "None" not in Page(html).text
    assert "- Prompt" not in render_markdown(image_comparison(disagreements={"lora": entry}))


def test_untrusted_answers_are_text():
    evil = EVIL + "\x1b[31m\u202e" + '"><img src=x onerror=alert(1)>'
    comparison = sft_comparison(disagreements={"lora": disagreement(text=evil, prompt=evil)})
    html, markdown = render_html(comparison, []), render_markdown(comparison)
    for page in (Page(html), Page(MarkdownIt("commonmark").enable("table").render(markdown))):
        assert not page.all("script") and not [tag for tag in page.all("img") if tag.get("onerror")]
        assert page.text.count("<script>alert('x')</script>") >= 4
    assert "\x1b" not in html + markdown and "\u202e" not in html + markdown


@pytest.mark.parametrize("broken", [None, {}, {"lora": None}, {"lora": {"against": "full"}}, {"gone": disagreement()}])
def test_incomplete_disagreements_have_a_report(broken):
    comparison = sft_comparison(disagreements=broken)
    assert all("None" not in report for report in everywhere(comparison))


# Metrics that the table doesn't know


def test_metrics_are_named_and_shown_as_the_table_of_metrics_has_them():
    assert (fmt.metric_title("rougeL"), fmt.quality(0.4321, "rougeL")) == ("ROUGE-L", "43.2 %")
    assert fmt.quality(0.913, "bits_per_byte") == "0.913"
    assert rows.table(scored()).columns[0].short == "ROUGE-L"


def test_an_unknown_metric_is_shown_by_its_own_name():
    assert (fmt.metric_title("my_score"), fmt.quality(0.4321, "my_score")) == ("my score", "0.432")
    assert fmt.quality(0.5, "weighted_precision") == "50.0 %"
    comparison = image_comparison(metric="my_score", selection_metric="my_score")
    for entry in (comparison["base"], *comparison["arms"].values()):
        for values in entry["metrics"].values():
            values["my_score"] = values.pop("accuracy")
    assert advice.next_steps(comparison)
    for report in everywhere(comparison):
        assert "my score" in report or "My score" in report
