"""Model cards (Markdown) as HTML. Their text is not trusted: no markup but `<details>`, no image from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from peft_recipes.cards.redaction import without_paths

_FRONT_MATTER = re.compile(r"\A---\r?\n.*?^---\r?\n", re.DOTALL | re.MULTILINE)
_FOLD = re.compile(r"\s*(?:</?details>|<summary>[^<>]*</summary>)(?:\s*(?:</?details>|<summary>[^<>]*</summary>))*\s*")
_ADDRESS = re.compile(r"https?://|#|mailto:")
IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
MOST_BYTES = 5_000_000  # of a card or an image; larger ones are left out


def card_html(text: str, folder: Path, image: Callable[[Path], str]) -> str:
    """Return the card's text, without its front matter, as HTML.

    folder: the card's, which holds its images. image: takes the path of an image, returns its address on the page.
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    parser.add_render_rule("html_block", _markup)
    parser.add_render_rule("html_inline", _markup)
    parser.add_render_rule("image", lambda self, tokens, index, *_: _image(tokens[index], folder, image))
    tokens = parser.parse(without_paths(_FRONT_MATTER.sub("", text)))
    for token in tokens:
        _without_local_links(token)
    # A wide table scrolls in a box of its own.
    html = parser.renderer.render(tokens, parser.options, {})
    return html.replace("<table>", '<div class="scroll" tabindex="0"><table>').replace("</table>", "</table></div>")


def _markup(self: Any, tokens: Any, index: int, *_: Any) -> str:
    content = tokens[index].content
    return content if _FOLD.fullmatch(content) else escape(content)


def _image(token: Any, folder: Path, image: Callable[[Path], str]) -> str:
    """An image that lies in the card's folder; of any other its alternative text."""
    source, alt = str(token.attrs.get("src") or ""), escape(token.content)
    path = folder / source
    inside = path.resolve().is_relative_to(folder.resolve()) and path.suffix.lower() in IMAGES and path.is_file()
    if not inside or path.stat().st_size > MOST_BYTES:
        return f"<em>{alt}</em>"
    return f'<img src="{escape(image(path))}" alt="{alt}" loading="lazy">'


def _without_local_links(token: Any) -> None:
    """Turn links to files of the folder, which the gallery does not copy, into their text."""
    local = 0
    for child in token.children or []:
        if child.type == "link_open" and not _ADDRESS.match(str(child.attrs.get("href") or "")):
            local, child.type, child.tag, child.attrs = local + 1, "em_open", "em", {}
        elif child.type == "link_close" and local:
            local, child.type, child.tag = local - 1, "em_close", "em"
