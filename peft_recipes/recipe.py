"""Recipe and Arm: one fine-tuning problem as pure data, checked when made, to YAML and back without loss."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.dataset import Dataset, Pretraining
from peft_recipes.errors import RecipeError, unknown
from peft_recipes.options import METRICS
from peft_recipes.plain import key_problems, merge, part, peft_from_dict, peft_to_dict, read_yaml, to_yaml

if TYPE_CHECKING:
    from peft import PeftConfig

EMBEDDED = "embedded:"
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


@dataclass
class Recipe:
    """One fine-tuning problem as pure data.

    name: also the folder of its runs. task: one of `TASKS`. model: a Hub id, a folder, "embedded:NAME" or "small-cnn".
    dataset: see `Dataset`. arms: name -> Arm. training: any TrainingArguments (of language tasks SFTConfig, DPOConfig)
    option.
    max_length: tokens an example may have. batches: of causal models, "shared-prefix" (exact, see data/packing.py) or
    "padded". max_row_tokens: how long a shared row may be. metric: what arms are compared by, "accuracy" or "loss"
    (of preferences "preference_accuracy" or "loss").
    margin: how near is equivalent, absolute (default: 0.01 of accuracy, 1 % of the full arm's loss).
    evaluate_also: further evaluation sets, to see what tuning made the model forget: name -> what differs from
    `dataset` ({"clean": {"transform": None}}, or another `path`, of which the test split is taken: plain text, say).
    prompts: for causal models, answered by the base and every arm: [{"kind": ..., "prompt": ...}].
    attention: how attention is computed ("sdpa", "eager", "flash_attention_2"; None: the library's choice). threads: of
    the CPU (None: torch's choice, or OMP_NUM_THREADS). skip_checks: names of guards that are not to be heeded.
    checkpoint_seconds: how often a run under way stores what it needs to go on after it was killed (0: every step).
    embedded: what `--embedded` changes, in the shape of the recipe itself ({"model": ..., "dataset": {...}, ...}).

    Raises RecipeError that holds *every* problem found.
    """

    name: str
    task: str
    model: str
    dataset: Dataset
    arms: dict[str, Arm]
    title: str = ""
    description: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    max_length: int = 256
    batches: str = "shared-prefix"
    max_row_tokens: int = 4_096
    metric: str | None = None
    margin: float | None = None
    evaluate_also: dict[str, dict[str, Any]] = field(default_factory=dict)
    pretraining: Pretraining | None = None
    prompts: list[dict[str, str]] = field(default_factory=list)
    trust_remote_code: bool = False
    attention: str | None = None
    threads: int | None = None
    skip_checks: list[str] = field(default_factory=list)
    checkpoint_seconds: float = 300.0
    embedded: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.metric is None:
            self.metric = METRICS.get(self.task, ("accuracy",))[0]
        problems = self.problems()
        if problems:
            raise RecipeError(*problems)

    @property
    def higher_is_better(self) -> bool:
        return self.metric != "loss"

    @property
    def uses_stand_ins(self) -> bool:
        """Whether model or data is an embedded stand-in, which must then be said wherever figures are shown."""
        return self.model.startswith(EMBEDDED) or self.dataset.path.startswith(EMBEDDED)

    def problems(self) -> list[str]:
        """Every problem of this recipe, one line each; empty when it is sound."""
        from peft_recipes.validation import recipe_problems

        return recipe_problems(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as YAML takes it; `from_dict` gives an equal recipe back."""
        made: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "arms":
                value = {name: arm.to_dict() for name, arm in value.items()}
            elif dataclasses.is_dataclass(value):
                value = dataclasses.asdict(value)
            made[f.name] = copy.deepcopy(value)
        return made

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Recipe:
        """A recipe from plain data. Raises RecipeError with every unknown key, missing key and wrong value."""
        if not isinstance(given, dict):
            raise RecipeError(f"A recipe is a mapping of names to values, got {type(given).__name__}.")
        problems = key_problems(given, cls, "the recipe")
        names = [f.name for f in dataclasses.fields(cls)]
        parts = {key: value for key, value in given.items() if key in names}
        for key, kind in (("dataset", Dataset), ("pretraining", Pretraining)):
            if parts.get(key) is not None:
                parts[key], more = part(parts[key], kind, key)
                problems += more
        parts["arms"], more = _arms(given.get("arms"))
        problems += more
        for key, kind in (("training", dict), ("evaluate_also", dict), ("embedded", dict)):
            if key in parts and not isinstance(parts[key], kind):
                problems.append(f"{key}: expected a mapping, got {type(parts.pop(key)).__name__}.")
        if not problems:
            return cls(**parts)
        # Not sound, but what is there can be looked at all the same: every problem at once, not the first only.
        if isinstance(parts.get("dataset"), Dataset) and all(parts.get(k) for k in ("name", "task", "model", "arms")):
            try:
                cls(**parts)
            except RecipeError as error:
                problems += error.problems
        raise RecipeError(*problems)

    def to_yaml(self, path: Path | None = None) -> str:
        """The recipe as YAML text; also written to `path` when one is given."""
        text = to_yaml(self.to_dict())
        if path is not None:
            path.write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_yaml(cls, path: Path | str) -> Recipe:
        """The recipe of a YAML file. Raises RecipeError that names the file, and the line where YAML is broken."""
        return cls.from_dict(read_yaml(Path(path)))

    def with_changes(self, changes: dict[str, Any]) -> Recipe:
        """A new recipe with `changes`, nested like the recipe itself, laid over it; a mapping is merged key by key."""
        return Recipe.from_dict(merge(self.to_dict(), changes))


def _arms(given: Any) -> tuple[dict[str, Arm], list[str]]:
    """The arms of plain data, and what is wrong with those that can't be made."""
    if not isinstance(given, dict):
        return {}, [] if given is None else [f"arms: expected a mapping of names to arms, got {type(given).__name__}."]
    arms: dict[str, Arm] = {}
    problems: list[str] = []
    for name, arm in given.items():
        try:
            arms[name] = arm if isinstance(arm, Arm) else Arm.from_dict(arm, f"arms.{name}")
        except RecipeError as error:
            problems += error.problems
    return arms, problems
