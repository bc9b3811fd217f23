"""Arm: one way to tune the base model of a recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError, unknown
from peft_recipes.recipe.serialization import (
    peft_from_dict,
    peft_to_dict,
)

if TYPE_CHECKING:
    from peft import PeftConfig


OWN_METHODS = ("full", "head", "bitfit")  # those that are no PeftConfig


QUANTISED = ("nf4", "int8")


ARM_OPTIONS = ("quantise", "lora_plus_ratio", "optim")


@dataclass
class Arm:
    """One way to tune in a recipe.

    method: "full" (every weight), "head" (the task head alone, a linear probe), "bitfit" (every bias), or any
    `peft.PeftConfig`.
    learning_rate: the arm's own; sharing one is the commonest way to make full fine-tuning (or LoRA) look bad.
    quantise: the base's linear layers in "nf4" (QLoRA's) or "int8", by bitsandbytes; None: fp32. lora_plus_ratio: how
    many times as fast LoRA's B learns as its A. optim: the arm's own optimizer ("adamw_8bit"), instead of
    training.optim.
    """

    method: str | PeftConfig = "full"
    learning_rate: float = 5e-5
    quantise: str | None = None
    lora_plus_ratio: float | None = None
    optim: str | None = None

    @property
    def peft(self) -> PeftConfig | None:
        """The PeftConfig of an adapter arm, None for `full`, `head` and `bitfit`."""
        return None if isinstance(self.method, str) else self.method

    @property
    def method_name(self) -> str:
        """The method: "full", "head", "bitfit" or PEFT's own name of the method ("LORA", "IA3", ...)."""
        return self.method if isinstance(self.method, str) else self.method.peft_type.value

    def to_dict(self) -> dict[str, Any]:
        how = {"method": self.method} if isinstance(self.method, str) else {"peft": peft_to_dict(self.method)}
        more = {name: getattr(self, name) for name in ARM_OPTIONS if getattr(self, name) is not None}
        return {**how, "learning_rate": self.learning_rate, **more}

    @classmethod
    def from_dict(cls, given: Any, where: str) -> Arm:
        if not isinstance(given, dict):
            raise RecipeError(f"{where}: expected a mapping with 'method' or 'peft', got {type(given).__name__}.")
        keys = ("method", "peft", "learning_rate", *ARM_OPTIONS)
        if problems := [unknown("key", k, keys, where) for k in given if k not in keys]:
            raise RecipeError(*problems)
        if given.get("peft") is not None and given.get("method") is not None:
            raise RecipeError(f"{where}: it has both 'method' and 'peft'; set the one you mean, and the other to null.")
        peft = given.get("peft")
        method = peft_from_dict(peft, f"{where}.peft") if peft is not None else given.get("method") or "full"
        return cls(method, given.get("learning_rate", 5e-5), **{name: given.get(name) for name in ARM_OPTIONS})

    def problems(self, where: str) -> list[str]:
        found = []
        rate = self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not math.isfinite(rate) or rate <= 0:
            found.append(f"{where}.learning_rate: expected a number above 0, got {rate!r}.")
        if isinstance(self.method, str):
            if self.method not in OWN_METHODS:
                found.append(unknown("method", self.method, OWN_METHODS, where) + " Or a PeftConfig under 'peft'.")
        elif not hasattr(self.method, "peft_type"):
            own = ", ".join(map(repr, OWN_METHODS))
            found.append(f"{where}.method: expected {own} or a PeftConfig, got {type(self.method).__name__}.")
        else:
            rank = getattr(self.method, "r", None)
            # OFT's r=0 means "use oft_block_size"; every other method with an r needs it above 0.
            if rank is not None and self.method_name != "OFT" and (not isinstance(rank, int) or rank < 1):
                found.append(f"{where}.peft.r: the rank must be a whole number of 1 or more, got {rank!r}.")
        return found + self._option_problems(where)

    def _option_problems(self, where: str) -> list[str]:
        found = []
        if self.quantise is not None and self.quantise not in QUANTISED:
            found.append(unknown("value", str(self.quantise), QUANTISED, f"{where}.quantise"))
        elif self.quantise is not None and self.peft is None:
            found.append(f"{where}.quantise: a quantised base can't learn itself; only a PEFT adapter can sit on one.")
        ratio = self.lora_plus_ratio
        if ratio is not None:
            if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 1 <= ratio < math.inf:
                found.append(f"{where}.lora_plus_ratio: expected a number of 1 or more, got {ratio!r}.")
            elif self.method_name not in ("LORA", "ADALORA"):
                found.append(f"{where}.lora_plus_ratio: only LoRA has an A and a B; this arm is {self.method_name}.")
        if self.optim is not None and not isinstance(self.optim, str):
            found.append(f"{where}.optim: expected an optimizer's name, got {self.optim!r}.")
        return found


def rank_of(arm: Arm) -> int | None:
    """The rank of an arm's method, where it has one; of AdaLoRA's the average that it ends with."""
    return getattr(arm.peft, "target_r" if arm.method_name == "ADALORA" else "r", None) or None
