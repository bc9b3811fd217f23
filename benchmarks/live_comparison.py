"""How soon a comparison of twelve arms shows something: arms that take turns (`--chunks 8`), and one after another.

    python benchmarks/live_comparison.py

mnist-shift on its embedded data, twelve arms, three seeds. Of both ways: the seconds until every arm has a validation
score, until comparison.json first has a row for each arm, until the three arms that end on top by validation are on top
in their order and stay there, and to the end; and whether the figures are equal. Then what a turn costs beyond its
steps, in a process that is kept and in a fresh one. About ten minutes on two CPU cores; --tiny runs the same on a tiny
model in seconds.

There are no figures of RapidFire AI, which takes turns as well: rapidfireai 0.16.2 needs Python 3.12, datasets 3.6.0
and huggingface-hub below 1.0, so it does not install next to the libraries here (transformers 5).
Prints the result as JSON; --keep writes benchmarks/live_comparison.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness import result_parser, write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))  # the tests' small models and texts

CHUNKS = 8
SEEDS = [0, 1, 2]
TOP = 3
FRESH_ARMS, FRESH_CHUNKS = 2, 4  # that take turns in fresh processes, to see what a turn costs there
IMPORTS = "from peft_recipes.comparison.fork_server import import_libraries; import_libraries()"


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, three arms, one seed: a test of the script")
    given = parser.parse_args()
    from peft_recipes import train
    from peft_recipes.distributed.quiet import quiet_libraries
    from peft_recipes.runs.folder import BASE

    quiet_libraries()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="live-") as folder:
        root = Path(folder)
        recipe, seeds, chunks = (_tiny(root), SEEDS[:1], 2) if given.tiny else (_recipe(), SEEDS, CHUNKS)
        train(recipe, BASE, output=root / "before")  # pretrains the base, which both ways would wait for
        turns = compared(recipe, seeds, chunks, root / "turns")
        sequence = compared(recipe, seeds, 1, root / "sequence")
        fresh = compared(_few(recipe), seeds[:1], min(chunks, FRESH_CHUNKS), root / "fresh", warm=False)
        environment = _environment(root / "turns" / recipe.name)
    result = {
        "recipe": recipe.name,
        "arms": list(recipe.arms),
        "seeds": seeds,
        "chunks": chunks,
        "equal_figures": turns.final == sequence.final,
        "top": turns.top(),
        "in_turns": turns.figures(),
        "one_after_another": sequence.figures(),
        "turn": {"kept_process": turns.turn_costs(), "fresh_process": fresh.turn_costs()},
        "import_seconds": _import_seconds(1 if given.tiny else 3),
        "load_before": round(load, 2),
        "cpus": os.cpu_count(),
        "environment": environment,
    }
    summary = {key: result[key] for key in ("equal_figures", "top", "in_turns", "one_after_another", "turn")}
    write_result(given, Path(__file__).with_suffix(".json"), result, summary)


@dataclass
class Compared:
    """One comparison: what was known when, in seconds since its call.

    points: (seconds, arm, seed, validation) of each pause and end. turns: (seconds, training seconds) of each turn that
    ended at a pause and was not the first of its process. phases: seconds of each arm's phases, over all its turns.
    """

    higher_is_better: bool
    final: dict[str, float] = field(default_factory=dict)
    points: list[tuple[float, str, int, float]] = field(default_factory=list)
    turns: list[tuple[float, float]] = field(default_factory=list)
    phases: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    table: float | None = None
    end: float = 0.0

    def top(self) -> list[str]:
        return self._first(self.final)

    def figures(self) -> dict[str, Any]:
        return {
            "every_arm_validated_seconds": _rounded(self._when(lambda known: len(known) == len(self.final))),
            "first_table_seconds": _rounded(self.table),
            "right_top_seconds": _rounded(self._when(lambda known: self._first(known) == self.top())),
            "right_set_seconds": _rounded(self._when(lambda known: set(self._first(known)) == set(self.top()))),
            "total_seconds": _rounded(self.end),
            "turns": len(self.points),
        }

    def turn_costs(self) -> dict[str, Any]:
        """Medians over turns: seconds of one, and of it those beyond its steps; the means of its phases."""
        beyond = [seconds - training for seconds, training in self.turns]
        names = sorted({name for _, phases in self.phases for name in phases} - {"total"})
        count = sum(turns for turns, _ in self.phases)
        return {
            "turns": len(self.turns),
            "median_seconds": _rounded(statistics.median(seconds for seconds, _ in self.turns)),
            "median_seconds_beyond_steps": _rounded(statistics.median(beyond)),
            "mean_seconds_of_phases": {
                name: _rounded(sum(phases.get(name, 0.0) for _, phases in self.phases) / count) for name in names
            },
        }

    def _first(self, values: Mapping[str, float]) -> list[str]:
        sign = -1 if self.higher_is_better else 1
        return sorted(values, key=lambda arm: (sign * values[arm], arm))[:TOP]

    def _when(self, holds: Callable[[dict[str, float]], bool]) -> float | None:
        """The time from which on a statement about the validation means holds until the end."""
        latest: dict[str, dict[int, float]] = {}
        since: float | None = None
        for seconds, arm, seed, value in self.points:
            latest.setdefault(arm, {})[seed] = value
            known = {name: statistics.fmean(values.values()) for name, values in latest.items()}
            since = (seconds if since is None else since) if holds(known) else None
        return since


def compared(recipe: Any, seeds: Sequence[int], chunks: int, output: Path, warm: bool = True) -> Compared:
    """Compare, and take down when each validation score was there. warm: False: a fresh process for each turn."""
    from peft_recipes import compare
    from peft_recipes.comparison import pool
    from peft_recipes.runs.folder import BASE, read_run, run_folder
    from peft_recipes.runs.progress import read_progress

    found, metric = Compared(recipe.higher_is_better), recipe.selection_metric
    began, last, spent = time.perf_counter(), None, dict[Any, float]()
    table = output / recipe.name / "comparison.json"

    def see(progress: Any) -> None:
        nonlocal last
        now = time.perf_counter() - began
        if found.table is None and table.is_file() and set(json.loads(table.read_text())["arms"]) == set(recipe.arms):
            found.table = now
        if progress.state not in ("paused", "ok") or progress.job[0] == BASE:
            return
        folder = run_folder(output, recipe, *progress.job)
        if progress.state == "ok":
            found.points.append((now, *progress.job, read_run(folder).data["metrics"]["validation"][metric]))
        elif (paused := read_progress(folder)) is not None:
            found.points.append((now, *progress.job, paused["validation"][-1][metric]))
            if last is not None:
                found.turns.append((now - last, paused["seconds"] - spent.get(progress.job, 0.0)))
            spent[progress.job] = paused["seconds"]
            phases[progress.job] = (len(paused["validation"]), paused["phases"])
        last = now

    phases: dict[Any, tuple[int, dict[str, float]]] = {}
    takes_turns = pool.takes_turns
    if not warm:
        pool.takes_turns = lambda order: False
    try:
        made = compare(recipe, list(recipe.arms), seeds, output=output, chunks=chunks, on_progress=see)
    finally:
        pool.takes_turns = takes_turns
    found.end = time.perf_counter() - began
    found.table = found.end if found.table is None else found.table
    if made.failed:
        raise SystemExit(f"Failed: {', '.join(made.failed)}.")
    found.final = {arm: entry["metrics"]["validation"][metric] for arm, entry in made.data["arms"].items()}
    found.phases = list(phases.values())
    return found


def _recipe() -> Any:
    """mnist-shift with twelve arms: its own seven, and five more methods and learning rates."""
    from peft import LoraConfig

    from peft_recipes import Arm, load_recipe, targets

    recipe = load_recipe("mnist-shift", embedded=True)
    linear = targets("small-cnn", "all-linear")

    def lora(**options: Any) -> LoraConfig:
        return LoraConfig(r=8, lora_alpha=16, target_modules=list(linear), **options)

    more = {
        "full-1e-3": Arm(learning_rate=1e-3),
        "full-1e-2": Arm(learning_rate=1e-2),
        "lora-3e-3": Arm(lora(), learning_rate=3e-3),
        "dora": Arm(lora(use_dora=True), learning_rate=1e-2),
        "pissa": Arm(lora(init_lora_weights="pissa"), learning_rate=3e-3),
    }
    return replace(recipe, arms={**recipe.arms, **more})


def _few(recipe: Any) -> Any:
    """The recipe with two of its arms that pause."""
    names = [name for name, arm in recipe.arms.items() if arm.method != "head"][:FRESH_ARMS]
    return replace(recipe, arms={name: recipe.arms[name] for name in names})


def _tiny(folder: Path) -> Any:
    import transformers
    from peft import LoraConfig
    from small import sentences, tiny_config, tokenizer

    from peft_recipes import Arm, Dataset, Recipe, targets

    words = tokenizer()
    transformers.set_seed(0)
    transformers.AutoModel.from_config(tiny_config("distilbert", len(words))).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    rows = [{"text": text, "label": label} for text, label in sentences(160)]
    (folder / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets("distilbert", "all-linear"))
    return Recipe(
        name="tiny", task="text-classification", model=str(folder / "model"),
        dataset=Dataset(str(folder / "reviews.jsonl"), train=96, validation=24, test=40), max_length=16,
        training={"num_train_epochs": 2, "per_device_train_batch_size": 16, "use_cpu": True, "bf16": False},
        arms={"full": Arm(learning_rate=5e-3), "head": Arm("head", learning_rate=1e-2),
              "lora": Arm(lora, learning_rate=2e-2)},
        skip_checks=["reload", "merge", "fresh-process"],
    )  # fmt: skip


def _import_seconds(times: int) -> float:
    """Seconds that a process takes to import what a run needs; the median."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True)
        taken.append(time.perf_counter() - start)
    return round(statistics.median(taken), 2)


def _environment(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "comparison.json").read_text())["environment"]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


if __name__ == "__main__":
    main()
