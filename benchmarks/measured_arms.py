"""What the benchmarks share: a measurement in a process of its own, and this project's step held beside trl's two."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ARMS = ("trl-default", "trl-best", "peft-recipes")
WARMUP = 3  # steps that are not timed


def in_fresh_process(script: str, words: list[str]) -> dict[str, Any]:
    """The JSON of the last line that the script prints. Raises SystemExit with the end of its stderr where it fails."""
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def as_it_comes() -> None:
    """From here on this process's models are transformers' own, none of their operations replaced by ours."""
    from peft_recipes.kernels import activations, onednn_linear

    activations.fuse = onednn_linear.speed_up = lambda model: None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--steps, --batch, --rounds and the hidden --one ARM."""
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=1, help="all three in turn, so often; the middle one is shown")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)


def check_steps(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    if given.steps <= WARMUP or given.rounds < 1:
        parser.error(f"--steps must be more than the {WARMUP} warm-up steps, --rounds 1 or more")


def compare_arms(
    script: str, words: list[str], kind: str, means: dict[str, str], about: dict[str, Any], rounds: int = 1,
    more: Callable[[dict[str, Any]], dict[str, float]] = lambda ours: {},
) -> None:  # fmt: skip
    """Each arm in a fresh process; a line each, the document in a folder named as the script, its summary as last line.

    kind: what the file is named after. about: what else the document says. rounds: how often all arms take their turn;
    the document is the round whose ratio to trl's best flags is the median (the lower of two in the middle), and holds
    every round's summary: a machine that others use as well is not equally fast at all times. more: further figures
    from this project's arm.
    """
    made = []
    for number in range(1, rounds + 1):
        found = {}
        for arm in ARMS:
            found[arm] = in_fresh_process(script, ["--one", arm, *words])
            speed, step = found[arm]["tokens_per_second"], found[arm]["median_step_seconds"]
            peak = found[arm]["peak_memory_bytes"] / 1e9
            print(f"{number}/{rounds} {arm:13} {speed:9.1f} tokens/s   median step {step:7.3f} s   peak {peak:5.2f} GB",
                  flush=True)  # fmt: skip
        made.append(({**_summary(found), **more(found["peft-recipes"])}, found))
    ordered = sorted(made, key=lambda one: one[0]["ratio_to_trl_best"])
    summary, found = ordered[(rounds - 1) // 2]
    environment = found["peft-recipes"].pop("environment")
    document = {**summary, **about, "means": means, "rounds": [one[0] for one in made], "arms": found,
                "environment": environment}  # fmt: skip
    path = Path(script).with_suffix("") / f"{kind}-{environment['device']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(summary))


def _summary(found: dict[str, Any]) -> dict[str, float]:
    ours, default, best = found["peft-recipes"], found["trl-default"], found["trl-best"]
    gaps = [abs(a - b) for a, b in zip(ours["losses"], default["losses"], strict=True)]
    norms = [abs(a - b) for a, b in zip(ours["gradient_norms"], default["gradient_norms"], strict=True)]
    return {
        "ratio_to_trl_default": ours["tokens_per_second"] / default["tokens_per_second"],
        "ratio_to_trl_best": ours["tokens_per_second"] / best["tokens_per_second"],
        "memory_ratio_to_trl_default": ours["peak_memory_bytes"] / default["peak_memory_bytes"],
        "largest_loss_difference": max(gaps),
        "largest_gradient_norm_difference": max(norms),
    }


def step_figures(meter: Any, norms: list[float], tokens: list[int], seconds_before: float = 0.0) -> dict[str, Any]:
    """What one arm gives back. tokens: of each step's batch. seconds_before: of work done once for the timed steps."""
    timed = slice(WARMUP, None)
    return {
        "tokens_per_second": sum(tokens[timed]) / (sum(meter.steps[timed]) + seconds_before),
        "median_step_seconds": statistics.median(meter.steps[timed]),
        "step_seconds": meter.steps,
        "tokens": tokens,
        "peak_memory_bytes": meter.memory.peak,
        "losses": [loss for _, loss in meter.losses],
        "gradient_norms": norms,
    }


def trl_options(given: argparse.Namespace, recipe: Any, hardware: Any, folder: str) -> dict[str, Any]:
    """The arguments of trl's trainers that make its arms comparable: the recipe's rate, seed and order of rows."""
    best = given.one == "trl-best"
    return {
        "output_dir": folder,
        "per_device_train_batch_size": given.batch,
        "max_steps": given.steps,
        "learning_rate": recipe.arms["lora"].learning_rate,
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


def norms_callback(into: list[float]) -> Any:
    """A callback that keeps the gradient norm of each step."""
    from transformers import TrainerCallback

    class Norms(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "grad_norm" in (logs or {}):
                into.append(float(logs["grad_norm"]))

    return Norms()
