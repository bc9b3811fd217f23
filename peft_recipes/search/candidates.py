"""What a scan tries: which arms, at which ranks, at which learning rates; read from what the user wrote."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from peft_recipes.errors import RecipeError
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.recipe import Recipe

AROUND = (0.1, 0.3, 1.0, 3.0, 10.0)  # the rates that are tried where none are named, in shares of the arm's own
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Candidate:
    """One arm of a scan and the rates it is tried at, from low to high. of: the recipe's arm that it is a rank of."""

    name: str
    arm: Arm
    rates: tuple[float, ...]
    of: str

    @property
    def rank(self) -> int | None:
        """The rank of its adapter, None where it has none."""
        return getattr(self.arm.peft, "r", None)


def candidates(
    recipe: Recipe, arms: Sequence[str], rates: Sequence[float] | None = None, ranks: Sequence[int] | None = None
) -> list[Candidate]:
    """The arms of a recipe, each with its rates; an adapter that has a rank once for each of `ranks`.

    rates: None for a few around each arm's own. A rank keeps the scale of its arm (alpha / r), as far as alpha is a
    whole number. Raises RecipeError where `ranks` are given and no arm has one.
    """
    found: dict[str, Candidate] = {}
    for name in arms:
        arm = recipe.arms[name]
        tried = tuple(sorted(set(rates))) if rates else tuple(rounded(arm.learning_rate * share) for share in AROUND)
        for called, changed in _at_ranks(name, arm, ranks):
            found[called] = Candidate(called, changed, tried, name)
    if ranks and all(one.rank is None for one in found.values()):
        raise RecipeError(f"--ranks: none of the arms {', '.join(arms)} has a rank. Name one that does with --arms.")
    return list(found.values())


def _at_ranks(name: str, arm: Arm, ranks: Sequence[int] | None) -> list[tuple[str, Arm]]:
    own = getattr(arm.peft, "r", None)
    if not ranks or own is None:
        return [(name, arm)]
    made = []
    for rank in sorted(set(ranks)):
        config = copy.deepcopy(arm.peft)
        config.r = rank
        if getattr(config, "lora_alpha", None) is not None and not getattr(config, "use_rslora", False):
            config.lora_alpha = max(round(config.lora_alpha * rank / own), 1)
        called = name if rank == own else f"{re.sub(r'-r[0-9]+$', '', name)}-r{rank}"
        made.append((called, dataclasses.replace(arm, method=config)))
    return made


def with_rates(recipe: Recipe, found: dict[str, tuple[Candidate, float]]) -> Recipe:
    """The recipe with the arms of a scan, each at the rate that was found for it; its other arms as they are."""
    arms = dict(recipe.arms)
    for name, (candidate, rate) in found.items():
        arms[name] = dataclasses.replace(candidate.arm, learning_rate=rate)
    return dataclasses.replace(recipe, arms=arms)


def read_rates(text: str) -> list[float] | None:
    """The rates of "1e-5:3e-3:6" (low, high, how many, evenly on a logarithmic scale) or "1e-4,3e-4"; None for ""."""
    if not text.strip():
        return None
    wrong = RecipeError(
        f"--learning-rates {text}: expected LOW:HIGH:COUNT, as in 1e-5:3e-3:6, or rates with commas between them, as "
        "in 1e-4,3e-4,1e-3; all above 0."
    )
    try:
        if ":" not in text:
            rates = sorted({float(part) for part in text.split(",")})
        else:
            low, high, count = (kind(part) for kind, part in zip((float, float, int), text.split(":"), strict=True))
            if not 0 < low < high < float("inf") or not 2 <= count <= 50:
                raise wrong
            rates = sorted({rounded(low * (high / low) ** (i / (count - 1))) for i in range(count)})
    except ValueError:
        raise wrong from None
    if not all(0 < rate < float("inf") for rate in rates):
        raise wrong
    return rates


def read_ranks(text: str) -> list[int] | None:
    """The ranks of "2,4,8"; None for ""."""
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
    """The seconds of "10m", "90s", "1.5h" or "600"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip().lower())
    if found is None or float(found[1]) <= 0:
        raise RecipeError(f"--budget {text}: expected a duration above 0, as in 10m, 90s or 1.5h.")
    return float(found[1]) * _UNITS[found[2] or "s"]


def rounded(rate: float) -> float:
    """A rate with two significant digits."""
    return float(f"{rate:.1e}")


def from_the_middle(rates: Sequence[float]) -> list[float]:
    """The rates in the order in which they are tried: the middle first, so that there is soon something to beat."""
    middle = (len(rates) - 1) / 2
    return [rates[i] for i in sorted(range(len(rates)), key=lambda i: (abs(i - middle), i))]
