"""In a real browser: the page's tables fit a window of 1,200 pixels, and nothing is cut in a narrow one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from comparison_fixture import crowded_comparison, image_comparison, sft_comparison, with_scored_answers

from peft_recipes.reporting.html import render_html

ROOT = Path(__file__).parents[2]
KEPT = {path.parent.name: path for path in sorted((ROOT / "adapters").glob("*/comparison.json"))}
MADE = {
    "pictures": image_comparison,
    "answers": lambda: with_scored_answers(sft_comparison()),
    "crowded": crowded_comparison,
}
LOADED = "document.readyState === 'complete' && document.querySelector('table') !== null"
OPENED = "(document.querySelectorAll('details').forEach(each => each.open = true), true)"
# The boxes that scroll sideways, by name, and the page itself.
SCROLLING = """[...document.querySelectorAll('.scroll'), document.documentElement]
    .filter(box => box.clientWidth > 0 && box.scrollWidth > box.clientWidth)
    .map(box => box.getAttribute('aria-labelledby') || box.getAttribute('aria-label') || 'page')"""
# Texts that are wider than the box they are in, outside the boxes that scroll.
CUT = """[...document.querySelectorAll('body *')]
    .filter(each => !each.closest('.scroll, svg, .hidden') && each.getClientRects().length > 0)
    .filter(each => each.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
    .map(each => each.tagName + ': ' + each.textContent.slice(0, 60))"""
# Cells of the first table whose text is wider than the cell, or lies over a neighbour.
OVERLAPPING = """[...document.querySelectorAll('#table > .scroll :is(th, td)')]
    .filter(each => each.scrollWidth > each.clientWidth + 1).map(each => each.textContent)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")
    opened = Browser(CHROMIUM, tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


def page_of(name: str, folder: Path) -> str:
    comparison = MADE[name]() if name in MADE else json.loads(KEPT[name].read_text("utf-8"))
    path = folder / "comparison.html"
    path.write_text(render_html(comparison, []), "utf-8")
    return path.as_uri()


@pytest.mark.parametrize("name", [*KEPT, *MADE])
def test_no_table_scrolls_in_a_window_of_1200_pixels(browser, tmp_path, name):
    visited = browser.visit(page_of(name, tmp_path), [LOADED, OVERLAPPING, OPENED, SCROLLING, CUT], width=1200)
    on_demand = ["More figures of each arm"] if name == "crowded" else []  # thirteen columns
    assert [visited[1], *visited[3:]] == [[], on_demand, []]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", MADE)
def test_a_narrow_window_cuts_nothing(browser, tmp_path, name, dark):
    scrolling, cut = browser.visit(page_of(name, tmp_path), [LOADED, OPENED, SCROLLING, CUT], width=400, dark=dark)[2:]
    assert "page" not in scrolling and cut == []


def test_the_rest_of_the_figures_needs_no_script(browser, tmp_path):
    height = "document.querySelector('#more-figures').offsetHeight"
    click = "(document.querySelector('#more-figures summary').click(), true)"
    steps = [f"{LOADED} && {height}", click, f"{height} > 200 && {height}"]
    closed, _, opened = browser.visit(page_of("answers", tmp_path), steps, width=1200)
    assert closed < 100 < opened
