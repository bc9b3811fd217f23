"""Write the model cards of runs (README.md) and their plots.

`write_run_card` writes the card of a single run. `write_cards` writes those of all runs of a comparison, with the
verdict and the figures of every arm.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from peft_recipes.errors import RecipeError
from peft_recipes.guards.runner import error_words
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import write_json, write_text
from peft_recipes.runs.folder import BASE, RUN_FILE, Run, read_comparison_file, read_run, resolved_recipe

CARD = "README.md"
PLOTS = "plots"
# The plots of a comparison that help to judge one adapter.
_SHOWN = ("difference", "parameters", "forgetting", "loss", "rank")


def write_run_card(run: Run) -> None:
    """Write the card of a single run, unless it has one (that of a comparison says more)."""
    if not run.ok or (run.folder / CARD).is_file():
        return
    recipe = resolved_recipe(run.folder / "recipe.yaml")
    _write(run, recipe, None, {} if run.data["arm"] == BASE else _loss_plot(run, recipe))


def write_cards(comparison: dict[str, Any], folder: Path) -> list[Path]:
    """Write the cards of all finished runs of a comparison, with its verdict and table; return their paths.

    folder: the comparison's folder, with its plots. A run without a recipe.yaml gets no card.
    """
    plots = {name: path for name in _SHOWN if (path := folder / PLOTS / f"{name}.png").is_file()}
    seeds = comparison["seeds"]
    jobs = [(BASE, seeds[0])] + [(arm, seed) for arm in comparison["arms"] for seed in seeds]
    written = []
    for arm, seed in jobs:
        run = read_run(folder / arm / f"seed-{seed}")
        if run is not None and run.ok and (run.folder / "recipe.yaml").is_file():
            try:
                _write(run, resolved_recipe(run.folder / "recipe.yaml"), comparison, plots)
                written.append(run.folder / CARD)
            except Exception as error:  # the comparison is written, and the other cards do not depend on this one
                run.data.setdefault("checks", {})["card"] = {"error": error_words(error)}
                write_json(run.folder / RUN_FILE, run.data)
    return written


def published_card(folder: Path, repo_id: str, license: str | None = None) -> str:
    """Return the card of a run's folder for a repository on the Hub, with the user's edits.

    license: of the base, if the card has none. Raises RecipeError for front matter that can't be parsed.
    """
    import yaml
    from huggingface_hub import ModelCard

    from peft_recipes.cards.content import run_card
    from peft_recipes.cards.loading_code import for_repository

    if (folder / CARD).is_file():
        try:
            card = ModelCard.load(folder / CARD)
        except (ValueError, OSError, yaml.YAMLError) as error:
            raise RecipeError(f"{folder / CARD}: {' '.join(str(error).split())[:200]}") from error
    else:  # a run of an older version
        run = read_run(folder)
        plots = [name for name in _SHOWN if (folder / PLOTS / f"{name}.png").is_file()]
        assert run is not None
        card = run_card(run, resolved_recipe(folder / "recipe.yaml"), comparison_of(run), plots)
    if license and not card.data.get("license"):
        card.data.license = license
    if card.data.get("eval_results"):
        card.data.model_name = repo_id.partition("/")[2]
    return for_repository(str(card), repo_id)


def comparison_of(run: Run) -> dict[str, Any] | None:
    """Return the finished comparison in the folder above a run, if its figures contain this run."""
    with contextlib.suppress(RecipeError, IndexError, KeyError):
        data = read_comparison_file(run.folder.resolve().parents[1])
        if data.get("provisional"):
            return None  # no evidence yet
        arm = data["arms"].get(run.data["arm"]) or {}
        values = (arm.get("metric") or {}).get("values") or []
        same = data["recipe"] == run.data["recipe"] and run.data["seed"] in (arm.get("seeds") or [])
        if same and run.metrics.get("test", {}).get(data["metric"]) in values:
            return data
    return None


def _write(run: Run, recipe: Recipe, comparison: dict[str, Any] | None, plots: dict[str, Path | bytes]) -> None:
    from peft_recipes.cards.content import run_card

    folder = run.folder / PLOTS
    if folder.is_dir():
        shutil.rmtree(folder)
    for name, image in plots.items():
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.png").write_bytes(image if isinstance(image, bytes) else image.read_bytes())
    write_text(run.folder / CARD, str(run_card(run, recipe, comparison, list(plots))))


def _loss_plot(run: Run, recipe: Recipe) -> dict[str, bytes]:
    from peft_recipes.cards.content import single_run_comparison
    from peft_recipes.reporting import figure_style
    from peft_recipes.reporting.curves import loss_curves

    with figure_style.look():
        plot = loss_curves(single_run_comparison(run, recipe))
    return {} if plot is None else {"loss": plot.png()}
