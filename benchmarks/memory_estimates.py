"""How near the plan's memory comes to what runs then take: both stand in each comparison.

    python benchmarks/memory_estimates.py adapters/mnist-shift runs/smollm2-alpaca ...

Prints one line an arm and writes benchmarks/memory_estimates.json; a comparison that is in it already is replaced.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from peft_recipes.comparison import read_comparison

KEPT = Path(__file__).with_suffix(".json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", nargs="+", metavar="DIR")
    rows = json.loads(KEPT.read_text()) if KEPT.exists() else []
    for folder in parser.parse_args().comparisons:
        data = read_comparison(folder).data
        rows = [row for row in rows if (row["recipe"], row["model"]) != (data["recipe"], data["model"])]
        rows += [found for name in data["arms"] if (found := _row(data, name))]
    for row in rows:
        print(f"{row['recipe']:16} {row['arm']:10} estimated {row['estimated'] / 1e9:5.2f} GB  "
              f"measured {row['measured'] / 1e9:5.2f} GB  {row['ratio']:.2f}  ({row['model']})")  # fmt: skip
    KEPT.write_text(json.dumps(rows, indent=1) + "\n")
    worst = max((abs(row["ratio"] - 1) for row in rows), default=0)
    print(json.dumps({"arms": len(rows), "largest_error": worst}))


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
