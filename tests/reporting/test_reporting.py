"""The report: its text, its files, and that untrusted text is never read as markup."""

from __future__ import annotations

import copy
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from comparison_fixture import answers, difference, image_comparison, sft_comparison
from page import EVIL, Page
from rich.console import Console

from peft_recipes.reporting import advice, below_table, details, facts, rows, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.figure_style import arm_styles, spread_out
from peft_recipes.reporting.html import render_html
from peft_recipes.reporting.markdown import escape, fence, render_markdown, table_markdown
from peft_recipes.reporting.plots import plots, sample_sheet
from peft_recipes.reporting.records import records
from peft_recipes.reporting.terminal import render_terminal
from peft_recipes.reporting.write import write_reports

TRACEBACK = "Traceback (most recent call last):\n  File 'x.py', line 3\nValueError: loss is nan\n"


def small(**lora) -> dict:
    """Invent a comparison of full and lora r=16 by accuracy, three seeds, equivalent."""
    comparison = image_comparison(embedded=False)
    full, arm = comparison["arms"]["full"], comparison["arms"]["lora"]
    full |= {"trainable_parameters": 134_515_008, "checkpoint_bytes": 538_060_032, "peak_memory_bytes": 8_000_000_000}
    full |= {"training_seconds": 340.0, "metric": {"mean": 0.4440, "sd": 0.002, "values": [0.444] * 3}}
    arm |= {"rank": 16, "trainable_parameters": 1_843_200, "checkpoint_bytes": 7_385_000, "training_seconds": 200.0}
    arm |= {"peak_memory_bytes": 3_280_000_000, "metric": {"mean": 0.4400, "sd": 0.003, "values": [0.44] * 3}} | lora
    comparison["arms"] = {"full": full, "lora": arm}
    comparison["differences"] = {"lora": difference(-0.004, -0.011, 0.003, "equivalent", margin=0.015)}
    return comparison


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[Path, list[Path]]:
    """A report of seven arms on disk."""
    folder = tmp_path_factory.mktemp("report")
    return folder, write_reports(image_comparison(), folder)


@pytest.fixture(scope="module")
def page(report) -> Page:
    return Page((report[0] / "comparison.html").read_text("utf-8"))


def printed(comparison: dict, width: int = 120, **options) -> str:
    stream = io.StringIO()
    render_terminal(comparison, Console(file=stream, width=width, **options))
    return stream.getvalue()


# The sentence


def test_the_sentence_of_an_equivalent_arm():
    assert sentences.verdict_sentence(small(), "lora") == (
        "LoRA r=16 keeps 99.1 % of full fine-tuning's accuracy (difference -0.4 points, 95 % interval -1.1 to +0.3: "
        "equivalent within 1.5 points), with 1.4 % of the parameters, 41 % of the memory, 1.7x the speed and a 7.4 MB "
        "checkpoint instead of 538 MB."
    )


def test_the_sentence_of_a_worse_arm_starts_with_that():
    sentence = sentences.verdict_sentence(image_comparison(embedded=False), "lora")
    assert sentence.startswith(
        "LoRA r=8 is worse than full fine-tuning: it keeps 90.4 % of full's accuracy (difference -8.5 points, "
        "95 % interval -10.1 to -6.9), with 6.5 % of the parameters"
    )


def test_a_better_arm_reaches_more_than_100_percent_of_full():
    comparison = small(metric={"mean": 0.47, "sd": 0.01, "values": [0.47] * 3})
    comparison["differences"]["lora"] = difference(0.026, 0.012, 0.04, "better")
    sentence = sentences.verdict_sentence(comparison, "lora")
    assert "is better than full fine-tuning: it reaches 105.9 % of full's accuracy (difference +2.6 points" in sentence


def test_the_sentence_of_an_open_verdict():
    comparison = small()
    comparison["differences"]["lora"] = difference(-0.01, -0.034, 0.013, "not shown")
    sentence = sentences.verdict_sentence(comparison, "lora")
    assert sentence.startswith("Whether LoRA r=16 matches full fine-tuning is not shown: it keeps 99.1 %")
    assert "-3.4 to +1.3, which neither excludes zero nor stays within 1 point" in sentence


