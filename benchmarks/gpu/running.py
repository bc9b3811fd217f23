"""Run the steps of on_gpu.py one after another, each in a fresh process with a time limit, and keep what each wrote.

A step's own file is `steps/NAME.json`; `on_gpu.json` holds all of them and is written again after each step, so that it
alone is enough to go on from.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu.steps import Step
from peft_recipes.comparison import forking
from peft_recipes.runs.files import write_json

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
ALL = "on_gpu.json"
_LEAST_SECONDS, _SLACK = 120.0, 2.0  # a step may take this often its estimate
_POLL = 0.05


class Running:
    """device: "cuda" or "cpu". minutes: for all steps together. work: a folder for models and data."""

    def __init__(self, out: Path, work: Path, device: str, tiny: bool, minutes: float, say: Callable[[str], None]):
        self.out, self.work, self.device, self.tiny, self.say = out, work, device, tiny, say
        self.end = time.monotonic() + 60 * minutes
        self.results = read_results(out)
        self.left_out: list[str] = []

    def run(self, steps: list[Step], again: Callable[[str], bool]) -> None:
        """Run the steps that have no result yet, and those that `again` names, as long as time is left."""
        for step in steps:
            done = self.results.get(step.name)
            if done is not None and done["status"] != "interrupted" and not again(step.name):
                self.say(f"{step.name}: kept ({done['status']})")
                continue
            left = self.end - time.monotonic()
            if 60 * step.minutes > left:
                self.left_out.append(step.name)
                self.say(
                    f"{step.name}: left out, {step.minutes:.1f} min are estimated and {max(left, 0) / 60:.1f} left"
                )
                continue
            file = self.out / "steps" / f"{step.name}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            if done is not None and done["status"] == "interrupted" and not again(step.name):
                write_json(file, done)  # its cells are kept
            elif not _unfinished(file) or again(step.name):
                file.unlink(missing_ok=True)
            self._step(step, file, max(_SLACK * 60 * step.minutes, _LEAST_SECONDS), left)

    def _step(self, step: Step, file: Path, limit: float, left: float) -> None:
        log, start = file.with_suffix(".log"), time.perf_counter()
        log.unlink(missing_ok=True)
        words = [step.name, "--out", str(file), "--work", str(self.work), "--device", self.device]
        process = self._start([*words, *(["--tiny"] if self.tiny else [])], log, step.quantised)
        ended = "ended"
        try:
            until = time.monotonic() + min(limit, left)
            while process.poll() is None:
                if time.monotonic() > until:
                    # Without time left it is no fault of the step: the next call goes on with it.
                    ended = "interrupted" if left < limit else f"the time limit of {limit:.0f} s"
                    break
                time.sleep(_POLL)
        except BaseException:
            ended = "interrupted"
            raise
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # its children too: each step leads a group of its own
                process.wait()
            self._keep(step, file, log, process.returncode, ended, time.perf_counter() - start)

    def _start(self, words: list[str], log: Path, quantised: bool) -> Any:
        """Start a step's process: forked from one with the libraries where no GPU is, else anew."""
        module = "gpu.step"  # from benchmarks/: other packages install a folder `benchmarks` of their own
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                       "PYTHONUNBUFFERED": "1"}  # fmt: skip
        if self.device == "cpu" and not quantised and forking.can_fork():
            before = Path.cwd()
            os.chdir(BENCHMARKS)  # a forked process starts where this one is
            try:
                return forking.prepare().start(module, words, log, environment)
            finally:
                os.chdir(before)
        with log.open("w") as stream:
            streams = {"stdout": stream, "stderr": stream, "stdin": subprocess.DEVNULL}
            command = [sys.executable, "-m", module, *words]
            return subprocess.Popen(command, cwd=BENCHMARKS, env=environment, start_new_session=True, **streams)

    def _keep(self, step: Step, file: Path, log: Path, code: int | None, ended: str, seconds: float) -> None:
        """Complete a step's result by how its process ended, and write all results."""
        made = json.loads(file.read_text()) if file.is_file() else {"step": step.name, "about": step.about, "cells": []}
        if made.get("status", "running") == "running":
            end = f"the process ended with code {code}" if ended == "ended" else ended
            made |= {"status": "interrupted" if ended == "interrupted" else "failed",
                     "error": f"{end}; {last_lines(log, [self.work, self.out, ROOT])}"}  # fmt: skip
        made |= {"estimated_minutes": round(step.minutes, 2), "wall_seconds": round(seconds, 1)}
        write_json(file, made)
        self.results[step.name] = made
        write_json(self.out / ALL, {"device": self.device, "tiny": self.tiny, "steps": self.results})
        self.say(f"{step.name}: {made['status']} in {seconds:.0f} s{cells_line(made)}")


def read_results(out: Path) -> dict[str, Any]:
    """The results of earlier calls, by step: on_gpu.json, and the files of steps."""
    found: dict[str, Any] = {}
    if (out / ALL).is_file():
        found = json.loads((out / ALL).read_text(encoding="utf-8"))["steps"]
    for file in sorted((out / "steps").glob("*.json")):
        made = json.loads(file.read_text(encoding="utf-8"))
        if made.get("status") != "running":
            found.setdefault(made["step"], made)
    return found


def _unfinished(file: Path) -> bool:
    """Whether a step's file is of a call that was killed."""
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["status"] in ("running", "interrupted")


def cells_line(made: dict[str, Any]) -> str:
    """Each cell in a few words."""
    words = []
    for cell in made["cells"]:
        value = cell["status"]
        if cell["status"] == "ok" and "tokens_per_second" in cell:
            value = f"{cell['tokens_per_second']:,.0f} tokens/s"
            if "peak_memory_bytes" in cell:
                value += f", {cell['peak_memory_bytes'] / 1e9:.2f} GB"
        elif "waits_a_step" in cell:
            value = f"{cell['waits_a_step']:g} waits a step"
        elif "ratio" in cell:
            value = f"plan {cell['ratio']:.2f} of measured"
        elif "flops_per_second" in cell:
            value = f"{cell['flops_per_second'] / 1e12:.2f} TFLOP/s"
        words.append(f"\n    {cell['cell']}: {value}")
    error = f"\n    {made['error'][:300]}" if made.get("error") else ""
    return "".join(words) + error


def last_lines(log: Path, hidden: list[Path]) -> str:
    """The end of a step's log, without this machine's paths."""
    text = " | ".join(log.read_text(errors="replace").strip().splitlines()[-5:]) if log.is_file() else ""
    for path in hidden:
        text = text.replace(str(path), "...")
    return text[-1_000:]
