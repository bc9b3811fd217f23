"""Arm: one way to fine-tune the base model of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError, unknown
from peft_recipes.recipe.serialization import peft_from_dict, peft_to_dict
from peft_recipes.recipe.type_checks import fits

if TYPE_CHECKING:
    from peft import PeftConfig

OWN_METHODS = ("full", "head", "bitfit")  # the methods that are not a PeftConfig
QUANTISED = ("nf4", "int8")
# What `init_lora_weights` needs beside the model. PEFT alone would train an ordinary LoRA, or stop after loading.
_INIT_NEEDS = {
    "eva": "activations of training data (peft.initialize_lora_eva_weights)",
    "corda": "covariances of training data (peft.tuners.lora.corda.preprocess_corda)",
    "lora_ga": "gradients of training data (peft.tuners.lora.loraga.preprocess_loraga)",
    "loftq": "a base whose weights it replaces by quantised ones, which an adapter's checkpoint does not hold",
}
ARM_OPTIONS = ("quantise", "lora_plus_ratio", "optim")
ARM_KEYS = ("method", "peft", "learning_rate", *ARM_OPTIONS)  # of an arm as plain data


@dataclass
class Arm:
    """One way to fine-tune in a recipe.

    method: "full" (every weight), "head" (only the task head, a linear probe), "bitfit" (only biases), or any
    `peft.PeftConfig`.
    learning_rate: per arm, because a shared one makes full fine-tuning or LoRA look bad.
    quantise: quantise the base's linear layers with bitsandbytes to "nf4" (as QLoRA) or "int8"; None: fp32.
    lora_plus_ratio: the learning rate of LoRA's B divided by that of its A.
    optim: the arm's own optimizer, e.g. "adamw_8bit"; overrides training.optim.
    """

    method: str | PeftConfig = "full"
    learning_rate: float = 5e-5
    quantise: str | None = None
    lora_plus_ratio: float | None = None
    optim: str | None = None

    @property
    def peft(self) -> PeftConfig | None:
        """The PeftConfig of an adapter arm; None for `full`, `head` and `bitfit`."""
        return None if isinstance(self.method, str) else self.method

    @property
    def method_name(self) -> str:
        """The method's name: "full", "head", "bitfit" or PEFT's name of the method ("LORA", "IA3", ...)."""
        return self.method if isinstance(self.method, str) else self.method.peft_type.value

    def to_dict(self) -> dict[str, Any]:
        method = {"method": self.method} if isinstance(self.method, str) else {"peft": peft_to_dict(self.method)}
        options = {name: getattr(self, name) for name in ARM_OPTIONS if getattr(self, name) is not None}
        return {**method, "learning_rate": self.learning_rate, **options}

    @classmethod
    def from_dict(cls, given: Any, where: str) -> Arm:
        """Build an arm from plain data. Raises RecipeError for an unknown key or an invalid PEFT config."""
        if not isinstance(given, dict):
            raise RecipeError(f"{where}: expected a mapping with 'method' or 'peft', got {type(given).__name__}.")
        if problems := [unknown("key", k, ARM_KEYS, where) for k in given if k not in ARM_KEYS]:
            raise RecipeError(*problems)
        peft, method = given.get("peft"), given.get("method")
        if peft is not None and method is not None:
            raise RecipeError(f"{where}: it has both 'method' and 'peft'; set the one you mean, and the other to null.")
        method = peft_from_dict(peft, f"{where}.peft") if peft is not None else method or "full"
        return cls(method, given.get("learning_rate", 5e-5), **{name: given.get(name) for name in ARM_OPTIONS})

    def problems(self, where: str) -> list[str]:
        """Return every problem of this arm, one line each."""
        problems = []
        if not fits(self.learning_rate, float) or self.learning_rate <= 0:
            problems.append(f"{where}.learning_rate: expected a number above 0, got {self.learning_rate!r}.")
        if isinstance(self.method, str):
            if self.method not in OWN_METHODS:
                problems.append(unknown("method", self.method, OWN_METHODS, where) + " Or a PeftConfig under 'peft'.")
        elif not hasattr(self.method, "peft_type"):
            own = ", ".join(map(repr, OWN_METHODS))
            problems.append(f"{where}.method: expected {own} or a PeftConfig, got {type(self.method).__name__}.")
        else:
            rank = getattr(self.method, "r", None)
            # OFT's r=0 means "use oft_block_size"; every other method with an r needs it above 0.
            if rank is not None and self.method_name != "OFT" and (not isinstance(rank, int) or rank < 1):
                problems.append(f"{where}.peft.r: the rank must be a whole number of 1 or more, got {rank!r}.")
            if self.method_name == "ADALORA" and self.method.target_r >= self.method.init_r:
                problems.append(
                    f"{where}.peft.target_r: AdaLoRA reduces ranks from init_r ({self.method.init_r}), so it must be "
                    f"lower than that, got {self.method.target_r}."
                )
            problems += _init_problems(self.method, f"{where}.peft")
        return problems + self._option_problems(where)

    def _option_problems(self, where: str) -> list[str]:
        problems = []
        if self.quantise is not None and self.quantise not in QUANTISED:
            problems.append(unknown("value", str(self.quantise), QUANTISED, f"{where}.quantise"))
        elif self.quantise is not None and self.peft is None:
            problems.append(f"{where}.quantise: quantised weights can't be trained; use a PEFT adapter on them.")
        ratio = self.lora_plus_ratio
        if ratio is not None:
            if not fits(ratio, float) or ratio < 1:
                problems.append(f"{where}.lora_plus_ratio: expected a number of 1 or more, got {ratio!r}.")
            elif self.method_name not in ("LORA", "ADALORA"):
                problems.append(f"{where}.lora_plus_ratio: only LoRA has an A and a B; this arm is {self.method_name}.")
        if self.optim is not None and not isinstance(self.optim, str):
            problems.append(f"{where}.optim: expected an optimizer's name, got {self.optim!r}.")
        return problems


def _init_problems(method: PeftConfig, where: str) -> list[str]:
    """Return why the method's initialisation can't be done here: it needs data, gradients or another base."""
    init = getattr(method, "init_lora_weights", None)
    if not isinstance(init, str):
        return []
    needs = next((needs for name, needs in _INIT_NEEDS.items() if init.lower().startswith(name)), None)
    if needs is not None:
        instead = " For a quantised base set quantise: nf4." if init.lower() == "loftq" else ""
        return [
            f"{where}.init_lora_weights: '{init}' needs {needs}, which a run does not prepare. Use true, 'gaussian', "
            f"'orthogonal', 'pissa' or 'olora'.{instead}"
        ]
    if init.startswith("pissa_niter_"):
        return [
            f"{where}.init_lora_weights: '{init}' decomposes the base at random, so that a reload gives another base. "
            "Use 'pissa'."
        ]
    return []


def rank_of(arm: Arm) -> int | None:
    """Return the rank of an arm's method, or None if it has none; for AdaLoRA, the average rank it ends with."""
    return getattr(arm.peft, "target_r" if arm.method_name == "ADALORA" else "r", None) or None
