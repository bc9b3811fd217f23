"""Evaluate a saved adapter next to its base: on benchmarks, or on the test split of its run, paired by example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.adapters.open import OpenedAdapter, open_adapter
from peft_recipes.adapters.open import evaluate as evaluate_test
from peft_recipes.adapters.saved import RECIPE_FILE
from peft_recipes.errors import RecipeError
from peft_recipes.recipe.benchmarks import benchmark_problems, is_file
from peft_recipes.recipe.metrics import METRICS
from peft_recipes.runs.folder import resolved_recipe
from peft_recipes.runs.predictions import Evaluation
from peft_recipes.scoring import benchmark_tasks
from peft_recipes.scoring.benchmarks import BATCH_SIZE, run_benchmark
from peft_recipes.statistics.bootstrap import paired_difference, verdict
from peft_recipes.statistics.scores import example_scores

if TYPE_CHECKING:
    from torch import nn

Results = dict[str, tuple[Evaluation, dict[str, Any]]]  # name -> its evaluation, and what its metric is

ALL = 0  # of benchmark_examples


def evaluate(
    adapter: str | Path,
    benchmarks: Sequence[str] = (),
    *,
    base: str | None = None,
    benchmark_examples: int | None = None,
    trust_remote_code: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluate a base and a saved adapter of it; return what `peft-recipes evaluate --json` prints.

    benchmarks: lm_eval tasks as in a recipe; none: the test split of the adapter's run, and the benchmarks of its
    recipe that are no files (a task's file may run code, so only the caller names one). base: in place of the one that
    the adapter names. benchmark_examples: the most of each benchmark, `ALL` for all; None: as the recipe says.

    Raises RecipeError: no adapter, no such benchmark, benchmarks of a model that is no causal one, nothing to evaluate.
    """
    opened = open_adapter(adapter, base, trust_remote_code=trust_remote_code)
    recipe, with_test = opened.recipe, not benchmarks
    if with_test and not opened.saved.is_run:
        raise RecipeError(
            f"{opened.folder} is no run of peft-recipes: it does not say what it was tested on. Name --benchmarks."
        )
    if with_test and not trust_remote_code:
        own = resolved_recipe(opened.folder / RECIPE_FILE)  # `recipe` is without what runs code
        if function := own.score or own.reward:
            raise RecipeError(
                f"The recipe of {opened.folder} scores answers with the function {function}, which would run here. "
                "Read it, and pass --trust-remote-code if you trust it; or name --benchmarks."
            )
    benchmarks = benchmarks or [each for each in recipe.benchmarks if not is_file(each)]
    examples = recipe.benchmark_examples if benchmark_examples is None else benchmark_examples or None
    if problems := benchmark_problems(benchmarks, examples, recipe.task):
        raise RecipeError(*problems)
    tasks = benchmark_tasks.load(benchmarks)
    total, done = 2 * (with_test + len(tasks)), 0

    def evaluated(model: nn.Module, with_test: bool) -> Results:
        nonlocal done
        results: Results = {}
        if with_test:
            test = evaluate_test(opened, model)
            results["test"] = test, test_facts(opened, test)
            on_progress(done := done + 1, total)
        for name, each in tasks.items():
            size = recipe.training.get("per_device_eval_batch_size", BATCH_SIZE)
            result = run_benchmark(model, opened.processor, each, examples, size)
            results[name] = Evaluation(result.metrics, result.predictions), result.facts
            on_progress(done := done + 1, total)
        return results

    model = opened.load_base()
    if with_test:
        opened.task.use_base(model, opened.prepared, opened.quantise)
    # The base's head is untrained if the adapter has its own; Trainer takes no quantised base by itself.
    why = "its head is untrained" if opened.has_own_head else "it is quantised" if opened.quantise else ""
    before = evaluated(model, with_test and not why)
    after = evaluated(opened.attach(model), with_test)
    return {
        "adapter": str(opened.folder),
        "base": opened.base_name,
        "task": recipe.task,
        "results": {
            name: compared(before.get(name, (None, {}))[0], evaluation, facts, recipe.task)
            for name, (evaluation, facts) in after.items()
        },
        "notes": [f"The base is not evaluated on the test split: {why}."] if with_test and why else [],
    }


def test_facts(opened: OpenedAdapter, test: Evaluation) -> dict[str, Any]:
    recipe = opened.recipe
    metric = recipe.metric if recipe.metric in test.metrics else recipe.selection_metric  # a judge is not asked
    return {
        "metric": metric,
        "higher_is_better": METRICS[metric].higher_is_better,
        "share": METRICS[metric].share,
        "margin": recipe.margin if metric == recipe.metric else None,
    }


def compared(base: Evaluation | None, adapter: Evaluation, facts: dict[str, Any], task: str) -> dict[str, Any]:
    """One row of the result: both values, and their paired difference with its interval and verdict."""
    import numpy as np
    import pandas

    metric, share = facts["metric"], facts["share"]
    ids, ours, weights = example_scores(pandas.DataFrame(adapter.predictions), task, metric)
    row = {
        **{key: facts[key] for key in ("metric", "higher_is_better", "share")},
        "examples": len(ids),
        "base": base and base.metrics[metric],
        "adapter": adapter.metrics[metric],
        "metrics": {"base": base and base.metrics, "adapter": adapter.metrics},
        "difference": None,
        "verdict": None,
    }
    if base is None or len(ids) < 2:  # the interval of a difference needs two
        return row
    others, theirs, _ = example_scores(pandas.DataFrame(base.predictions), task, metric)
    assert np.array_equal(ids, others), f"the base and the adapter have other examples of {metric}"
    difference = paired_difference(ours[None], theirs[None], weights=weights, share=share)
    margin = facts.get("margin") or (0.01 if share else 0.01 * abs(row["base"]))
    fields = {key: value for key, value in difference.to_dict().items() if key not in ("seeds", "note")}
    return {
        **row,
        "difference": {**fields, "margin": margin},
        "verdict": verdict(difference, margin, facts["higher_is_better"]),
    }
