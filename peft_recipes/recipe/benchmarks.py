"""The `benchmarks` of a recipe: tasks of lm-evaluation-harness by name, by file, or embedded, and how each is called.

Leaf of the import tree: the command line checks names here without importing lm_eval.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from peft_recipes.recipe.dataset import EMBEDDED
from peft_recipes.recipe.options import LANGUAGE_TASKS

_SPLITS = ("train", "validation", "test", "pretrain")


def is_file(benchmark: str) -> bool:
    """Whether a benchmark is named by the file of its task."""
    return benchmark.endswith((".yaml", ".yml"))


def benchmark_name(benchmark: str) -> str:
    """Return a benchmark's name in results: `arc_easy` itself, `mine` of `tasks/mine.yaml`, `x` of `embedded:x`."""
    if is_file(benchmark):
        return benchmark.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0]
    return benchmark.removeprefix(EMBEDDED)


def benchmark_problems(
    benchmarks: Sequence[str], examples: int | None, task: str, splits: Collection[str] = ()
) -> list[str]:
    """Return what is wrong with a recipe's benchmarks as far as it shows without lm_eval, one line each.

    splits: the names of its further evaluation sets.
    """
    problems, names = [], [benchmark_name(benchmark) for benchmark in benchmarks]
    if benchmarks and task not in LANGUAGE_TASKS:
        problems.append(
            f"benchmarks: they are for language models ({', '.join(LANGUAGE_TASKS)}), not for {task}. Leave them out."
        )
    for benchmark, name in zip(benchmarks, names, strict=True):
        if not name.strip():
            problems.append(f"benchmarks: expected names or files of lm_eval tasks, got {benchmark!r}.")
        elif name in (*_SPLITS, *splits):
            problems.append(f"benchmarks: '{name}' is the name of a split of the recipe; rename the file.")
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        problems.append(f"benchmarks: '{name}' is there {names.count(name)} times; name each once.")
    if examples is not None and examples < 2:
        problems.append(f"benchmark_examples: expected 2 or more, or null for all, got {examples}.")
    return problems
