"""The gallery in a real browser, opened from the disk: filters, their state in the address, the figure, the width."""

from __future__ import annotations

import pytest
from browser import CHROMIUM, Browser
from galleries import fill

from peft_recipes.gallery.write import write_gallery

READY = "document.documentElement.dataset.ready"
SHOWN = "[...document.querySelectorAll('.entry:not([hidden]) h3')].map(each => each.textContent.slice(0, 7))"
ROWS = "[...document.querySelectorAll('.entry:not([hidden]) tbody tr:not([hidden]):not(.aside) th')]"
POINTS = "String(document.querySelectorAll('#plot .point').length)"
COUNT = "document.querySelector('#count').textContent"
# What is wider than the window, or cut by its own box; nothing but a card's tables may scroll.
WIDE = """[...document.querySelectorAll('body *')].filter(each => !each.closest('.hidden, .scroll'))
    .filter(each => each.getClientRects().length)
    .filter(each => each.getBoundingClientRect().right > document.documentElement.clientWidth + 1
        || (each.scrollWidth > each.clientWidth + 1 && getComputedStyle(each).overflowX !== 'visible'
            && getComputedStyle(each).textOverflow !== 'ellipsis'))
    .map(each => each.tagName + '.' + each.className + ': ' + each.textContent.slice(0, 40))"""
PAGE_SCROLLS = "[document.documentElement.scrollWidth > document.documentElement.clientWidth]"
OPENED = "(document.querySelectorAll('details').forEach(each => each.open = true), true)"


def chosen(name: str, value: str) -> str:
    """Choose an option as a user does: the value, then the event of the control."""
    control = f"document.querySelector('#{name}')"
    return f"({control}.value = {value!r}, {control}.dispatchEvent(new Event('input')), true)"


def key(name: str) -> str:
    event = f"new KeyboardEvent('keydown', {{key: {name!r}, cancelable: true}})"
    return f"(document.querySelector('#plot').dispatchEvent({event}), true)"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    write_gallery(fill(folder / "runs"), folder / "site")
    return (folder / "site" / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")
    opened = Browser(CHROMIUM, tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 800, 1200])
def test_nothing_is_wider_than_the_window(browser, address, width, dark):
    scrolls, wide = browser.visit(address, [READY, OPENED, PAGE_SCROLLS, WIDE], width=width, dark=dark)[2:]
    assert scrolls == [False] and wide == []
    card = address.replace("index.html", "pages/images-mnist-shift/LoRA-r-8-0.html")
    loaded = "document.readyState === 'complete' && document.querySelector('table') !== null"
    assert browser.visit(card, [loaded, OPENED, PAGE_SCROLLS, WIDE], width=width, dark=dark)[2:] == [[False], []]


def test_filters_choose_entries_rows_and_points_and_the_address_has_them(browser, address):
    names = f"{ROWS}.map(each => each.textContent.trim())"
    steps = [READY, SHOWN, POINTS, chosen("task", "sft"), SHOWN, POINTS, "location.hash",
             chosen("verdict", "equivalent"), names, POINTS, COUNT, "location.hash",
             chosen("verdict", "worse"), "!document.querySelector('#nothing').hidden",
             "(document.querySelector('#again').click(), true)", SHOWN, "[location.hash]"]  # fmt: skip
    _, every, points, _, tasks, two, first, _, rows, one, count, second, _, nothing, _, again, none = browser.visit(
        f"{address}#", steps
    )
    assert every == again == ["Digits ", "Answers", "alone", "adapter"] and points == "7"  # one of six has no figures
    assert tasks == ["Answers"] and two == "2" and first == "#task=sft"
    assert rows == ["LoRA r=16"] and one == "1" and count == "1 arm in 1 entry"
    assert second == "#task=sft&verdict=equivalent" and nothing and none == [""]


def test_a_linked_view_opens_filtered_and_unknown_values_are_ignored(browser, address):
    given = "#q=images&method=LoRA&verdict=none-of-these&y=gain&nonsense=1"
    steps = [READY, SHOWN, "document.querySelector('#method').value", "[document.querySelector('#verdict').value]",
             "document.querySelector('#plot text').textContent", "location.hash"]  # fmt: skip
    shown, method, verdict, title, kept = browser.visit(f"{address}?linked{given}", steps)[1:]
    assert shown == ["Digits "] and method == "LoRA" and verdict == [""]
    assert title.startswith("Share of full's gain") and kept == "#q=images&method=LoRA&y=gain"


def test_options_count_what_they_would_show(browser, address):
    texts = "[...document.querySelector('#method').options].map(each => each.text)"
    before, after = browser.visit(f"{address}?counts#", [READY, texts, chosen("task", "sft"), texts])[1::2]
    assert before == ["All methods", "Full fine-tuning (2)", "Head only (1)", "LoRA (9)"]
    assert after == ["All methods", "Full fine-tuning (1)", "Head only (0)", "LoRA (2)"]


def test_the_keyboard_walks_through_the_points_to_the_row_of_one(browser, address):
    tip = "document.querySelector('#tip:not([hidden])').textContent"
    steps = [READY, key("ArrowRight"), tip, key("End"), tip, key("Enter"), "document.activeElement.textContent",
             key("Escape"), "document.querySelector('#tip').hidden"]  # fmt: skip
    first, last, row = browser.visit(f"{address}?keys#", steps)[2:7:2]
    assert first.startswith("Head only") and "1,290" in first and "worse" in first
    assert "LoRA r=16" in last and "lora-all" in row and "not shown" in row


def test_a_method_of_the_key_filters(browser, address):
    press = "(document.querySelector('#keys button').click(), true)"
    pressed = "document.querySelector('#keys button').getAttribute('aria-pressed')"
    steps = [READY, press, pressed, "location.hash", press, pressed, "[location.hash]"]
    on, hashed, _, off, cleared = browser.visit(f"{address}?key#", steps)[2:]
    assert (on, hashed, off, cleared) == ("true", "#method=Head+only", "false", [""])


def test_only_its_own_files_are_requested(browser, address):
    browser.requests.clear()
    browser.visit(f"{address}?own", [READY])
    folder = address.rpartition("/")[0]
    assert browser.requests and all(each.startswith((folder, "data:")) for each in browser.requests)