def test_one_seed_is_a_caveat():
    comparison = small(metric={"mean": 0.44, "sd": None, "values": [0.44]})
    comparison["differences"]["lora"]["seeds"] = 1
    assert sentences.verdict_sentence(comparison, "lora").endswith(
        "One seed: the interval covers the test examples only, not the variation between seeds."
    )
    assert "One seed" not in sentences.verdict_sentence(small(), "lora")


def test_without_a_full_arm_the_sentence_has_absolute_figures():
    comparison = small()
    del comparison["arms"]["full"], comparison["differences"]
    sentence = sentences.verdict_sentence(comparison, "lora")
    assert sentence.startswith("LoRA r=16 reaches 44.0 % accuracy, with ")
    assert sentence.endswith("there is no full fine-tune to compare it with.")
    assert "keeps" not in sentence


def test_a_failed_full_arm_is_named_with_its_reason():
    comparison = small()
    comparison["arms"]["full"] |= {"status": "out-of-memory", "error": None, "metric": {"mean": None, "values": []}}
    sentence = sentences.verdict_sentence(comparison, "lora")
    assert "full fine-tuning has no result to compare it with (out of memory)" in sentence


def test_a_failed_arm_has_its_error_in_its_sentence():
    comparison = small(status="failed", error=TRACEBACK, metric=None)
    assert sentences.verdict_sentence(comparison, "lora") == "LoRA r=16 has no result: failed: ValueError: loss is nan."


def test_a_difference_without_an_interval_has_no_verdict():
    comparison = small()
    comparison["differences"] = {}
    sentence = sentences.verdict_sentence(comparison, "lora")
    assert "(no interval was computed)" in sentence and "equivalent" not in sentence


def test_a_loss_is_compared_in_percent_of_fulls_loss():
    sentence = sentences.verdict_sentence(sft_comparison(), "lora")
    assert sentence.startswith(
        "LoRA r=16 reaches a loss of 1.811 against full fine-tuning's 1.803 (difference +0.4 %, 95 % interval -0.2 to "
        "+1.0 %: equivalent within 1 %), with 1.4 % of the parameters, 41 % of the memory, 2.4x the speed"
    )


def test_stand_ins_are_named_in_the_sentence():
    sentence = sentences.verdict_sentence(image_comparison(), "lora")
    assert "Measured on an embedded stand-in (data embedded:mnist)" in sentence
    assert "stand-ins" not in sentences.verdict_sentence(sft_comparison(), "lora")


def test_seeds_that_failed_are_counted_in_the_sentence():
    comparison = small(
        failures=[{"seed": 2, "error": "killed"}], metric={"mean": 0.44, "sd": 0.0, "values": [0.44, 0.44]}
    )
    assert "1 of 3 seeds failed and is not in the figures." in sentences.verdict_sentence(comparison, "lora")


def test_the_full_arm_is_not_compared_with_itself():
    sentence = sentences.verdict_sentence(small(), "full")
    assert sentence.startswith("Full fine-tuning reaches 44.4 % accuracy") and "compare" not in sentence


@pytest.mark.parametrize(
    ("low", "high", "verdict", "shown"),
    [
        (-0.0104, 0.003, "not shown", "-1.04 to +0.30"),  # -1.0 would be within 1 point
        (-0.031, -0.0003, "worse", "-3.10 to -0.03"),  # -0.0 would include zero
        (-0.0099, 0.0099, "equivalent", "-1.0 to +1.0"),
    ],
)
def test_the_rounded_interval_agrees_with_the_verdict(low, high, verdict, shown):
    comparison = small()
    comparison["differences"]["lora"] = difference((low + high) / 2, low, high, verdict)
    assert sentences.describe_difference(comparison, "lora").interval == shown


def test_the_report_leads_with_the_adapter_named_lora():
    assert sentences.headline_arm(image_comparison()) == "lora"
    comparison = image_comparison()
    comparison["arms"] = {name: comparison["arms"][name] for name in ("full", "head", "lora-r2", "lora-r16")}
    assert sentences.headline_arm(comparison) == "lora-r2"
    comparison["arms"] = {name: comparison["arms"][name] for name in ("full", "head")}
    assert sentences.headline_arm(comparison) == "head"
    assert sentences.headline_arm({"arms": {}}) is None


