"""What a run writes when it pauses: the validation split evaluated with the weights of that step, and its times so far.

The run's own figures know nothing of a pause: they are those of a run that was not paused, and its times are sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TextIO

from peft_recipes.distributed import processes
from peft_recipes.recipe.metrics import METRICS
from peft_recipes.runs.log import log
from peft_recipes.runs.predictions import Evaluation
from peft_recipes.runs.progress import PAUSED, read_progress, write_progress
from peft_recipes.statistics.scores import example_scores

if TYPE_CHECKING:
    from transformers import Trainer

    from peft_recipes.measuring.steps import StepMeter
    from peft_recipes.training.setup import Setup


def write_pause(setup: Setup, trainer: Trainer, meter: StepMeter, lines: TextIO) -> dict[str, Any]:
    """Evaluate the validation split with the weights of this step, write the progress and return it with its status."""
    log(lines, stage="validate")
    with setup.watch("pauses"):
        evaluation = setup.task.evaluate(trainer, setup.prepared, "validation")
    return processes.from_rank_zero(lambda: _write(setup, trainer.state, meter, evaluation))


def continue_times(setup: Setup) -> None:
    """Let the times and notes of a run include those of its earlier chunks, and how they were trained."""
    earlier = read_progress(setup.run.folder, setup.signature)
    if earlier is None:
        return
    setup.guard.seconds += earlier["phases"].pop("guards", 0.0)
    setup.watch.add(earlier["phases"])
    setup.warm = setup.warm or earlier["warm"]
    setup.earlier_notes = earlier["notes"]


def _write(setup: Setup, state: Any, meter: StepMeter, evaluation: Evaluation) -> dict[str, Any]:
    folder, step = setup.run.folder, state.global_step
    earlier = read_progress(folder, setup.signature) or {"validation": []}
    session_notes = setup.session.notes if setup.session else []
    before = [point for point in earlier["validation"] if point["step"] < step]
    progress = {
        "schema": 1,
        "signature": setup.signature,
        "step": step,
        "of": state.max_steps,
        "seconds": sum(meter.steps),
        "validation": [*before, {"step": step, **evaluation.metrics}],
        "training": meter.losses[-1][1] if meter.losses else None,
        "phases": {**setup.watch.seconds, "total": setup.watch.total(), "guards": setup.guard.seconds},
        "warm": setup.warm,
        "notes": list(dict.fromkeys([*setup.earlier_notes, *setup.prepared.notes, *session_notes])),
    }
    write_progress(folder, progress, *_scores(setup, evaluation))
    return {"status": PAUSED, **progress}


def _scores(setup: Setup, evaluation: Evaluation) -> tuple[list[str], list[float]]:
    """Ids and scores of the validation examples by the metric that is followed there, else by the loss."""
    import pandas

    recipe, examples = setup.recipe, pandas.DataFrame(evaluation.predictions)
    metric = recipe.selection_metric
    known = metric in examples or (metric == "accuracy" and {"label", "prediction"} <= set(examples))
    metric = metric if known else "loss"
    ids, scores, _ = example_scores(examples, recipe.task, metric)
    return list(ids), list(scores if METRICS[metric].higher_is_better else -scores)
