"""The simulation of `compare --drop` runs from its curves to its table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "drop_calibration.py"


def test_a_tiny_simulation_has_a_row_of_each_kind(tmp_path):
    command = [sys.executable, str(SCRIPT), "--tiny", "--output", str(tmp_path / "made.json")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    made = json.loads((tmp_path / "made.json").read_text())
    assert {row["kind"] for row in made["rows"]} == {"power", "crossing", "late", "declining", "kept"}
    assert made["comparisons"] == 5 and all(
        0 <= row["saved"] < 1 and row["best"] <= row["false"] for row in made["rows"]
    )
