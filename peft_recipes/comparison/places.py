"""The places where runs can be trained (`--on`), checked before anything heavy is imported."""

from __future__ import annotations

from peft_recipes.errors import RecipeError, unknown

LOCAL, RAY = "local", "ray"


def check_place(on: str, address: str | None) -> None:
    """Raise RecipeError for a place that does not exist, an address without Ray, and Ray where it is not installed."""
    if on not in (LOCAL, RAY):
        raise RecipeError(unknown("place to run", on, (LOCAL, RAY), "--on"))
    if on == LOCAL and address is not None:
        raise RecipeError(f"--address {address} names a Ray cluster: add --on ray.")
    if on == RAY:
        from peft_recipes.cluster.connection import check_installed

        check_installed()
