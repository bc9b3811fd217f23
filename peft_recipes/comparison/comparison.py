"""`Comparison`: the results of a comparison, read from comparison.json in the caller's process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError, unknown
from peft_recipes.runs.folder import BASE, UNFINISHED, read_comparison_file

if TYPE_CHECKING:
    import pandas


class Comparison:
    """A comparison: `data` is comparison.json, `folder` the folder that holds it."""

    def __init__(self, data: dict[str, Any], folder: Path):
        self.data, self.folder = data, folder

    @property
    def provisional(self) -> bool:
        """Whether its runs were still being trained, or it was interrupted, when comparison.json was written."""
        return bool(self.data.get("provisional"))

    @property
    def failed(self) -> list[str]:
        """The arms with at least one failed run."""
        base = [BASE] if self.data["base"]["status"] not in ("ok", *UNFINISHED) else []
        return base + [name for name, arm in self.data["arms"].items() if arm["failures"]]

    @property
    def failed_checks(self) -> list[str]:
        """The arms with a run whose figures are kept, but of which a check failed after training."""
        rows = {BASE: self.data["base"], **self.data["arms"]}
        return [name for name, row in rows.items() if row.get("failed_checks")]

    def verdict(self, arm: str) -> str:
        """The difference between this arm and full fine-tuning in one sentence, with its interval."""
        if arm not in self.data["arms"]:
            raise RecipeError(unknown("arm", arm, self.data["arms"], f"the comparison of {self.data['recipe']}"))
        from peft_recipes.reporting.sentences import verdict_sentence

        return verdict_sentence(self.data, arm)

    def table(self) -> str:
        """The results as a Markdown table."""
        from peft_recipes.reporting.markdown import table_markdown

        return table_markdown(self.data)

    def to_pandas(self) -> pandas.DataFrame:
        """The results as numbers, one row for each arm and the base."""
        import pandas

        from peft_recipes.reporting.records import records

        return pandas.DataFrame(records(self.data))

    def show(self) -> None:
        """Show the HTML report in a notebook, or the table in a terminal."""
        try:
            from IPython import get_ipython
            from IPython.display import HTML, display
        except ImportError:
            get_ipython = None
        if get_ipython is not None and get_ipython() is not None:
            display(HTML(self._repr_html_()))
            return
        from rich.console import Console

        from peft_recipes.reporting.terminal import render_terminal

        render_terminal(self.data, Console())

    def _repr_html_(self) -> str:
        """The HTML report in an iframe, which isolates its style from the notebook's."""
        from html import escape

        from peft_recipes.reporting.html import render_html

        page = escape(render_html(self.data), quote=True)
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 40em; border: 0"></iframe>'

    def __repr__(self) -> str:
        return f"Comparison({self.data['recipe']}: {', '.join(self.data['arms'])}; seeds {self.data['seeds']})"


def read_comparison(folder: str | Path) -> Comparison:
    """Read the comparison of a folder. Raises RecipeError if there is none or it can't be read."""
    return Comparison(read_comparison_file(folder), Path(folder))