@pytest.mark.parametrize(
    ("name", "arm", "label"),
    [
        ("lora", {"method": "LORA", "rank": 8}, "LoRA r=8"),
        ("lora-r4", {"method": "LORA", "rank": 4}, "LoRA r=4"),
        ("lora-conv", {"method": "LORA", "rank": 8}, "LoRA r=8 (lora-conv)"),
        ("dora", {"method": "LORA", "rank": 8}, "DoRA r=8"),
        ("ia3", {"method": "IA3"}, "(IA)3"),
        ("full", {"method": "full"}, "Full fine-tuning"),
        ("head", {"method": "head"}, "Head only"),
    ],
)
def test_the_label_of_an_arm_has_method_rank_and_a_name_that_adds_to_them(name, arm, label):
    assert facts.label({"arms": {name: arm}}, name) == label


def test_forgetting_compares_each_arm_with_the_base():
    (line,) = sentences.forgetting(image_comparison())
    assert line.startswith("Clean accuracy before tuning 98.6 %; after: full fine-tuning 95.1 % (-3.5 points), ")
    assert "LoRA r=8 96.7 % (-1.9 points)" in line
    assert sentences.forgetting(sft_comparison()) == []


# Numbers


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (fmt.human_bytes(7_385_000), "7.4 MB"), (fmt.human_bytes(538_060_032), "538 MB"),
        (fmt.human_bytes(999_960), "1.0 MB"),
        (fmt.human_bytes(12), "12 B"), (fmt.seconds(0.4), "0.40 s"), (fmt.seconds(59.97), "1 min 00 s"),
        (fmt.seconds(125), "2 min 05 s"), (fmt.seconds(3790), "1 h 03 min"), (fmt.percent(0.01370), "1.4 %"),
        (fmt.percent(0.41), "41 %"), (fmt.percent(0.00031), "0.031 %"), (fmt.percent(1.04), "104 %"),
        (fmt.percent(0.9969), "99.7 %"),
        (fmt.times(9.96), "10x"),
        (fmt.count(1_843_200), "1,843,200"), (fmt.short_count(1_843_200), "1.8 M"), (fmt.learning_rate(5e-5), "5e-5"),
        (fmt.learning_rate(0.003), "3e-3"), (fmt.quality(0.887, "accuracy"), "88.7 %"),
        (fmt.quality(2.3141, "loss"), "2.314"),
        (fmt.signed(-0.04), "0.0"), (fmt.signed(0.3), "+0.3"), (fmt.article("8.1 MB"), "an"),
        (fmt.article("11 MB"), "an"),
        (fmt.article("110 MB"), "a"), (fmt.article("7.4 MB"), "a"), (fmt.quality(float("nan"), "accuracy"), "-"),
        (fmt.human_bytes(None), "-"), (fmt.seconds(float("inf")), "-"),
    ],
)  # fmt: skip
def test_numbers_are_formatted_for_people(shown, expected):
    assert shown == expected


# The table


def test_the_table_starts_with_the_untuned_base():
    first = rows.table(image_comparison()).rows[0]
    assert (first.label, first.cells["metric"].text, first.cells["split:clean"].text) == (
        "Base, untuned",
        "67.3 %",
        "98.6 %",
    )


def test_a_failed_arm_is_a_row_with_its_reason():
    last = rows.table(image_comparison()).rows[-1]
    assert last.kind == "failed"
    assert last.reason == "out of memory: The process was killed by the system (signal 9) at step 3"


def test_a_cell_has_its_share_of_full():
    row = next(row for row in rows.table(image_comparison()).rows if row.name == "lora")
    assert str(row.cells["checkpoint_bytes"]) == "111 kB (6.6 %)"
    assert str(row.cells["difference"]) == "-8.5 points (-10.1 to -6.9)"
    assert str(row.cells["training_seconds"]) == "2.6 s (1.6x)"
    assert str(row.cells["split:clean"]) == "96.7 % (-1.9)"


def test_columns_without_any_value_are_left_out():
    keys = {column.key for column in rows.table(image_comparison()).columns}
    assert "generation" not in keys and "throughput" in keys
    comparison = image_comparison(differences={})
    assert not {"difference", "verdict"} & {column.key for column in rows.table(comparison).columns}


