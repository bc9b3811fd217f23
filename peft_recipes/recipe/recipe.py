"""Recipe: one fine-tuning problem as pure data, validated on creation, written to YAML and back without loss."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_recipes.errors import RecipeError
from peft_recipes.recipe.answer_options import function_path
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.dataset import EMBEDDED, Dataset, Pretraining
from peft_recipes.recipe.judge import Judge
from peft_recipes.recipe.metrics import METRICS
from peft_recipes.recipe.mixture import (
    FIRST_EXHAUSTED,
    NAMES_APART,
    entries,
    mixture_to_dict,
    use_entries,
)
from peft_recipes.recipe.options import metrics_of
from peft_recipes.recipe.serialization import dataclass_from_dict, key_problems, merge, read_yaml, to_yaml
from peft_recipes.recipe.validation import recipe_problems


@dataclass
class Recipe:
    """One fine-tuning problem as pure data.

    name: also the folder of its runs. task: one of `TASKS`. model: a Hub id, a folder, "embedded:NAME" or "small-cnn".
    dataset: see `Dataset`. arms: name -> Arm.
    datasets: several in place of `dataset`, each with its own columns, format, splits and `weight`: its share of the
    training examples. stopping_strategy: where a dataset has fewer examples than its share, "first_exhausted": no
    example is repeated, the others give fewer; "all_exhausted": all are used, those of the smaller ones repeatedly.
    Validation and test are those of all datasets together.
    training: any option of TrainingArguments; for language tasks of SFTConfig, DPOConfig or
    Seq2SeqTrainingArguments.
    max_length: most tokens in an example. batches: for causal models, "shared-prefix" (exact packing, see
    data/packing.py) or "padded". max_row_tokens: most tokens in a packed sequence.
    metric: compares the arms, one of the task's in `TASKS`: "accuracy", "loss", or of generated answers "exact_match",
    "rougeL", ... (see `METRICS`); the default is the task's first, or "score" where `score` is set.
    margin: the largest difference that counts as equivalent (default: 0.01 of a share such as accuracy, 1 % of the full
    arm's loss).
    score: scores a generated answer instead: a function (prediction: str, row: dict) -> float, or where it is defined:
    "module:function" or "file.py:function". row: the example's columns.
    reward: for grpo, what an answer is rewarded with: a function as in `score`; None: the metric's own score.
    answer_pattern: for the metric "regex", what is compared: the last match in the answer with the last one in the
    reference (its first group, if it has one); None: the reference itself is the pattern that an answer must match.
    generation: options of transformers' GenerationConfig for the scored answers ({"do_sample": True, ...}); the default
    is greedy, with as many new tokens as the longest reference needs.
    test_generations: the most examples of a split that are answered: a random sample, the same for every arm.
    judge: for the metric "preference", who compares an arm's answers with full's, see `Judge`.
    evaluate_also: more evaluation sets, to measure forgetting: name -> what differs from `dataset`, e.g.
    {"clean": {"transform": None}} or another `path`, whose test split is used.
    benchmarks: for language models, tasks of lm_eval that the base and every arm are evaluated on: names ("arc_easy"),
    files of tasks ("mine.yaml") or "embedded:docstring-choices". benchmark_examples: the most of each; None: all.
    prompts: for language models, answered by the base and every arm: [{"kind": ..., "prompt": ...}].
    attention: "sdpa", "eager", "flash_attention_2", ...; None: the library's choice.
    packed_attention: the kernel for packed batches: "parts" (one example after another), "flex" (FlexAttention),
    "varlen" (flash attention's) or "mask"; None: the fastest that is exact, by a trial on a GPU.
    threads: CPU threads; None: OMP_NUM_THREADS or torch's choice. skip_checks: names of guards to turn off.
    checkpoint_seconds: the interval between checkpoints for resuming (0: every step).
    embedded: the changes that `--embedded` applies, nested like the recipe ({"model": ..., "dataset": {...}, ...}).

    Raises RecipeError with *every* problem found.
    """

    name: str
    task: str
    model: str
    dataset: Dataset = None  # type: ignore[assignment]  # of several `datasets` the first
    arms: dict[str, Arm] = field(default_factory=dict)
    title: str = ""
    description: str = ""
    datasets: list[Dataset] | None = None
    stopping_strategy: str = FIRST_EXHAUSTED
    training: dict[str, Any] = field(default_factory=dict)
    max_length: int = 256
    batches: str = "shared-prefix"
    max_row_tokens: int = 4_096
    metric: str | None = None
    margin: float | None = None
    score: str | None = None
    reward: str | None = None
    answer_pattern: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    test_generations: int = 200
    judge: Judge | None = None
    evaluate_also: dict[str, dict[str, Any]] = field(default_factory=dict)
    pretraining: Pretraining | None = None
    benchmarks: list[str] = field(default_factory=list)
    benchmark_examples: int | None = 200
    prompts: list[dict[str, str]] = field(default_factory=list)
    trust_remote_code: bool = False
    attention: str | None = None
    packed_attention: str | None = None
    threads: int | None = None
    skip_checks: list[str] = field(default_factory=list)
    checkpoint_seconds: float = 300.0
    embedded: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for field_name in ("score", "reward"):
            if callable(function := getattr(self, field_name)):
                setattr(self, field_name, function_path(function, field_name))
        use_entries(self)
        default = metrics_of(self.task, getattr(self.dataset, "problem_type", None))[0]
        if self.metric in (None, default):  # a recipe that was read names the default
            self.metric = default if self.score is None else "score"
        if problems := self.problems():
            raise RecipeError(*problems)

    @property
    def higher_is_better(self) -> bool:
        return METRICS[self.metric].higher_is_better

    @property
    def scores_answers(self) -> bool:
        """Whether the metric is computed from generated answers."""
        return METRICS[self.metric].generated

    @property
    def selection_metric(self) -> str:
        """The metric that is followed on the validation split, which only grpo answers: else the loss, if need be."""
        if self.task == "grpo":
            return "reward"
        return "loss" if self.scores_answers else self.metric

    @property
    def uses_stand_ins(self) -> bool:
        """Whether model or data is an embedded stand-in, which every report of its figures must say."""
        return any(name.startswith(EMBEDDED) for name in (self.model, *(source.path for source in self.sources)))

    @property
    def sources(self) -> list[Dataset]:
        """The dataset, or all of several."""
        return self.datasets or [self.dataset]

    @property
    def data_name(self) -> str:
        """The path of the dataset, or those of several: "a.csv + b.jsonl"."""
        return NAMES_APART.join(source.path for source in self.sources)

    def problems(self) -> list[str]:
        """Return every problem of this recipe, one line each; empty when it is valid."""
        return recipe_problems(self)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data that YAML can hold; `from_dict` gives an equal recipe back."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        mixture_to_dict(self, plain)
        plain["arms"] = {name: arm.to_dict() for name, arm in self.arms.items()}
        if self.pretraining is not None:
            plain["pretraining"] = dataclasses.asdict(self.pretraining)
        if self.judge is not None:
            plain["judge"] = dataclasses.asdict(self.judge)
        return copy.deepcopy(plain)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Recipe:
        """Build a recipe from plain data. Raises RecipeError with every unknown key, missing key and wrong value."""
        if not isinstance(given, dict):
            raise RecipeError(f"A recipe is a mapping of names to values, got {type(given).__name__}.")
        problems = key_problems(given, cls, "the recipe")
        names = [f.name for f in dataclasses.fields(cls)]
        values = {key: value for key, value in given.items() if key in names}
        for f in dataclasses.fields(cls):  # null: none of a list or mapping
            if f.default_factory is not dataclasses.MISSING and f.name in values and values[f.name] is None:
                del values[f.name]
        for key, part in (("dataset", Dataset), ("pretraining", Pretraining), ("judge", Judge)):
            if values.get(key) is not None:
                values[key], more = dataclass_from_dict(values[key], part, key)
                problems += more
        if values.get("datasets") is not None:
            values["datasets"], more = entries(values["datasets"])
            problems += more
        needed = ("arms",) if values.get("datasets") is not None else ("dataset", "arms")
        problems += [f"Missing key '{key}' in the recipe." for key in needed if given.get(key) is None]
        values["arms"], more = _arms_from_dict(given.get("arms"))
        problems += more
        for key in ("training", "generation", "evaluate_also", "embedded"):
            if key in values and not isinstance(values[key], dict):
                problems.append(f"{key}: expected a mapping, got {type(values.pop(key)).__name__}.")
        if not problems:
            return cls(**values)
        # Validate the rest as well, so that the error lists every problem and not only the first.
        has_data = isinstance(values.get("dataset"), Dataset) or values.get("datasets")
        if has_data and all(values.get(k) for k in ("name", "task", "model", "arms")):
            try:
                cls(**values)
            except RecipeError as error:
                problems += error.problems
        raise RecipeError(*problems)

    def to_yaml(self, path: Path | None = None) -> str:
        """Return the recipe as YAML text, and write it to `path` if given."""
        text = to_yaml(self.to_dict())
        if path is not None:
            path.write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_yaml(cls, path: Path | str) -> Recipe:
        """Read a recipe from a YAML file. Raises RecipeError with the file, and the line where the YAML is invalid."""
        return cls.from_dict(read_yaml(Path(path)))

    def with_changes(self, changes: dict[str, Any]) -> Recipe:
        """Return a new recipe with nested `changes` merged in, mappings key by key.

        A `dataset` takes the place of `datasets`, and the reverse.
        """
        plain = self.to_dict()
        for key, other in (("dataset", "datasets"), ("datasets", "dataset")):
            if changes.get(key) is not None:
                plain.pop(other, None)
        return Recipe.from_dict(merge(plain, changes))


def _arms_from_dict(given: Any) -> tuple[dict[str, Arm], list[str]]:
    """Build the arms from plain data; return them and the problems of those that can't be built."""
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
