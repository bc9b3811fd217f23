"""Recipe and Arm: one fine-tuning problem as pure data, checked when made, to YAML and back without loss."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.dataset import Dataset, Pretraining
from peft_recipes.errors import RecipeError, unknown
from peft_recipes.guards import GUARDS
from peft_recipes.options import CAUSAL_TASKS, TASKS, training_problems
from peft_recipes.plain import key_problems, merge, part, peft_from_dict, peft_to_dict, read_yaml

if TYPE_CHECKING:
    from peft import PeftConfig

EMBEDDED = "embedded:"
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
BATCHES = ("shared-prefix", "padded")

# Written into every file name and repository name, so kept to what all of them take.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*\Z", re.IGNORECASE)


@dataclass
class Arm:
    """One way to tune in a recipe.

    method: "full" (every weight), "head" (the task head alone, a linear probe), or any `peft.PeftConfig`.
    learning_rate: the arm's own; sharing one is the commonest way to make full fine-tuning (or LoRA) look bad.
    """

    method: str | PeftConfig = "full"
    learning_rate: float = 5e-5

    @property
    def peft(self) -> PeftConfig | None:
        """The PeftConfig of an adapter arm, None for `full` and `head`."""
        return None if isinstance(self.method, str) else self.method

    @property
    def method_name(self) -> str:
        """The method: "full", "head" or PEFT's own name of the method ("LORA", "IA3", ...)."""
        return self.method if isinstance(self.method, str) else self.method.peft_type.value

    def to_dict(self) -> dict[str, Any]:
        how = {"method": self.method} if isinstance(self.method, str) else {"peft": peft_to_dict(self.method)}
        return {**how, "learning_rate": self.learning_rate}

    @classmethod
    def from_dict(cls, given: Any, where: str) -> Arm:
        if not isinstance(given, dict):
            raise RecipeError(f"{where}: expected a mapping with 'method' or 'peft', got {type(given).__name__}.")
        problems = [
            unknown("key", k, ["method", "peft", "learning_rate"], where)
            for k in given
            if k not in ("method", "peft", "learning_rate")
        ]
        if problems:
            raise RecipeError(*problems)
        peft = given.get("peft")
        method = peft_from_dict(peft, f"{where}.peft") if peft is not None else given.get("method", "full")
        return cls(method, learning_rate=given.get("learning_rate", 5e-5))

    def problems(self, where: str) -> list[str]:
        found = []
        rate = self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not math.isfinite(rate) or rate <= 0:
            found.append(f"{where}.learning_rate: expected a number above 0, got {rate!r}.")
        if isinstance(self.method, str):
            if self.method not in ("full", "head"):
                found.append(unknown("method", self.method, ["full", "head"], where) + " Or a PeftConfig under 'peft'.")
        elif not hasattr(self.method, "peft_type"):
            found.append(f"{where}.method: expected 'full', 'head' or a PeftConfig, got {type(self.method).__name__}.")
        else:
            rank = getattr(self.method, "r", None)
            # OFT's r=0 means "use oft_block_size"; every other method with an r needs it above 0.
            if rank is not None and self.method_name != "OFT" and (not isinstance(rank, int) or rank < 1):
                found.append(f"{where}.peft.r: the rank must be a whole number of 1 or more, got {rank!r}.")
        return found


