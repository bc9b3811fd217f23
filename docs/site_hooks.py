"""mkdocs hooks: reference pages from the code, reports and plots of the kept comparisons, links out of docs/.

Nothing generated here is in git. mkdocs.yml names this file under `hooks`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
import write_reference  # noqa: E402

_PART = re.compile(rf"^<!-- ({'|'.join(write_reference.PARTS)}) -->$", re.MULTILINE)
# [text](target) and ![text](target) whose target is a file of the repository.
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)\)")
_PLOT = re.compile(r'(<img src=")(?:\.\./)+adapters/([^/"]+/plots/[^"]+")')
KEPT = ("comparison.html", "plots/*.png")  # of each comparison below adapters/


def on_files(files: Files, config: Any) -> Files:
    """Adds the reports and plots of the kept comparisons, copied from adapters/ at build time."""
    for comparison in sorted(ROOT.glob("adapters/*/comparison.json")):
        folder = comparison.parent
        for path in sorted(found for pattern in KEPT for found in folder.glob(pattern)):
            target = f"gallery/{folder.name}/{path.relative_to(folder).as_posix()}"
            files.append(File.generated(config, target, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fills in the reference, and turns links to files outside docs/ into what the site has of them."""
    if page.file.src_uri == "index.md" or page.file.src_uri.startswith("gallery/"):
        page.meta.setdefault("hide", ["navigation", "toc"])  # the tables of figures need the width
    text = _PART.sub(lambda match: write_reference.PARTS[match[1]](), markdown)
    here = Path(page.file.src_uri).parent
    text = _PLOT.sub(rf"\1{'../' * len(here.parts)}gallery/\2", text)
    return _LINK.sub(lambda match: _link(match, here), text)


def _link(match: re.Match[str], here: Path) -> str:
    """A link as the site takes it: to a copied file, to a page, or, for other files of the repository, their path."""
    image, text, target = match.groups()
    path = (ROOT / "docs" / here / target).resolve()
    if path.is_relative_to(ROOT / "docs"):
        return match[0]
    if not path.exists():
        raise FileNotFoundError(f"docs/{here}: {target} is not in the repository")
    name = path.relative_to(ROOT).as_posix()
    copied = re.fullmatch(r"adapters/([^/]+)/(comparison\.html|plots/[^/]+\.png)", name)
    if copied:
        up = "../" * len(here.parts)
        return f"{image}[{text}]({up}gallery/{copied[1]}/{copied[2]})"
    return f"`{name}`" if text in (name, path.name) else f"{text} (`{name}`)"