def test_several_arms_come_with_the_chance_of_a_false_verdict_and_the_intervals_that_hold_together():
    comparison = image_comparison()
    assert below_table.several(comparison) == []
    for entry in comparison["differences"].values():
        low, high = entry["ci95"]
        entry |= {"ci95_simultaneous": [low - 0.01, high + 0.01], "verdict_simultaneous": entry["verdict"]}
    (line,) = below_table.several(comparison)
    assert line.startswith("5 arms are compared with full fine-tuning") and "up to 23 %" in line
    assert "by itself" in line and line.endswith("together (Bonferroni), every verdict is the same.")
    comparison["differences"]["lora-conv"]["verdict_simultaneous"] = "not shown"
    (line,) = below_table.several(comparison)
    assert line.endswith("LoRA r=8 (lora-conv) is not shown instead of worse.")
    assert "LoRA r=8 (lora-conv) is not shown instead of worse." in render_markdown(comparison)
    assert "not shown instead of worse" in render_html(comparison).replace("\u00a0", " ")
    meaning = next(c.meaning for c in rows.table(comparison).columns if c.key == "difference")
    assert meaning.endswith("of this arm by itself")
    record = next(row for row in records(comparison) if row["arm"] == "lora-conv")
    assert record["verdict_simultaneous"] == "not shown" and record["ci95_simultaneous_low"] == -0.041 - 0.01


def test_records_are_raw_numbers_for_pandas():
    import pandas

    frame = pandas.DataFrame(records(image_comparison())).set_index("arm")
    assert list(frame.index[:2]) == ["base", "full"]
    assert frame.loc["lora", "difference"] == -0.085 and frame.loc["lora", "verdict"] == "worse"
    assert frame.loc["base", "clean_accuracy"] == 0.986
    assert frame.loc["lora-wide", "status"] == "out-of-memory" and "killed" in frame.loc["lora-wide", "error"]


# Files


def test_a_report_is_markdown_with_images_and_a_page(report):
    folder, written = report
    assert [path.name for path in written[:2]] == ["comparison.md", "comparison.html"]
    shown = re.findall(r"\]\((plots/[a-z]+\.png)\)", (folder / "comparison.md").read_text("utf-8"))
    assert sorted(shown) == sorted(f"plots/{path.name}" for path in written[2:]) and len(shown) == 10
    assert all((folder / path).read_bytes().startswith(b"\x89PNG") for path in shown)
    assert not [path for path in folder.rglob(".*")]


def test_the_same_comparison_gives_the_same_report(report, tmp_path):
    _, written = report
    again = write_reports(json.loads(json.dumps(image_comparison())), tmp_path)
    for old, new in zip(written, again, strict=True):
        assert old.read_bytes() == new.read_bytes(), old.name


def test_a_failed_write_leaves_the_old_report_unchanged(tmp_path, monkeypatch):
    comparison = sft_comparison()
    comparison["arms"] = {"lora": comparison["arms"]["lora"] | {"curves": []}}
    (tmp_path / "comparison.md").write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_reports(comparison, tmp_path)
    assert (tmp_path / "comparison.md").read_text() == "old"
    assert not list(tmp_path.rglob(".*"))


def test_stale_plots_are_removed(tmp_path):
    (tmp_path / "plots").mkdir()
    for name in ("rank.png", "mine.png"):
        (tmp_path / "plots" / name).write_bytes(b"old")
    write_reports({"arms": {}}, tmp_path)
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["mine.png"]


def test_importing_the_package_is_light():
    heavy = "[name for name in ('matplotlib', 'jinja2', 'rich') if name in sys.modules]"
    code = f"import sys, peft_recipes.reporting.write; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The page


def test_the_page_loads_nothing_from_outside(report):
    html = (report[0] / "comparison.html").read_text("utf-8")
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]", re.sub(r"data:image/png;base64,[^\"]+", "", html), re.IGNORECASE)
    assert not page.all("script") and not page.all("iframe") and "@import" not in html
    sources = [attrs[key] for _, attrs in page.tags for key in ("src", "href", "xlink:href", "data") if key in attrs]
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)\)", html))


def test_the_page_is_well_formed_with_unique_ids(page):
    assert page.balanced and not page.open
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = [attrs["href"][1:] for _, attrs in page.tags if attrs.get("href", "").startswith("#")]
    assert targets and set(targets) <= set(ids)


