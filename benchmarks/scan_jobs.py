"""A scan on a CPU with all threads in one process, and with a process of one thread for each core: which is faster.

    python benchmarks/scan_jobs.py

The same scan (two arms, the same steps) of a tiny classifier and of SmolLM2-135M, each with `--jobs 1` and with `--jobs
N`, N the cores (at most the arms), in a fresh process. Seconds are from the start of the process to the end of the
scan, as a user waits for them; `scan_seconds` leaves out imports. Losses must be equal to 1e-3: another number of
threads adds in another order. --rounds repeats all, and medians count; --tiny leaves out SmolLM2.
Prints the result as JSON; --keep writes benchmarks/scan_jobs.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import in_fresh_process, result_parser, write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))  # the tests' small models and texts

MODELS = ("tiny-classifier", "smollm2-135m")
STARTED = time.time()


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="repeat all measurements; medians count")
    parser.add_argument("--tiny", action="store_true", help="the tiny classifier alone")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "JOBS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(_scan(given.one[0], int(given.one[1]))))
        return
    os.environ.pop("OMP_NUM_THREADS", None)
    before, jobs = os.getloadavg()[0], min(max(_cores(), 2), 2)
    result: dict[str, Any] = {"jobs": jobs, "cores": _cores(), "load_before": round(before, 2), "models": {}}
    for model in MODELS[:1] if given.tiny else MODELS:
        rounds: dict[int, list[Any]] = {1: [], jobs: []}
        for number in range(given.rounds):
            for at_a_time in (1, jobs) if number % 2 == 0 else (jobs, 1):
                one = in_fresh_process(__file__, ["--one", model, str(at_a_time)])
                rounds[at_a_time].append(one)
                print(f"{model} --jobs {at_a_time}: {one['seconds']:.1f} s", file=sys.stderr, flush=True)
        result["models"][model] = _compared(rounds[1], rounds[jobs])
    result["environment"] = rounds[1][0]["environment"]
    write_result(given, Path(__file__).with_suffix(".json"), result, {"faster": _faster(result)})


def _compared(one: list[dict[str, Any]], several: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of both, and the largest difference between the losses of the same runs."""
    losses = [run["losses"] for run in (one[0], several[0])]
    if losses[0].keys() != losses[1].keys():
        raise SystemExit(f"Not the same runs: {losses}")
    pairs = [(a, b) for key in losses[0] for a, b in zip(losses[0][key], losses[1][key], strict=False)]
    medians = {
        name: {key: round(statistics.median(run[key] for run in runs), 2) for key in ("seconds", "scan_seconds")}
        for name, runs in {"one_process": one, "process_a_core": several}.items()
    }
    ratio = medians["one_process"]["seconds"] / medians["process_a_core"]["seconds"]
    return {
        **medians, "speedup": round(ratio, 3), "runs": len(losses[0]), "steps": one[0]["steps"],
        "largest_loss_difference": max(abs(a - b) for a, b in pairs),
        "rounds": {"one_process": [run["seconds"] for run in one],
                   "process_a_core": [run["seconds"] for run in several]},
    }  # fmt: skip


def _faster(result: dict[str, Any]) -> dict[str, str]:
    return {name: "process_a_core" if each["speedup"] > 1 else "one_process" for name, each in result["models"].items()}


def _scan(model: str, jobs: int) -> dict[str, Any]:
    from peft_recipes import scan
    from peft_recipes.distributed.quiet import quiet_libraries
    from peft_recipes.hardware.device import choose
    from peft_recipes.hardware.environment import environment

    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        recipe, rates, arms = _recipe(model, Path(folder))
        start = time.perf_counter()
        made = scan(recipe, rates, arms, budget=3_600, output=Path(folder) / "out", jobs=jobs)
        seconds = time.perf_counter() - start
    losses = {
        f"{arm} {run['learning_rate']:g}": [point["loss"] for point in run["validation"]]
        for arm, entry in made.data["arms"].items()
        for run in entry["runs"]
    }
    return {
        "seconds": round(time.time() - STARTED, 2), "scan_seconds": round(seconds, 2), "losses": losses,
        "steps": made.data["steps"], "environment": environment(choose({"use_cpu": True, "bf16": False})),
    }  # fmt: skip


def _recipe(model: str, folder: Path) -> Any:
    """The recipe, the learning rates and the arms of a scan; so many steps that the budget does not limit them."""
    if model == "smollm2-135m":
        from peft_recipes import load_recipe

        changes = {
            "training": {"max_steps": 8, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False},
            "dataset": {"train": 64, "validation": 24, "test": 8},
        }
        return load_recipe("smollm2-alpaca", embedded=True).with_changes(changes), [1e-4, 1e-3], ["full", "lora"]
    from ray_overhead import _recipe as tiny

    return tiny(folder).with_changes({"training": {"num_train_epochs": 5}}), [3e-3, 1e-2, 3e-2], ["full", "lora"]


def _cores() -> int:
    from peft_recipes.hardware.device import cpu_cores

    return cpu_cores()


if __name__ == "__main__":
    main()