@dataclass
class Recipe:
    """One fine-tuning problem as pure data.

    name: also the folder of its runs. task: one of `TASKS`. model: a Hub id, a folder, "embedded:NAME" or "small-cnn".
    dataset: see `Dataset`. arms: name -> Arm. training: any TrainingArguments (SFTConfig for causal tasks) option.
    max_length: tokens an example may have. batches: of causal models, "shared-prefix" (exact, see data/packing.py) or
    "padded". max_row_tokens: how long a shared row may be. metric: what arms are compared by, "accuracy" or "loss".
    margin: how near is equivalent, absolute (default: 0.01 of accuracy, 1 % of the full arm's loss).
    evaluate_also: further evaluation sets: name -> what differs from `dataset` ({"clean": {"transform": None}}).
    prompts: for causal models, answered by the base and every arm: [{"kind": ..., "prompt": ...}].
    attention: how attention is computed ("sdpa", "eager", "flash_attention_2"; None: the library's choice). threads: of
    the CPU (None: torch's choice, or OMP_NUM_THREADS). skip_checks: names of guards that are not to be heeded.
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
    embedded: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.metric is None:
            self.metric = "loss" if self.task in CAUSAL_TASKS else "accuracy"
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
        found = []
        for key in ("name", "task", "model"):
            if not isinstance(getattr(self, key), str) or not getattr(self, key).strip():
                found.append(f"{key}: expected text, got {getattr(self, key)!r}.")
        if isinstance(self.name, str) and not _NAME.match(self.name):
            found.append(f"name: '{self.name}' must be letters, digits, '.', '_' and '-' only: it names a folder.")
        if self.task not in TASKS:
            found.append(unknown("task", str(self.task), TASKS))
        metrics = ("loss",) if self.task in CAUSAL_TASKS else ("accuracy", "loss")
        if self.metric not in metrics:
            found.append(unknown("metric", str(self.metric), metrics, f"task {self.task}"))
        for key in ("max_length", "max_row_tokens"):
            tokens = getattr(self, key)
            if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 2:
                found.append(f"{key}: expected a whole number of tokens of 2 or more, got {tokens!r}.")
        if self.batches not in BATCHES:
            found.append(unknown("value", str(self.batches), BATCHES, "batches"))
        if self.margin is not None and (not isinstance(self.margin, (int, float)) or not 0 < self.margin < math.inf):
            found.append(f"margin: expected a number above 0, got {self.margin!r}.")
        if self.attention not in (None, *ATTENTION):
            found.append(unknown("value", str(self.attention), ATTENTION, "attention"))
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            found.append(f"threads: expected a whole number of 1 or more, got {self.threads!r}.")
        if not isinstance(self.skip_checks, list):
            found.append(f"skip_checks: expected a list of names, got {self.skip_checks!r}.")
        else:
            found += [unknown("check", str(c), GUARDS, "skip_checks") for c in self.skip_checks if c not in GUARDS]
        found += self.dataset.problems()
        found += self._arm_problems() + self._prompt_problems() + self._also_problems()
        return found + training_problems(self.training, self.task)

    def _arm_problems(self) -> list[str]:
        found = [] if self.arms else ["arms: a recipe needs at least one arm."]
        for name, arm in self.arms.items():
            if not _NAME.match(str(name)) or name == "base":
                found.append(f"arms: '{name}' can't name an arm: letters, digits, '.', '_', '-', and not 'base'.")
            found += arm.problems(f"arms.{name}")
            if arm.method == "head" and self.task in CAUSAL_TASKS:
                found.append(f"arms.{name}: 'head' needs a task head; a {self.task} model has only its vocabulary.")
        return found

    def _prompt_problems(self) -> list[str]:
        if not isinstance(self.prompts, list):
            return [f"prompts: expected a list of {{kind, prompt}}, got {type(self.prompts).__name__}."]
        return [
            f"prompts[{i}]: expected a mapping with 'kind' and 'prompt', got {row!r}."
            for i, row in enumerate(self.prompts)
            if not isinstance(row, dict) or set(row) != {"kind", "prompt"}
        ]

    def _also_problems(self) -> list[str]:
        keys = [f.name for f in dataclasses.fields(Dataset)]
        found = [
            f"evaluate_also: '{name}' is the name of a split of the recipe itself; choose another."
            for name in self.evaluate_also
            if name in ("train", "validation", "test", "pretrain")
        ]
        return found + [
            unknown("key", key, keys, f"evaluate_also.{name}")
            for name, changes in self.evaluate_also.items()
            for key in changes
            if key not in keys
        ]

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
        import yaml

        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)
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
