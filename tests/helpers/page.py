"""The tags and the text of an HTML page, and a text that is markup wherever it is not escaped."""

from __future__ import annotations

from html.parser import HTMLParser

EVIL = "<script>alert('x')</script>|`a`[red]\n$x_1$"


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text without style."""

    VOID = ("meta", "link", "img", "br", "path", "use")

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.open, self.balanced = "", [], True
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            self.balanced &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] != ["style"] else ""

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]
