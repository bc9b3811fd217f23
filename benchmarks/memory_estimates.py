"""Accuracy of the plan's memory estimates, compared with the peak memory of the runs of comparisons.

    python benchmarks/memory_estimates.py adapters/mnist-shift runs/smollm2-alpaca ...
    python benchmarks/memory_estimates.py --replan       # today's plan compared with the kept measurements

Prints one line per arm and the kept rows as JSON, a comparison that is among them already replaced; --keep writes them
to benchmarks/memory_estimates.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from harness import result_parser, write_result

from peft_recipes.comparison.comparison import read_comparison

KEPT = Path(__file__).with_suffix(".json")


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("comparisons", nargs="*", metavar="DIR")
    parser.add_argument("--replan", action="store_true", help="plan the recipes of the kept rows (embedded) again")
    given = parser.parse_args()
    rows = json.loads(KEPT.read_text()) if KEPT.exists() else []
    if given.replan:
        rows = _replanned(rows)
    for folder in given.comparisons:
        data = read_comparison(folder).data
        rows = [row for row in rows if (row["recipe"], row["model"]) != (data["recipe"], data["model"])]
        rows += [new for name in data["arms"] if (new := _row(data, name))]
    for row in rows:
        print(f"{row['recipe']:16} {row['arm']:10} estimated {row['estimated'] / 1e9:5.2f} GB  "
              f"measured {row['measured'] / 1e9:5.2f} GB  {row['ratio']:.2f}  ({row['model']})")  # fmt: skip
    worst = max((abs(row["ratio"] - 1) for row in rows), default=0)
    write_result(given, KEPT, rows, {"arms": len(rows), "largest_error": worst})


def _replanned(rows: list[dict]) -> list[dict]:
    """The rows with today's estimates; each recipe is planned in a fresh process, as for a run."""
    made = {}
    for name in dict.fromkeys(row["recipe"] for row in rows):
        arms = ",".join(row["arm"] for row in rows if row["recipe"] == name)
        words = ["-m", "peft_recipes", "plan", name, "--embedded", "--arms", arms, "--json"]
        output = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True).stdout
        made[name] = {arm: row["memory"] for arm, row in json.loads(output)["arms"].items()}
    return [
        {**row, "parts": (parts := made[row["recipe"]][row["arm"]]), "estimated": parts["total"],
         "ratio": parts["total"] / row["measured"]}
        for row in rows
    ]  # fmt: skip


def _row(data: dict, name: str) -> dict | None:
    arm = data["arms"][name]
    estimate, measured = arm.get("estimated_memory"), arm.get("peak_memory_bytes")
    if not estimate or not measured:
        return None
    environment = data["environment"]
    return {
        "recipe": data["recipe"], "arm": name, "model": data["model"], "dataset": data["dataset"],
        "estimated": estimate["total"], "measured": measured, "ratio": estimate["total"] / measured,
        "parts": estimate, "device": environment["device"], "threads": environment["threads"],
        "versions": environment["versions"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
