"""The card of a comparison on the Hub: the figures of all arms and the repositories of the adapters."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCard, ModelCardData, constants

from peft_recipes.cards.content import PLOT_TITLES
from peft_recipes.cards.metadata import pipeline
from peft_recipes.reporting import details, facts, sentences
from peft_recipes.reporting.markdown import escape, pipe_table, table_markdown


def index_card(comparison: dict[str, Any], chosen: dict[str, tuple[str, int]], plots: list[str]) -> ModelCard:
    """Return the card. comparison: without paths of this machine. chosen: arm -> its repository and the seed in it."""
    tags = ["peft-recipes", "comparison", facts.plain(comparison["recipe"])]
    tags += ["embedded-stand-in"] if comparison.get("embedded") else []
    data = ModelCardData(library_name="peft", tags=tags, pipeline_tag=pipeline(comparison["task"]))
    lines = [f"# {escape(comparison.get('title') or comparison['recipe'])}: all arms", ""]
    if (name := sentences.headline_arm(comparison)) is not None:
        lines += [f"> **{escape(sentences.verdict_headline(comparison, name))}**"]
        lines += [f">\n> *{escape(caveat)}*" for caveat in sentences.caveats(comparison, name)]
    rows = []
    for arm, (repo_id, seed) in chosen.items():
        link = f"[{repo_id}]({constants.ENDPOINT}/{repo_id})"
        seeds = facts.seeds_done(facts.arms(comparison)[arm])
        which = f"{seed} (the median of {seeds})" if seeds > 1 else str(seed)
        rows.append([link, which, escape(sentences.verdict_headline(comparison, arm))])
    lines += ["", "The weights are in:", "", pipe_table(["Adapter", "Seed", "Verdict"], rows, left=(0, 2))]
    lines += ["", "## What was measured", "", table_markdown(comparison), ""]
    for plot in plots:
        title = PLOT_TITLES.get(plot, plot.capitalize())
        lines += [f"![{title}](plots/{plot}.png)", ""]
    lines += ["## How it was measured", ""]
    lines += [f"- {escape(name)}: {escape(value)}" for name, value in details.conditions(comparison)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")
