"""`--measure`: take times and memory of finished runs again, alone, the arms taking turns.

Each turn is a process of its own (measure_worker.py), one at a time: a few steps after the warm-up, and the latency of
the saved checkpoint. The arms take turns for several rounds, so that a machine that grows slower hits all alike.
Metrics, checkpoints and predictions stay; the figures go into run.json as `measured`, and the statistics prefer them.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft_recipes.comparison.measure_worker import MARK
from peft_recipes.comparison.processes import run_to_end
from peft_recipes.errors import RecipeError
from peft_recipes.runs.files import write_json
from peft_recipes.runs.folder import RUN_FILE, Run, read_run
from peft_recipes.runs.lock import locked

ROUNDS = 3
STEPS = 5  # in each turn, after the warm-up

Turn = dict[str, Any]  # what remeasure returns


def measure_in_turns(
    runs: Sequence[Run],
    data: Path | None,
    report: Callable[[Run, int], None] = lambda run, number: None,
    turn: Callable[[Run, Path | None], Turn] | None = None,
) -> list[str]:
    """Measure each run in every round; write `measured` into each run.json, under the lock of its folder.

    report: called before each turn. turn: measures one run once; by default in a fresh process. Returns a note for each
    run that could not be measured; it keeps the figures of its training.
    """
    turn = turn or _in_fresh_process
    turns: dict[int, list[Turn]] = {index: [] for index in range(len(runs))}
    notes = []
    for number in range(1, ROUNDS + 1):
        for index, run in enumerate(runs):
            if index in turns:
                report(run, number)
                try:
                    turns[index].append(turn(run, data))
                except RecipeError as error:
                    notes.append(str(error))
                    del turns[index]
    for index, own in turns.items():
        run = runs[index]
        with locked(run.folder, wait=True):
            current = read_run(run.folder)
            if current is not None and current.data.get("signature") == run.data.get("signature"):
                write_json(run.folder / RUN_FILE, {**current.data, "measured": measured(run.data, own)})
    return notes


def measured(data: dict[str, Any], turns: Sequence[Turn]) -> dict[str, Any]:
    """Return the entry `measured` of a run.json: medians over the turns, the quiet ones if there are any."""
    quiet = [turn for turn in turns if turn["training"]["disturbance"]["verdict"] == "quiet"]
    counted = quiet or list(turns)

    def median(*path: str) -> float | None:
        values = []
        for value in counted:
            for key in path:
                value = None if value is None else value.get(key)
            values.append(value)
        return None if None in values else statistics.median(values)

    trained = data["training"]
    step = statistics.median(seconds for turn in counted for seconds in turn["step_seconds"])
    first_pass = median("training", "first_pass_seconds")
    variants = ("base", "adapter", "merged")
    return {
        "training": {
            "seconds": step * (trained["steps"] - trained["warmup_steps"]) + (first_pass or 0.0),
            "warmup_seconds": median("training", "warmup_seconds"),
            "median_step_seconds": step,
            "first_pass_seconds": first_pass,
            # Without the first pass: it is once in a run, but in every turn.
            "tokens_per_second": _per_second(counted, "tokens_per_second"),
            "examples_per_second": _per_second(counted, "examples_per_second"),
            "peak_memory_bytes": int(median("training", "peak_memory_bytes")),
            "disturbance": counted[0]["training"]["disturbance"],
        },
        "latency_ms": {name: median("latency_ms", name) for name in variants},
        "generation_tokens_per_second": counted[0]["generation_tokens_per_second"]
        and {name: median("generation_tokens_per_second", name) for name in variants},
        "environment": {**data["environment"], "shared_base": None, **counted[0]["environment"]},
        "rounds": len(turns),
        "quiet_rounds": len(quiet),
        "steps_per_round": len(turns[0]["step_seconds"]),
    }


def _per_second(turns: Sequence[Turn], key: str) -> float | None:
    """The median over turns of a throughput, over the seconds of the steps alone."""
    rates = []
    for turn in turns:
        training = turn["training"]
        if training[key] is None:
            return None
        rates.append(training[key] * training["seconds"] / sum(turn["step_seconds"]))
    return statistics.median(rates)


def _in_fresh_process(run: Run, data: Path | None) -> Turn:
    arm, seed = run.data["arm"], run.data["seed"]
    words = [str(run.folder), arm, str(seed), str(STEPS), *([str(data)] if data else [])]
    command = [sys.executable, "-m", "peft_recipes.comparison.measure_worker", *words]
    code, lines = run_to_end(command)
    if code:
        reason = " ".join(" ".join(lines).split())[-300:] or f"exit code {code}"
        raise RecipeError(f"Arm '{arm}', seed {seed} could not be measured again: {reason}")
    return json.loads(next(line for line in reversed(lines) if line.startswith(MARK)).removeprefix(MARK))
