"""Everything that needs a GPU, in one command: tests, speed and memory beside trl, plan and measured peak, generation.

    python benchmarks/on_gpu.py --list                          # the steps and their estimated minutes
    python benchmarks/on_gpu.py --wheels                        # what a machine with torch and transformers lacks
    python benchmarks/on_gpu.py --out results --minutes 9       # as many steps as fit, the most useful first
    python benchmarks/on_gpu.py --out results --minutes 9       # the rest: a step that has a result is not run again
    python benchmarks/on_gpu.py --out results --keep            # results/on_gpu.json -> benchmarks/on_gpu/DEVICE.json

No network: models have random weights of SmolLM2-135M's, Qwen3-0.6B's and Llama-3-8B's configurations, rows are made
with Alpaca's lengths (or 2,048 tokens each). Each step runs in a fresh process and writes DIR/steps/NAME.json as it
ends, and all of them stand in DIR/on_gpu.json. A cell that runs out of memory, a step that crashes or takes twice its
estimate is a result, and the next step goes on. `--device cpu --tiny` runs the same code on a tiny model without a
GPU; its figures are no result, and --keep refuses them.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package, where it is not installed

from gpu.steps import Step, steps_of
from gpu.wheels import THERE, wheels
from harness import result_parser, write_result

KEPT = Path(__file__).with_suffix("")


def main(words: list[str] | None = None) -> None:
    parser = _parser()
    given = parser.parse_args(words)
    steps = _chosen(parser, given)
    if given.list:
        _list(steps, given.out)
        return
    if given.wheels:
        print("\n".join(wheels(given.python, given.have.split(","))))
        return
    if given.out is None:
        parser.error("--out DIR is needed: where the results go, and where an earlier call's are continued")
    if given.keep or given.output:
        _keep(parser, given)
        return
    _check_device(parser, given)
    from gpu.running import Running

    def again(name: str) -> bool:
        return given.again is not None and fnmatch.fnmatch(name, given.again)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="on-gpu-") as made:
        work = given.work or Path(made)
        work.mkdir(parents=True, exist_ok=True)
        running = Running(given.out, work, given.device, given.tiny, given.minutes, say)
        _check_same_device(parser, given, running.results)
        try:
            running.run(steps, again)
        except KeyboardInterrupt:
            say(f"Interrupted. {len(running.results)} results are in {given.out}; the same call goes on from there.")
            raise SystemExit(130) from None
    states = {name: made["status"] for name, made in running.results.items()}
    print(json.dumps({"device": given.device, "steps": states, "left_out": running.left_out}))


def _parser() -> argparse.ArgumentParser:
    parser = result_parser(__doc__)
    parser.add_argument("--out", type=lambda name: Path(name).absolute(), metavar="DIR", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps together (9)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and a cell or two of each kind")
    parser.add_argument("--only", metavar="PATTERN", help="only the steps whose name matches: 'sft-qwen3*'")
    parser.add_argument("--again", nargs="?", const="*", metavar="PATTERN", help="run these steps again (all)")
    parser.add_argument("--list", action="store_true", help="print the steps and their estimated minutes")
    parser.add_argument("--wheels", action="store_true", help="print the packages that a machine with torch lacks")
    parser.add_argument("--python", default="3.12", help="of --wheels: that machine's Python (3.12)")
    parser.add_argument("--have", default=",".join(THERE), help="of --wheels: what it has, with what that needs itself")
    parser.add_argument("--work", type=lambda name: Path(name).absolute(), metavar="DIR",
                        help="folder of the models and rows, kept for the next call (a temporary one)")  # fmt: skip
    return parser


def _chosen(parser: argparse.ArgumentParser, given: argparse.Namespace) -> list[Step]:
    steps = steps_of(given.tiny)
    for pattern in (given.only, given.again):
        if pattern is not None and not any(fnmatch.fnmatch(step.name, pattern) for step in steps):
            names = ", ".join(step.name for step in steps)
            parser.error(f"no step matches '{pattern}'; there are: {names}")
    return [step for step in steps if given.only is None or fnmatch.fnmatch(step.name, given.only)]


def _list(steps: list[Step], out: Path | None) -> None:
    from gpu.running import read_results

    results, total = read_results(out) if out is not None else {}, 0.0
    print(f"{'step':44} {'min':>5} {'sum':>6}  what")
    for step in steps:
        total += step.minutes
        made = results.get(step.name)
        done = f" ({made['status']} in {made['wall_seconds']:.0f} s)" if made else ""
        print(f"{step.name:44} {step.minutes:5.1f} {total:6.1f}  {step.about}{done}")


def _check_device(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here; --device cpu --tiny runs the same steps on a tiny model")
    if given.device == "cpu" and not given.tiny:
        parser.error("--device cpu needs --tiny: the models would take hours on a CPU")


def _check_same_device(parser: argparse.ArgumentParser, given: argparse.Namespace, results: dict[str, Any]) -> None:
    """A folder holds the results of one device alone: ratios across devices would say nothing."""
    there = results.get("device", {}).get("environment", {}).get("device_name")
    if there is None:
        return
    from peft_recipes.hardware.device import choose

    here = choose({"use_cpu": given.device == "cpu", "bf16": False}).device_name
    if here != there:
        parser.error(f"{given.out} holds results of {there}, and this is {here}: name another folder")


def _keep(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Write the results as one file of benchmarks/on_gpu/, or where --output says."""
    from gpu.running import read_results

    results = read_results(given.out)
    environment = results.get("device", {}).get("environment")
    if environment is None:
        parser.error(f"{given.out} has no result of the step `device`, which says what was measured")
    if given.keep and environment["device"] != "cuda":
        parser.error("--keep keeps a GPU's results, and these are of a CPU; --output FILE writes them elsewhere")
    slug = re.sub(r"[^a-z0-9]+", "-", environment["device_name"].lower()).strip("-")
    document = {
        "environment": environment,
        "steps": [results[s.name] for s in steps_of(given.tiny) if s.name in results],
    }
    write_result(given, KEPT / f"{slug}.json", document, {"steps": len(document["steps"])})


if __name__ == "__main__":
    main()
