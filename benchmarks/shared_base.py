"""LoRA runs trained together on one base in one process, compared with the same runs one after another.

    python benchmarks/shared_base.py

SmolLM2-135M's shape with random weights, made rows of Alpaca's lengths, LoRA r=16 on all linear layers, batch 8: 1 and
2 seeds in one process each, as `compare --share-base` trains them, and two of these runs in a process of their
own. Of each: the median step (of all its runs together), the peak memory of the process, the seconds of loading the
base (of all its runs), and of the whole process; "alone" is the run of seed 0 times the number of runs, its peak once.
About 3 minutes on two CPU cores. Prints a Markdown table and the result as JSON; --keep writes
benchmarks/shared_base.json. --tiny: a small model, for a test.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import TRIES, in_fresh_process, result_parser, write_result

BATCH, STEPS = 8, 7  # the first 3 steps are warm-up


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("--runs", default="1,2", help="numbers of runs that are trained together")
    parser.add_argument("--tiny", action="store_true", help="a small model and three steps")
    parser.add_argument("--one", nargs=2, metavar=("RECIPE", "SEEDS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(_measured(Path(given.one[0]), [int(seed) for seed in given.one[1].split(",")])))
        return
    from gpu.workspace import recipe_file

    from peft_recipes.hardware.device import choose

    counts, device = [int(count) for count in given.runs.split(",")], choose({}).device
    with tempfile.TemporaryDirectory() as folder:
        shape = "tiny" if given.tiny else "smollm2-135m"
        path = recipe_file(Path(folder), shape, "alpaca", BATCH * STEPS, device, tiny=given.tiny)

        def measure(seeds: list[int]) -> dict[str, Any]:
            words = ["--one", str(path), ",".join(map(str, seeds))]
            return in_fresh_process(__file__, words, tries=1 if given.tiny else TRIES)

        alone, again = measure([0]), measure([1])
        together = [measure(list(range(count))) for count in counts]
    environment = alone.pop("environment")
    rows = [_row(each, alone) for each in together]
    gap = max(
        abs(a - b)
        for each in together
        for run, losses in zip((alone, again), each["losses"], strict=False)
        for a, b in zip(run["losses"][0], losses, strict=True)
    )
    print("| runs | step together (s) | alone (s) | peak (MB) | loading (s) | alone (s) | all (s) | alone (s) |\n"
          "|---:|---:|---:|---:|---:|---:|---:|---:|")  # fmt: skip
    for row in rows:
        print(f"| {row['runs']} | {row['step_seconds']:.2f} | {row['step_seconds_alone']:.2f} | "
              f"{row['peak_memory_bytes'] / 1e6:,.0f} | {row['load_seconds']:.2f} | {row['load_seconds_alone']:.2f} | "
              f"{row['process_seconds']:.1f} | {row['process_seconds_alone']:.1f} |")  # fmt: skip
    result = {"rows": rows, "alone": [alone, again], "largest_loss_difference": gap, "batch": BATCH,
              "steps": STEPS, "environment": environment}  # fmt: skip
    write_result(given, Path(__file__).with_suffix(".json"), result)


def _row(together: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    """Figures of runs together, next to those of one alone as often as there are runs."""
    count = together["runs"]
    times = ("step_seconds", "load_seconds", "process_seconds")
    busy = [each["disturbance"]["verdict"] == "disturbed" for each in (together, alone)]
    return {
        "runs": count,
        **{name: together[name] for name in times},
        **{f"{name}_alone": count * alone[name] for name in times},
        "peak_memory_bytes": together["peak_memory_bytes"],
        "peak_memory_bytes_alone": alone["peak_memory_bytes"],
        "speed_up": None if any(busy) else count * alone["step_seconds"] / together["step_seconds"],
        "disturbance": together["disturbance"],
    }


def _measured(recipe_path: Path, seeds: list[int]) -> dict[str, Any]:
    """Train the LoRA runs of these seeds in this process; one seed alone as `train` does."""
    start = time.perf_counter()
    from peft_recipes import load_recipe
    from peft_recipes.training.run import train
    from peft_recipes.training.together import train_together

    changes = {"training": {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "eval_strategy": "no"},
               "skip_checks": ["reload", "merge", "frozen"]}  # fmt: skip
    recipe = load_recipe(recipe_path).with_changes(changes)
    with tempfile.TemporaryDirectory() as folder:
        if len(seeds) == 1:
            runs = [train(recipe, "lora", seed=seeds[0], output=folder)]
        else:
            outcomes = train_together(recipe, [("lora", seed) for seed in seeds], output=folder).values()
            if failed := [outcome for outcome in outcomes if isinstance(outcome, BaseException)]:
                raise failed[0]
            runs = list(outcomes)
    first = runs[0].data["training"]
    return {
        "runs": len(seeds),
        "step_seconds": statistics.median(run.data["training"]["median_step_seconds"] for run in runs),
        "peak_memory_bytes": max(run.data["training"]["peak_memory_bytes"] for run in runs),
        "load_seconds": sum(run.data["seconds"]["load"] for run in runs),
        "process_seconds": time.perf_counter() - start,
        "losses": [[loss for _, loss in run.data["training"]["losses"]] for run in runs],
        "packed": first["batches"],
        "disturbance": first["disturbance"],
        "environment": runs[0].data["environment"],
    }


if __name__ == "__main__":
    main()
