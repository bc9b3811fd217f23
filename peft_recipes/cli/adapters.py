"""Commands that check and transform saved adapters: check, merge, combine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from peft_recipes.cli.common import ADAPTERS, Adapter, Adapters, Base, Json, Trust, command, show, unless_refused
from peft_recipes.errors import RecipeError


@command(ADAPTERS)
def check(
    adapter: Adapter,
    base: Base = "",
    quick: Annotated[bool, Option("--quick", help="Check files and shapes only; load no base weights.")] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Check a saved adapter, from any tool: files, fit to the base, outputs, merging. Exit 1 if a check fails."""
    from peft_recipes.adapters.check import check_adapter
    from peft_recipes.cli.output.results import show_findings

    findings = check_adapter(adapter, base or None, weights=not quick, trust_remote_code=trust_remote_code)
    show(as_json, [vars(finding) for finding in findings], lambda: show_findings(findings))
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(1)


@command(ADAPTERS)
def merge(
    adapter: Adapter,
    output: Annotated[Path, Option("--output", metavar="DIR", help="Write the merged model to this folder.")],
    base: Base = "",
    tolerance: Annotated[
        float, Option("--tolerance", metavar="F", help="Allow this difference, relative to the logits' size.")
    ] = 1e-3,
    dtype: Annotated[
        str,
        Option("--dtype", metavar="TYPE", help="Store float32, bfloat16 or float16 weights (default: as the base)."),
    ] = "",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base, verified on real inputs, and save a plain transformers model."""
    from peft_recipes.adapters.merge import merge_adapter
    from peft_recipes.cli.output.answers import show_merge

    options = {"tolerance": tolerance, "dtype": dtype or None, "trust_remote_code": trust_remote_code}
    result = unless_refused(merge_adapter, adapter, output, base or None, **options)
    show(as_json, result, lambda: show_merge(result, output), ensure_ascii=False)


@command(ADAPTERS)
def combine(
    adapters: Adapters,
    output: Annotated[Path, Option("--output", metavar="DIR", help="Write the combined adapter to this folder.")],
    weights: Annotated[
        str, Option("--weights", metavar="0.5,0.5", help="Weight the adapters, in order (default: equally).")
    ] = "",
    method: Annotated[
        str,
        Option(
            "--method",
            help="Use linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune; the last four also with _svd.",
        ),
    ] = "svd",
    density: Annotated[
        float | None,
        Option("--density", metavar="F", help="Keep this share of the values in ties, dare and prune (0.5)."),
    ] = None,
    rank: Annotated[int | None, Option("--rank", metavar="N", help="Limit the rank that svd keeps.")] = None,
    seed: Annotated[int, Option("--seed", metavar="N", help="Seed the random choice of dare.")] = 0,
    base: Base = "",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Combine adapters of one base into one, evaluated on each adapter's test set before it is saved."""
    from peft_recipes.adapters.combine import combine_adapters
    from peft_recipes.cli.output.answers import show_combination

    options = {"density": density, "rank": rank, "seed": seed, "base": base or None}
    result = unless_refused(
        combine_adapters, adapters, output, _numbers(weights), method, trust_remote_code=trust_remote_code, **options
    )
    show(as_json, result, lambda: show_combination(result, output), ensure_ascii=False)


def _numbers(text: str) -> list[float] | None:
    try:
        return [float(number) for number in text.split(",")] if text.strip() else None
    except ValueError:
        raise RecipeError(f"--weights {text}: expected numbers with commas between them, as in 0.5,0.5.") from None
