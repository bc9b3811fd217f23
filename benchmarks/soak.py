"""Kill a comparison of many short runs and its workers at random, and resume it until it is complete.

    python benchmarks/soak.py --runs 200 --kills 20

On a small random model. It passes if the last call has every run of every seed, no files are left behind (lock,
temporary file, checkpoint), the memory of the comparison's process does not grow, a sample of runs equals undisturbed
runs, and the table equals one collected from the runs. Prints the result as JSON; --keep writes benchmarks/soak.json.
Exit code 1 if it fails.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from harness import result_parser, write_result
from malformed_inputs import valid_inputs  # a recipe with full and lora on a tiny DistilBERT

_GROWTH = 1.1  # limit of the comparison's resident memory: last tenth of runs relative to the first


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.compare:
        recipe, folder, seeds = given.compare
        raise SystemExit(_compare(Path(recipe), Path(folder), int(seeds)))
    start = time.time()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        recipe = valid_inputs(root / "there")["classify"]
        calls, kills = _call_until_complete(recipe, root / "soak", given)
        document = {"runs": given.runs, "kills": kills, "calls": calls, **_verdicts(recipe, root, given.runs // 2)}
    document["minutes"] = round((time.time() - start) / 60, 1)
    write_result(given, Path(__file__).resolve().with_suffix(".json"), document, document)
    raise SystemExit(0 if document["held"] else 1)


def _compare(recipe: Path, folder: Path, seeds: int) -> int:
    """Run the comparison in this process; record its memory after every run."""
    from peft_recipes import compare, load_recipe

    folder.mkdir(exist_ok=True)
    with (folder / "memory.txt").open("a") as notes:

        def note(progress: Any) -> None:
            if progress.state != "running":
                notes.write(f"{psutil.Process().memory_info().rss}\n")
                notes.flush()

        notes.write("start\n")
        made = compare(load_recipe(str(recipe)), ["full", "lora"], range(seeds), output=folder, on_progress=note)
    return 1 if made.failed else 0


def _call_until_complete(recipe: Path, folder: Path, given: argparse.Namespace) -> tuple[int, dict[str, int]]:
    draw, kills, calls = random.Random(given.seed), {"worker": 0, "comparison": 0}, 0
    command = [sys.executable, __file__, "--compare", str(recipe), str(folder), str(given.runs // 2)]
    while True:
        calls += 1
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and sum(kills.values()) < given.kills:
            time.sleep(draw.uniform(2, 12))
            what = "comparison" if draw.random() < 0.3 else "worker"
            if _kill(process, what):
                kills[what] += 1
        if process.wait() == 0:
            return calls, kills


def _kill(process: subprocess.Popen[bytes], what: str) -> bool:
    try:
        parent = psutil.Process(process.pid)
        victims = [parent] if what == "comparison" else parent.children()
        for victim in victims:
            victim.send_signal(signal.SIGKILL)
        return bool(victims)
    except psutil.NoSuchProcess:
        return False


def _verdicts(recipe: Path, root: Path, seeds: int) -> dict[str, Any]:
    from peft_recipes import compare, load_recipe
    from peft_recipes.comparison.collecting import collect
    from peft_recipes.comparison.comparison import read_comparison

    folder = root / "soak" / "tiny"
    made, chosen = read_comparison(folder), load_recipe(str(recipe))
    arms = made.data["arms"]
    left = [str(p.relative_to(folder)) for p in folder.rglob("*")
            if p.name.startswith(".") or p.name in ("trainer", "features")]  # fmt: skip
    again = collect(chosen, ["full", "lora"], range(seeds), root / "soak").data
    few = sorted(random.Random(1).sample(range(seeds), min(3, seeds)))
    calm = compare(chosen, ["full", "lora"], few, output=root / "calm").data["arms"]
    memory = (root / "soak" / "memory.txt").read_text().split("start\n")[-1].split()
    tenth = max(len(memory) // 10, 1)
    first, last = (sum(map(int, part)) / tenth for part in (memory[:tenth], memory[-tenth:]))
    checks = {
        "every_run_is_there": all(arm["seeds"] == list(range(seeds)) and not arm["failures"] for arm in arms.values()),
        "left_behind": left,
        "parent_memory_growth": round(last / first, 3),
        "equal_to_undisturbed": all(
            calm[name]["metric"]["values"] == [arms[name]["metric"]["values"][seed] for seed in few] for name in arms
        ),
        "table_is_the_runs": all(again["arms"][name]["metric"] == arms[name]["metric"] for name in arms)
        and again["differences"] == made.data["differences"],
    }
    held = (checks["every_run_is_there"] and not left and checks["parent_memory_growth"] < _GROWTH
            and checks["equal_to_undisturbed"] and checks["table_is_the_runs"])  # fmt: skip
    return {**checks, "held": held}


if __name__ == "__main__":
    main()
