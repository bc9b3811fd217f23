"""How near the plan's memory comes to what runs then take: both stand in each comparison.

    python benchmarks/memory_estimates.py adapters/mnist-shift runs/smollm2-alpaca ...
    python benchmarks/memory_estimates.py --replan       # today's plan against what the kept runs took

Prints one line an arm and writes benchmarks/memory_estimates.json; a comparison that is in it already is replaced.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from peft_recipes.comparison.comparison import read_comparison

KEPT = Path(__file__).with_suffix(".json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", nargs="*", metavar="DIR")
    parser.add_argument("--replan", action="store_true", help="plan the kept rows' recipes (embedded) anew")
    given = parser.parse_args()
    rows = json.loads(KEPT.read_text()) if KEPT.exists() else []
    if given.replan:
        rows = _replanned(rows)
    for folder in given.comparisons:
        data = read_comparison(folder).data
        rows = [row for row in rows if (row["recipe"], row["model"]) != (data["recipe"], data["model"])]
        rows += [found for name in data["arms"] if (found := _row(data, name))]
    for row in rows:
        print(f"{row['recipe']:16} {row['arm']:10} estimated {row['estimated'] / 1e9:5.2f} GB  "
              f"measured {row['measured'] / 1e9:5.2f} GB  {row['ratio']:.2f}  ({row['model']})")  # fmt: skip
    KEPT.write_text(json.dumps(rows, indent=1) + "\n")
    worst = max((abs(row["ratio"] - 1) for row in rows), default=0)
    print(json.dumps({"arms": len(rows), "largest_error": worst}))


def _replanned(rows: list[dict]) -> list[dict]:
    """The rows with what the plan says today; each recipe is planned in a process of its own, as a run is."""
    made = {}
    for name in dict.fromkeys(row["recipe"] for row in rows):
        arms = ",".join(row["arm"] for row in rows if row["recipe"] == name)
        words = ["-m", "peft_recipes", "plan", name, "--embedded", "--arms", arms, "--json"]
        told = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True).stdout
        made[name] = {arm: found["memory"] for arm, found in json.loads(told)["arms"].items()}
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
