"""Shared by the benchmarks: options, output, measurements in a fresh process, and the comparison of a step with trl's.

A benchmark prints its result as JSON and writes no file unless --keep or --output is given.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_recipes.runs.files import write_json, write_text

ARMS = ("trl-default", "trl-best", "peft-recipes")
WARMUP = 3  # steps that are not timed


def result_parser(description: str) -> argparse.ArgumentParser:
    """A parser with --keep and --output, described by the script's docstring."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--keep", action="store_true", help="replace the kept JSON file in benchmarks/")
    target.add_argument(
        "--output", type=lambda name: Path(name).absolute(), metavar="FILE", help="write the JSON to this file"
    )
    return parser


def write_result(
    options: argparse.Namespace, kept: Path, result: Any, summary: Any = None, text: str | None = None
) -> None:
    """Print the result as one line of JSON; with --keep or --output write it to a file and print the summary instead.

    kept: the file that --keep replaces. text: the file's content, if it is laid out differently.
    """
    path = kept if options.keep else options.output
    if path is None:
        print(json.dumps(result))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if text is None:
        write_json(path, result)
    else:
        write_text(path, text)
    print(f"Wrote {path}", file=sys.stderr)
    if summary is not None:
        print(json.dumps(summary))


TRIES = 3  # of a measurement on a machine that other processes disturb


def in_fresh_process(script: str, words: list[str], tries: int = TRIES) -> dict[str, Any]:
    """Run a script and parse the last line it prints as JSON. Raises SystemExit with its stderr if it fails.

    Where its entry `disturbance` says that the machine was busy, it is run again, at most `tries` times in all; the
    last result then still says so.
    """
    for left in reversed(range(tries)):
        done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
        result = json.loads(done.stdout.strip().splitlines()[-1])
        if not (why := disturbed(result)):
            break
        again = "measured again" if left else "kept and marked"
        print(f"{' '.join(words)}: disturbed ({why}), {again}", file=sys.stderr, flush=True)
    return result


def disturbed(result: Any) -> str | None:
    """Why a measurement's times are not its own; None for a quiet one, and for one that doesn't say."""
    found = result.get("disturbance") if isinstance(result, dict) else None
    return found["why"] if found and found["verdict"] == "disturbed" else None


