"""One step of on_gpu.py, in its own process: `python -m gpu.step NAME --out FILE --work DIR` in benchmarks/.

Each cell of the step is written to the file as it ends. A cell that runs out of memory or fails is a result.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks import each other by their names

ROOT = Path(__file__).parents[2]


class Result:
    """A step's file, which is written again after each cell."""

    def __init__(self, step: Any, file: Path, work: Path, device: str, tiny: bool):
        self.step, self.file, self.work, self.device, self.tiny = step, file, work, device, tiny
        self.data: dict[str, Any] = {"step": step.name, "about": step.about, "status": "running", "cells": []}
        earlier = json.loads(file.read_text(encoding="utf-8"))["cells"] if file.is_file() else []
        self.earlier = {cell["cell"]: cell for cell in earlier if cell["status"] == "ok"}

    def write(self) -> None:
        from peft_recipes.runs.files import write_json

        write_json(self.file, self.data)

    def cell(self, name: str, measure: Callable[[], dict[str, Any]], **about: Any) -> dict[str, Any]:
        """Measure one cell and write it: its figures, or why it has none. One of an interrupted call is kept."""
        import torch

        if (kept := self.earlier.get(name)) is not None:
            self.data["cells"].append(kept)
            self.write()
            return kept
        start, made = time.perf_counter(), {"cell": name, **about}
        if self.device == "cuda":
            made["allocated_before"] = torch.cuda.memory_allocated()  # what an earlier cell has left behind
        try:
            made |= {"status": "ok", **measure()}
        except Exception as error:
            made |= self.failure(error)
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.data["cells"].append({**made, "wall_seconds": round(time.perf_counter() - start, 2)})
        self.write()
        return made

    def failure(self, error: BaseException) -> dict[str, Any]:
        """Status and message of an error, with the line of ours that it came from and without this machine's paths."""
        from peft_recipes.errors import says_out_of_memory

        text = f"{type(error).__name__}: {error}".strip()
        status = "out-of-memory" if isinstance(error, MemoryError) or says_out_of_memory(text) else "failed"
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(ROOT))]
        where = f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else None
        return {"status": status, "error": self.without_paths(text)[:2_000], "where": where}

    def without_paths(self, text: str) -> str:
        for path, name in ((self.work, "WORK"), (ROOT, "."), (self.file.parent, "OUT"), (Path.home(), "~")):
            text = text.replace(str(path), name)
        return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    _end_with_parent()
    from gpu.steps import steps_of
    from peft_recipes.distributed.quiet import quiet_libraries

    quiet_libraries()
    step = next(step for step in steps_of(given.tiny) if step.name == given.name)
    result, start = Result(step, given.out, given.work, given.device, given.tiny), time.perf_counter()
    try:
        module, _, kind = step.kind.rpartition(".")
        getattr(importlib.import_module(f"gpu.{module or 'measures'}"), kind)(result, **step.options)
        result.data["status"] = "ok"
    except Exception as error:
        traceback.print_exc()
        result.data |= result.failure(error)
    result.data["seconds"] = round(time.perf_counter() - start, 2)
    result.write()


def _end_with_parent() -> None:
    """Let Linux end this process with the one that started it: a killed on_gpu.py leaves no step on the GPU."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    main()