def test_the_page_works_with_a_screen_reader(page):
    assert page.all("html")[0]["lang"] == "en"
    assert all(attrs.get("alt") for attrs in page.all("img"))
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.all("th"))
    assert len(page.all("figure")) == len(page.all("figcaption")) > 9
    drawn = [attrs for attrs in page.all("svg") if attrs.get("role") == "img"]
    ids = {attrs.get("id") for _, attrs in page.tags}
    assert len(drawn) == 9 and all(set(attrs["aria-labelledby"].split()) <= ids for attrs in drawn)
    assert all(attrs.get("role") == "img" or attrs.get("aria-hidden") == "true" for attrs in page.all("svg"))
    assert "Quality by rank" in page.text and "rank 2 77.1 %; rank 8 80.2 %; rank 16 81.8 %" in page.text


def test_the_page_starts_with_the_verdict_and_has_every_section(page):
    text = page.text.replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")
    text = text[text.index("How it was measured") + 10 :]  # what follows the list of sections
    parts = [
        sentences.verdict_headline(image_comparison(), "lora"), "All arms, side by side", "Base, untuned",
        "Difference from full",
        "F1 by class", "Examples before and after", "What each arm forgot", "What to try next", "How it was measured",
        "Invented CPU", "Runs that failed",
    ]  # fmt: skip
    positions = [text.find(part) for part in parts]
    assert -1 not in positions and positions == sorted(positions)


def test_every_colour_of_a_figure_is_a_css_variable(report):
    html = (report[0] / "comparison.html").read_text("utf-8")
    figures = re.findall(r'<svg viewBox="[^"]*" role="img".*?</svg>', html, re.DOTALL)
    assert len(figures) == 9
    for figure in figures:
        fixed = set(re.findall(r"(?<!, )#[0-9a-f]{6}\b", figure))
        assert not fixed, fixed
    assert "prefers-color-scheme: dark" in html and "@media print" in html


def test_answers_are_side_by_side_and_long_ones_fold():
    html = render_html(sft_comparison(), [])
    page = Page(html)
    assert html.count('class="card question') == 3
    assert html.count("<h4>Base, untuned</h4>") == 3 and html.count("<h4>LoRA r=16 (lora-all)</h4>") == 3
    assert html.count('<details class="long">') == 1
    assert "    a, b = 0, 1\n" in page.text
    assert page.text.count("Air scatters short waves more than long ones.") >= 30


def test_answers_to_another_prompt_are_left_out():
    comparison = sft_comparison()
    comparison["arms"]["lora-all"]["answers"][1]["prompt"] = "Another question"
    prompt, answers = details.side_by_side(comparison)[1]
    assert prompt["prompt"] == "Why is the sky blue?"
    assert [label for label, _ in answers] == ["Base, untuned", "Full fine-tuning", "LoRA r=16"]


def test_a_broken_sample_image_is_left_out():
    comparison = image_comparison()
    comparison["samples"][0]["after"] = "bm90IGEgcG5n"
    comparison["samples"][1]["before"] = '"><script>'
    assert len(details.samples(comparison)) == 4
    assert sample_sheet(image_comparison(samples=None)) is None


# Untrusted text is never markup


def hostile() -> dict:
    """Return a comparison in which every untrusted text is markup."""
    comparison = sft_comparison(
        title=EVIL, recipe=EVIL, dataset=EVIL, model=EVIL, notes=[EVIL], task=EVIL, embedded=True
    )
    lora = comparison["arms"].pop("lora")
    lora |= {"per_class": [{"label": EVIL, "f1": 0.5, "support": 3}, {"label": "b", "f1": 0.9, "support": 3}]}
    lora |= {"answers": answers(EVIL, EVIL + "```\n~~~", EVIL), "notes": [EVIL], "target_modules": [EVIL]}
    lora["metrics"][EVIL] = {"loss": 1.0, EVIL: 2.0}
    comparison["arms"] |= {EVIL: lora, "broken": lora | {"status": "failed", "error": EVIL, "metric": None}}
    comparison["differences"][EVIL] = difference(-0.02, -0.03, 0.05, "not shown", 0.018)
    comparison["environment"]["device_name"] = EVIL
    return comparison


def test_untrusted_markup_is_text_on_the_page():
    comparison = hostile()
    html = render_html(comparison, plots(comparison))
    page = Page(html)
    assert not page.all("script") and page.balanced
    assert page.text.count("<script>alert('x')</script>") > 20


