"""What a scan tries: the arms, their ranks and learning rates, parsed from the user's options."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from peft_recipes.errors import RecipeError
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.recipe import Recipe

AROUND = (0.1, 0.3, 1.0, 3.0, 10.0)  # default learning rates, as multiples of the arm's own
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Candidate:
    """One arm at one rank and its learning rates, lowest first. of: the recipe's arm that it was derived from."""

    name: str
    arm: Arm
    learning_rates: tuple[float, ...]
    of: str

    @property
    def rank(self) -> int | None:
        """The adapter's rank; None if its method has none."""
        return getattr(self.arm.peft, "r", None)


def candidates(
    recipe: Recipe, arms: Sequence[str], rates: Sequence[float] | None = None, ranks: Sequence[int] | None = None
) -> list[Candidate]:
    """The arms of a recipe with their learning rates; an adapter with a rank appears once for each of `ranks`.

    rates: None for a few around each arm's own. A changed rank keeps the arm's scale (alpha / r), up to rounding alpha
    to an integer. Raises RecipeError if `ranks` are given and no arm has one.
    """
    by_name: dict[str, Candidate] = {}
    for arm_name in arms:
        arm = recipe.arms[arm_name]
        tried = tuple(sorted(set(rates))) if rates else tuple(_two_digits(arm.learning_rate * f) for f in AROUND)
        for name, changed in _at_ranks(arm_name, arm, ranks):
            by_name[name] = Candidate(name, changed, tried, arm_name)
    if ranks and all(candidate.rank is None for candidate in by_name.values()):
        raise RecipeError(f"--ranks: none of the arms {', '.join(arms)} has a rank. Name one that does with --arms.")
    return list(by_name.values())


def _at_ranks(name: str, arm: Arm, ranks: Sequence[int] | None) -> list[tuple[str, Arm]]:
    own_rank = getattr(arm.peft, "r", None)
    if not ranks or own_rank is None:
        return [(name, arm)]
    variants = []
    for rank in sorted(set(ranks)):
        config = copy.deepcopy(arm.peft)
        config.r = rank
        if getattr(config, "lora_alpha", None) is not None and not getattr(config, "use_rslora", False):
            config.lora_alpha = max(round(config.lora_alpha * rank / own_rank), 1)
        variant = name if rank == own_rank else f"{re.sub(r'-r[0-9]+$', '', name)}-r{rank}"
        variants.append((variant, dataclasses.replace(arm, method=config)))
    return variants


def with_learning_rates(recipe: Recipe, chosen: dict[str, tuple[Candidate, float]]) -> Recipe:
    """The recipe with the candidates' arms added or replaced, each at its learning rate."""
    changed = {
        name: dataclasses.replace(candidate.arm, learning_rate=learning_rate)
        for name, (candidate, learning_rate) in chosen.items()
    }
    return dataclasses.replace(recipe, arms={**recipe.arms, **changed})


def read_learning_rates(text: str) -> list[float] | None:
    """Parse "1e-5:3e-3:6" (low, high, count; logarithmically spaced) or "1e-4,3e-4"; None for ""."""
    if not text.strip():
        return None
    error = RecipeError(
        f"--learning-rates {text}: expected LOW:HIGH:COUNT, as in 1e-5:3e-3:6, or learning rates separated by commas, "
        "as in 1e-4,3e-4,1e-3; all above 0."
    )
    try:
        if ":" not in text:
            values = {float(part) for part in text.split(",")}
        else:
            low, high, count = (read(part) for read, part in zip((float, float, int), text.split(":"), strict=True))
            if not 0 < low < high < float("inf") or not 2 <= count <= 50:
                raise error
            values = {_two_digits(low * (high / low) ** (i / (count - 1))) for i in range(count)}
    except ValueError:
        raise error from None
    if not all(0 < value < float("inf") for value in values):
        raise error
    return sorted(values)


def read_ranks(text: str) -> list[int] | None:
    """Parse "2,4,8"; None for ""."""
    if not text.strip():
        return None
    try:
        ranks = [int(part) for part in text.split(",")]
    except ValueError:
        ranks = []
    if not ranks or min(ranks) < 1:
        raise RecipeError(f"--ranks {text}: expected whole numbers of 1 or more with commas, as in 2,4,8,16.")
    return ranks


def read_seconds(text: str) -> float:
    """Parse "10m", "90s", "1.5h", "1h30m" or "600" into seconds."""
    given = text.strip().lower()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)|(\d+h)?(\d+m)?(\d+s)?", given)
    parts = [(match[1], match[2] or "s")] if match and match[1] else re.findall(r"(\d+)([hms])", given)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts) if match else 0.0
    if seconds <= 0:
        raise RecipeError(f"--budget {text}: expected a duration above 0, as in 10m, 90s, 1.5h or 1h30m.")
    return seconds


def _two_digits(value: float) -> float:
    """Round to two significant digits."""
    return float(f"{value:.1e}")


def middle_first(values: Sequence[float]) -> list[float]:
    """The values ordered by distance from the middle: a good first run lets halving stop the others early."""
    middle = (len(values) - 1) / 2
    return [values[i] for i in sorted(range(len(values)), key=lambda i: (abs(i - middle), i))]