def disable_speedups() -> None:
    """Leave the models of this process as transformers builds them, without our replacements of operations."""
    from peft_recipes.kernels import activations, onednn_linear

    activations.fuse = onednn_linear.speed_up = lambda model: None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --steps, --batch, --rounds and the hidden --one ARM."""
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps per arm")
    parser.add_argument(
        "--rounds", type=int, default=1, help="measure all three arms this often; the median round is the result"
    )
    parser.add_argument("--batch", type=int, default=8, help="examples per step")
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)


def check_steps(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    if given.steps <= WARMUP or given.rounds < 1:
        parser.error(f"--steps must be more than the {WARMUP} warm-up steps, --rounds 1 or more")


def compare_arms(
    options: argparse.Namespace,
    script: str,
    words: list[str],
    name: str,
    means: dict[str, str],
    about: dict[str, Any],
    extra: Callable[[dict[str, Any]], dict[str, float]] = lambda ours: {},
) -> None:
    """Measure each arm in a fresh process, print a line for each, and write the result.

    name: of the kept file, in the folder named like the script. about: further entries of the result. extra: further
    figures from this project's arm. The speed of a shared machine varies: with several rounds the result is the one
    with the median ratio to trl's best flags (the lower of the two middle ones), and it holds the summaries of all.
    Disturbed rounds count only if there is no other; their ratios are null, and `disturbed` says why.
    """
    rounds, measured = options.rounds, []
    for number in range(1, rounds + 1):
        by_arm = {}
        for arm in ARMS:
            by_arm[arm] = in_fresh_process(script, ["--one", arm, *words])
            speed, step = by_arm[arm]["tokens_per_second"], by_arm[arm]["median_step_seconds"]
            peak = by_arm[arm]["peak_memory_bytes"] / 1e9
            print(f"{number}/{rounds} {arm:13} {speed:9.1f} tokens/s   median step {step:7.3f} s   peak {peak:5.2f} GB",
                  flush=True)  # fmt: skip
        measured.append(({**_summary(by_arm), **extra(by_arm["peft-recipes"])}, by_arm))
    summary, by_arm = _median_round(measured)
    environment = by_arm["peft-recipes"].pop("environment")
    document = {**summary, **about, "means": means, "rounds": [one[0] for one in measured], "arms": by_arm,
                "environment": environment}  # fmt: skip
    kept = Path(script).with_suffix("") / f"{name}-{environment['device']}.json"
    write_result(options, kept, document, summary)


def _median_round(measured: list[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The round with the median ratio of those that were quiet; the first, if none was."""
    quiet = [one for one in measured if not one[0]["disturbed"]]
    ordered = sorted(quiet, key=lambda one: one[0]["ratio_to_trl_best"])
    return ordered[(len(ordered) - 1) // 2] if ordered else measured[0]


def _summary(by_arm: dict[str, Any]) -> dict[str, Any]:
    ours, default, best = by_arm["peft-recipes"], by_arm["trl-default"], by_arm["trl-best"]
    gaps = [abs(a - b) for a, b in zip(ours["losses"], default["losses"], strict=True)]
    norms = [abs(a - b) for a, b in zip(ours["gradient_norms"], default["gradient_norms"], strict=True)]
    busy = {arm: why for arm, result in by_arm.items() if (why := disturbed(result))}

    def speed_ratio(other: dict[str, Any]) -> float | None:
        return None if busy else ours["tokens_per_second"] / other["tokens_per_second"]

    return {
        "ratio_to_trl_default": speed_ratio(default),
        "ratio_to_trl_best": speed_ratio(best),
        "disturbed": busy,
        "memory_ratio_to_trl_default": ours["peak_memory_bytes"] / default["peak_memory_bytes"],
        "largest_loss_difference": max(gaps),
        "largest_gradient_norm_difference": max(norms),
    }


def step_figures(meter: Any, norms: list[float], tokens: list[int], seconds_before: float = 0.0) -> dict[str, Any]:
    """The figures of one arm. tokens: of each step's batch. seconds_before: spent once, before the timed steps."""
    timed = slice(WARMUP, None)
    return {
        "tokens_per_second": sum(tokens[timed]) / (sum(meter.steps[timed]) + seconds_before),
        "median_step_seconds": statistics.median(meter.steps[timed]),
        "disturbance": meter.disturbance.figures(meter.device),
        "step_seconds": meter.steps,
        "data_seconds": meter.data_seconds,
        "tokens": tokens,
        "peak_memory_bytes": meter.memory.peak,
        "losses": [loss for _, loss in meter.losses],
        "gradient_norms": norms,
    }


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def trl_options(given: argparse.Namespace, recipe: Any, hardware: Any, folder: str, arm: Any = None) -> dict[str, Any]:
    """Arguments that make trl's arms comparable: the arm's learning rate, the seed and the order of examples."""
    best = given.one != "trl-default"
    return {
        "output_dir": folder,
        "per_device_train_batch_size": given.batch,
        "max_steps": given.steps,
        "learning_rate": (arm or recipe.arms["lora"]).learning_rate,
        "train_sampling_strategy": "group_by_length" if best else "sequential",
        **({"gradient_checkpointing": False} if best else {}),
        "max_length": recipe.max_length,
        "use_cpu": hardware.device == "cpu",
        "bf16": hardware.precision == "bf16",
        "dataloader_pin_memory": hardware.device == "cuda",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
        "data_seed": 0,
    }


def count_waiting(trainer: Any, meter: Any) -> None:
    """Count the time that each step of any Trainer waits for its batches in the meter's steps."""
    if hasattr(trainer, "on_data"):
        trainer.on_data = meter.add_data_seconds
        return
    get_batch_samples = trainer.get_batch_samples

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        batches = get_batch_samples(*args, **kwargs)
        meter.add_data_seconds(time.perf_counter() - start)
        return batches

    trainer.get_batch_samples = timed


def norms_callback(into: list[float]) -> Any:
    """A callback that records the gradient norm of each step."""
    from transformers import TrainerCallback

    class Norms(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "grad_norm" in (logs or {}):
                into.append(float(logs["grad_norm"]))

    return Norms()