def test_untrusted_markup_is_text_in_markdown():
    from markdown_it import MarkdownIt

    comparison = hostile()
    markdown = render_markdown(comparison)
    page = Page(MarkdownIt("commonmark").enable("table").render(markdown))
    assert not page.all("script")
    assert page.text.count("<script>alert('x')</script>|`a`[red] $x_1$") > 8
    table = table_markdown(comparison).splitlines()
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
    assert len(bars) == 1 and len(table) == 2 + 1 + len(comparison["arms"])
    more = 1 + 1 + len(comparison["arms"]) - 1  # the arm that failed is in the first table alone
    assert len(page.all("tr")) == 1 + 1 + len(comparison["arms"]) + more + 3


def test_a_narrow_markdown_table_keeps_quality_and_costs():
    heading, _, base, *_ = table_markdown(image_comparison(), most=3).splitlines()
    assert heading == (
        "| Arm | Test accuracy | Against full | Verdict | Clean accuracy | Trained parameters | Training time | "
        "Peak memory | Checkpoint |"
    )
    assert base == "| Base, untuned | 67.3 % |  |  | 98.6 % |  |  |  |  |"


def test_a_fence_is_longer_than_any_run_of_backticks_in_the_text():
    assert fence("a\n````\nb").startswith("`````text\n") and fence("x").startswith("```text\n")
    assert fence("``\x00`").startswith("````text")
    assert escape("a|b\n<i>_x_") == r"a\|b &lt;i&gt;\_x\_"


def test_untrusted_markup_and_control_characters_are_text_in_the_terminal():
    comparison = hostile()
    comparison["title"] = "\x1b[31mred\x1b[0m [bold]b[/bold] \u202eright"
    shown = printed(comparison, force_terminal=False)
    assert "\x1b" not in shown and "\u202e" not in shown
    assert "[bold]b[/bold]" in shown and "[red]" in shown


# The terminal


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_table_fits_the_terminal_without_cut_figures(width):
    shown = printed(image_comparison(), width)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    assert "90.4 %" in shown and "What to try next" in shown
    assert ("Examples/s" in shown.split("(no room here")[0]) == (width >= 120)


def test_the_terminal_shows_why_an_arm_failed():
    shown = " ".join(printed(image_comparison(), 80).split())
    assert "✗ LoRA r=16 (lora-wide): out of memory: The process was killed by the system (signal 9) at step 3" in shown


def test_forgetting_is_below_a_narrow_table():
    assert "Clean accuracy before tuning" in " ".join(printed(image_comparison(), 60).split())
    assert "Clean accuracy before tuning" not in printed(image_comparison(), 120)


# Figures


def test_a_plot_without_data_is_left_out():
    assert [plot.name for plot in plots(image_comparison())] == [
        "difference", "parameters", "loss", "validation", "time", "rank", "forgetting", "memory", "checkpoint",
    ]  # fmt: skip
    assert "rank" not in [plot.name for plot in plots(sft_comparison())]
    assert plots({"arms": {}}) == []


def test_the_rank_curve_joins_only_arms_that_differ_only_in_rank():
    assert facts.rank_groups(image_comparison()) == [["lora-r2", "lora", "lora-r16"]]


