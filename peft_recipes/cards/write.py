"""The card of a run: its README.md, which the Hub reads; and the plots beside it.

`write_run_card` writes it when a run was trained alone; when a comparison is collected, `write_cards` writes those of
all its runs, with the verdict and every arm's figures.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import write_text
from peft_recipes.runs.folder import BASE, Run, read_comparison_file, read_run

CARD = "README.md"
PLOTS = "plots"
# Of a comparison's figures those that help to judge one adapter.
_SHOWN = ("difference", "parameters", "forgetting", "loss", "rank")


def write_run_card(run: Run) -> None:
    """The card of a run that was trained alone, where it has none yet (a comparison may have written a fuller one)."""
    from peft_recipes.runs.folder import resolved_recipe

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
    from peft_recipes.runs.folder import resolved_recipe

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


def published_card(folder: Path, repo_id: str, license: str | None = None) -> str:
    """The card of a finished run's folder, for a repository of the Hub: the one that lies there, however it was edited.

    license: of the base, where the card names none. Raises RecipeError for front matter that can't be read.
    """
    import yaml
    from huggingface_hub import ModelCard

    from peft_recipes.cards.content import run_card
    from peft_recipes.cards.loading_code import placed_at
    from peft_recipes.errors import RecipeError
    from peft_recipes.runs.folder import resolved_recipe

    if (folder / CARD).is_file():
        try:
            card = ModelCard.load(folder / CARD)
        except (ValueError, OSError, yaml.YAMLError) as error:
            raise RecipeError(f"{folder / CARD}: {' '.join(str(error).split())[:200]}") from error
    else:  # of a run from before there were cards
        run = read_run(folder)
        assert run is not None
        card = run_card(run, resolved_recipe(folder / "recipe.yaml"), comparison_of(run), _plots_of(folder))
    if license and not card.data.get("license"):
        card.data.license = license
    if card.data.get("eval_results"):
        card.data.model_name = repo_id.partition("/")[2]
    return placed_at(str(card), repo_id)


def comparison_of(run: Run) -> dict[str, Any] | None:
    """The comparison above a run's folder that has this very run among its figures."""
    from peft_recipes.errors import RecipeError

    with contextlib.suppress(RecipeError, IndexError, KeyError):
        data = read_comparison_file(run.folder.resolve().parents[1])
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
    from peft_recipes.reporting import figure_style
    from peft_recipes.reporting.curves import loss_curves

    with figure_style.look():
        plot = loss_curves(alone(run, recipe))
    return {} if plot is None else {"loss": plot.png()}


def _plots_of(folder: Path) -> list[str]:
    there = [path.stem for path in sorted((folder / PLOTS).glob("*.png"))]
    return [name for name in _SHOWN if name in there]
