"""The card of a run: its README.md, which the Hub reads; and the plots beside it.

`write_run_card` writes it when a run was trained alone; when a comparison is collected, `write_cards` writes those of
all its runs, with the verdict and every arm's figures.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.recipe import Recipe
from peft_recipes.runs import BASE, Run, read_run, write_text

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CARD = "README.md"
PLOTS = "plots"
# Of a comparison's figures those that help to judge one adapter.
_SHOWN = ("difference", "parameters", "forgetting", "loss", "rank")


def write_run_card(run: Run) -> None:
    """The card of a run that was trained alone, where it has none yet (a comparison may have written a fuller one)."""
    from peft_recipes.catalog import resolved_recipe

    if not run.ok or (run.folder / CARD).is_file():
        return
    recipe = resolved_recipe(run.folder / "recipe.yaml")
    plots = {} if run.data["arm"] == BASE else _own_plots(run, recipe)
    _write(run, recipe, None, plots)


def write_cards(comparison: dict[str, Any], folder: Path) -> list[Path]:
    """The cards of all finished runs of a comparison, with its verdict and table. Returns their paths.

    folder: the comparison's, with its plots. A run without its recipe.yaml (it was not made by this package, or was
    taken away) gets none.
    """
    from peft_recipes.catalog import resolved_recipe

    plots = {name: path for name in _SHOWN if (path := folder / PLOTS / f"{name}.png").is_file()}
    jobs = [(BASE, comparison["seeds"][0])] + [
        (arm, seed) for arm in comparison["arms"] for seed in comparison["seeds"]
    ]
    written = []
    for arm, seed in jobs:
        run = read_run(folder / arm / f"seed-{seed}")
        if run is not None and run.ok and (run.folder / "recipe.yaml").is_file():
            _write(run, resolved_recipe(run.folder / "recipe.yaml"), comparison, plots)
            written.append(run.folder / CARD)
    return written


def card_of(folder: Path, repo_id: str | None = None, license: str | None = None) -> ModelCard:
    """The card of a finished run's folder, as it is written for a repository of the Hub.

    Its comparison is the one that lies two folders above, where that holds this very run; license: of the base, where
    it is known.
    """
    from peft_recipes.cards.content import run_card
    from peft_recipes.catalog import resolved_recipe

    run = read_run(folder)
    assert run is not None
    recipe = resolved_recipe(folder / "recipe.yaml")
    return run_card(run, recipe, comparison_of(run), _plots_of(folder), repo_id=repo_id, license=license)


def comparison_of(run: Run) -> dict[str, Any] | None:
    """The comparison above a run's folder that has this very run among its figures."""
    from peft_recipes.comparison import read_comparison
    from peft_recipes.errors import RecipeError

    with contextlib.suppress(RecipeError):
        data = read_comparison(run.folder.resolve().parents[1]).data
        arm = data["arms"].get(run.data["arm"]) or {}
        values = (arm.get("metric") or {}).get("values") or []
        same = data["recipe"] == run.data["recipe"] and run.data["seed"] in (arm.get("seeds") or [])
        if same and run.metrics.get("test", {}).get(data["metric"]) in values:
            return data
    return None


def _write(run: Run, recipe: Recipe, comparison: dict[str, Any] | None, plots: dict[str, Path | bytes]) -> None:
    from peft_recipes.cards.content import run_card

    place = run.folder / PLOTS
    if place.is_dir():
        shutil.rmtree(place)
    for name, made in plots.items():
        place.mkdir(exist_ok=True)
        (place / f"{name}.png").write_bytes(made if isinstance(made, bytes) else made.read_bytes())
    write_text(run.folder / CARD, str(run_card(run, recipe, comparison, list(plots))))


def _own_plots(run: Run, recipe: Recipe) -> dict[str, bytes]:
    """The loss of a run that was trained alone."""
    from peft_recipes.cards.content import alone
    from peft_recipes.reporting import drawing
    from peft_recipes.reporting.curves import loss_curves

    with drawing.look():
        plot = loss_curves(alone(run, recipe))
    return {} if plot is None else {"loss": plot.png()}


def _plots_of(folder: Path) -> list[str]:
    there = [path.stem for path in sorted((folder / PLOTS).glob("*.png"))]
    return [name for name in _SHOWN if name in there]