def test_the_callers_matplotlib_settings_and_figures_are_unchanged():
    import matplotlib

    before = dict(matplotlib.rcParams)
    comparison = small()
    [plot.svg() for plot in plots(comparison)[:2]]
    assert dict(matplotlib.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_a_name_with_dollars_is_not_a_formula_in_a_figure():
    comparison = small()
    comparison["arms"] = {"full": comparison["arms"]["full"], r"a$\bad{$": comparison["arms"]["lora"]}
    assert r"a$\bad{$" in re.sub("<desc.*?</desc>", "", plots(comparison)[0].svg())


def test_arms_have_different_styles_even_without_colour():
    arms = {"full": {"method": "full"}, "head": {"method": "head"}} | {
        f"lora-{n}": {"method": "LORA"} for n in range(6)
    }
    styles = list(arm_styles({"arms": arms}).values())
    assert len({style.marker for style in styles}) == len({style.hatch for style in styles}) == len(styles)
    assert len({(style.colour, str(style.line)) for style in styles}) == len(styles)


def test_labels_are_spread_apart_and_stay_within_limits():
    spread = spread_out([5.0, 5.0, 5.1, 9.9], 1.0, 0.0, 10.0)
    ordered = sorted(spread)
    assert all(b - a >= 0.999 for a, b in itertools.pairwise(ordered)) and 0 <= ordered[0] <= ordered[-1] <= 10
    assert spread_out([], 1, 0, 1) == [] and spread_out([12.0], 1, 0, 10) == [10]


# Missing pieces


def without(path: str, value: object = None) -> dict:
    comparison = image_comparison()
    *parents, last = path.split("/")
    holder = comparison
    for step in parents:
        holder = holder[step]
    if value is None:
        holder.pop(last)
    else:
        holder[last] = value
    return comparison


NAN = float("nan")
INCOMPLETE = {
    "no base": without("base"),
    "no title": without("title"),
    "no differences": without("differences"),
    "no environment": without("environment"),
    "no rows": without("rows"),
    "no full": without("arms/full"),
    "no lora metric": without("arms/lora/metric"),
    "no curves": without("arms/lora/curves"),
    "no figures of lora": without("arms/lora", {"status": "ok", "metric": {"mean": 0.8, "sd": None, "values": [0.8]}}),
    "nan metric": without("arms/lora/metric", {"mean": NAN, "sd": NAN, "values": [NAN]}),
    "nan interval": without("differences/lora/ci95", [NAN, 0.1]),
    "nan memory": without("arms/full/peak_memory_bytes", NAN),
    "nan loss": without("arms/lora/curves", [{"seed": 0, "loss": [[1, NAN], [2, 1.0], [3, NAN]], "validation": []}]),
    "zero accuracy": without("arms/full/metric", {"mean": 0.0, "sd": 0.0, "values": [0.0]}),
    "head alone": image_comparison(arms={"head": image_comparison()["arms"]["head"]}, differences={}),
    "one failed arm": image_comparison(arms={"lora": image_comparison()["arms"]["lora-wide"]}, differences={}),
    "nothing": {"arms": {}},
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_an_incomplete_comparison_has_a_report(name):
    comparison = copy.deepcopy(INCOMPLETE[name])
    shown = render_html(comparison, []) + escape(render_markdown(comparison) + printed(comparison))
    shown += "".join(f"<p>{plot.title} {plot.caption} {plot.alt}</p>" for plot in plots(comparison))
    for arm in comparison["arms"]:
        assert sentences.verdict_sentence(comparison, arm)
    assert not re.search(r"\b(nan|None|inf)\b", Page(shown).text)


# What to try next


def advised(comparison: dict) -> str:
    return "\n".join(advice.next_steps(comparison))


def test_advice_for_a_worse_adapter_uses_the_other_arms():
    lines = advised(image_comparison())
    assert (
        "LoRA r=8 is 8.5 points worse than full fine-tuning. Higher ranks helped (rank 2 77.1 %, rank 16 81.8 %)"
        in lines
    )
    assert "`peft-recipes compare mnist-shift --arms full,lora --embedded --set arms.lora.peft.r=32`" in lines
    assert "More targets helped: adapting conv2 too took it from 80.2 % to 86.1 %" in lines


def test_a_higher_rank_that_did_not_help_is_not_advised():
    comparison = image_comparison()
    comparison["arms"]["lora-r16"]["metric"]["mean"] = comparison["arms"]["lora-r2"]["metric"]["mean"] + 0.002
    assert "A higher rank did not help" in advised(comparison) and "peft.r=" not in advised(comparison)


def test_an_adapter_at_the_learning_rate_of_full_should_try_ten_times_as_much():
    comparison = image_comparison()
    comparison["arms"]["lora"]["learning_rate"] = 3e-3
    assert "Its learning rate, 3e-3, is 1.0x full's" in advised(comparison)
    assert "--set arms.lora.learning_rate=3e-2" in advised(comparison)
    comparison["arms"]["lora"]["learning_rate"] = 3e-2
    assert "learning rate" not in advised(comparison)


def test_an_arm_no_better_than_the_base_learned_next_to_nothing():
    comparison = small(metric={"mean": 0.676, "sd": 0.001, "values": [0.676] * 3})
    assert "LoRA r=16 learned next to nothing (67.3 % before, 67.6 % after)" in advised(comparison)


def test_more_seeds_are_advised_only_where_the_verdict_is_open_or_rests_on_one():
    comparison = small()
    assert "--seeds" not in advised(comparison)
    comparison["differences"]["lora"] = difference(-0.01, -0.034, 0.013, "not shown")
    assert "About 6 times the evidence would bring it within 1 point." in advised(comparison)
    assert "`peft-recipes compare mnist-shift --seeds 0,1,2,3,4`" in advised(comparison)
    assert "rests on one seed" in advised(sft_comparison())


def test_memory_close_to_the_limit_is_pointed_out():
    comparison = small()
    comparison["environment"]["memory_bytes"] = 9_000_000_000
    assert "Full fine-tuning took 8.0 GB of this machine's 9.0 GB" in advised(comparison)
    comparison["environment"]["memory_bytes"] = 64_000_000_000
    assert "machine's" not in advised(comparison)


def test_an_arm_out_of_memory_should_halve_its_batch():
    assert "LoRA r=16 (lora-wide) ran out of memory: halve `training.per_device_train_batch_size`" in advised(
        image_comparison()
    )


def with_validation(*values: float) -> dict:
    points = [[25 * (index + 1), value] for index, value in enumerate(values)]
    return small(curves=[{"seed": 0, "loss": [], "validation": points}])


def test_more_steps_are_advised_while_validation_improves():
    lines = advised(with_validation(0.30, 0.36, 0.40, 0.44))
    assert "still getting better on validation at the end (40.0 % at step 75, 44.0 % at step 100)" in lines
    assert "training.max_steps=200" in lines


def test_validation_that_got_worse_means_too_long_training():
    assert "was best on validation at step 50 (44.0 %) and ended at 40.0 %" in advised(
        with_validation(0.3, 0.44, 0.42, 0.40)
    )
    assert "validation" not in advised(with_validation(0.30, 0.438, 0.44, 0.44))


def test_stand_ins_come_with_the_command_for_the_real_data():
    assert "`peft-recipes compare mnist-shift`" in advised(image_comparison())
    assert "stand-ins" not in advised(small())


def test_an_equivalent_adapter_should_try_half_the_rank():
    lines = advised(small())
    assert "--set arms.lora.peft.r=8`" in lines


def test_forgetting_and_slow_serving_are_pointed_out_with_their_numbers():
    lines = advised(small())
    assert "LoRA r=16 lost 1.9 points on clean (full fine-tuning lost 3.5 points)" in lines
    assert "`merge_and_unload`): an answer takes 0.79 ms with the adapter and 0.62 ms merged" in lines


def test_forgetting_names_a_gain_of_full():
    comparison = small()
    base = comparison["base"]["metrics"]["clean"]["accuracy"]
    comparison["arms"]["full"]["metrics"]["clean"]["accuracy"] = base + 0.012
    assert "LoRA r=16 lost 1.9 points on clean (full fine-tuning gained 1.2 points)" in advised(comparison)


def test_a_command_in_the_terminal_has_no_full_stop():
    shown = printed(small(), width=400)
    assert any(line.rstrip().endswith("--set arms.lora.peft.r=8") for line in shown.splitlines())


def test_missing_columns_of_a_narrow_terminal_are_named():
    narrow, wide = printed(image_comparison(), width=80), printed(image_comparison(), width=400)
    assert "(no room here for" in narrow and "they are in the report" in " ".join(narrow.split())
    assert "(no room here for" not in wide


def test_advice_is_short():
    assert 1 <= len(advice.next_steps(image_comparison())) <= advice.MOST_LINES
    assert advice.next_steps({"arms": {}}) == []


def test_latency_is_shown_at_any_width():
    """In the table, or below it in a narrow terminal."""
    comparison = sft_comparison()
    narrow, wide = printed(comparison, width=80), printed(comparison, width=240)
    assert "Latency at batch 1: the base 41.0 ms" in narrow and "48.0 ms (merged 41.5 ms)" in narrow.replace("\n", " ")
    assert "Latency at batch 1" not in wide and "48.0 ms" in wide and "merged 41.5" in wide
    table = rows.table(comparison)
    cells = {row.name: str(row.cells["latency_ms"]) for row in table.rows}
    assert cells["base"] == "41.0 ms" and "48.0 ms (merged 41.5)" in cells.values()
