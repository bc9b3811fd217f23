"""The steps of on_gpu.py, ordered by worth: what each measures, and for how many minutes on one H100 it is planned."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu.workspace import SHAPES

ROOT = Path(__file__).parents[2]
STEPS = 8  # of each cell, the first 3 of which are warm-up
PACKED = 2_048  # the length of a packed row
TOOLS = ("peft-recipes", "trl-default", "trl-best", "trl-packed")
WATCHED = ("sft", "sft padded", "dpo", "kto", "reward", "text-classification")  # whose waits are counted
LORA_WAYS = ("peft", "one operation", "torch.compile")
# Installed or not, they are named in the result.
OTHER_TOOLS = {"unsloth": "unsloth", "llama-factory": "llamafactory"}
ARMS_PLANNED = (
    "full", "lora", "rslora", "dora", "loraplus", "ia3", "vera", "oft", "loha", "lokr", "adalora", "miss",
    "ln-tuning", "qlora", "lora-int8",
)  # fmt: skip

# What a cell costs beside its steps, and the rates by which their time is estimated: guesses. `--list --out DIR`
# shows next to them what the steps took.
_START, _CELL, _COMPILE = 15.0, 4.0, 30.0  # seconds: a process, a cell, our first packed batch
_RATES = {"peft-recipes": 200e12, "trl-best": 150e12, "trl-packed": 150e12, "trl-default": 80e12}  # FLOP/s
_PARAMETERS = {"smollm2-135m": 135e6, "qwen3-0.6b": 596e6, "llama3-8b": 8.0e9, "tiny": 3e5}


@dataclass(frozen=True)
class Step:
    """name: also its file's. kind: a function of gpu.measures, or "MODULE.FUNCTION" of gpu. minutes: estimated, on a
    GPU. quantised: it needs bitsandbytes, which a forked process lacks.
    """

    name: str
    kind: str
    about: str
    minutes: float
    options: dict[str, Any] = field(default_factory=dict)
    quantised: bool = False


def steps_of(tiny: bool = False) -> list[Step]:
    """All steps in their order. tiny: the same kinds on a tiny model, a cell or two each, for the CPU."""
    if tiny:
        return _tiny()
    small, middle, large = "smollm2-135m", "qwen3-0.6b", "llama3-8b"
    both = [("alpaca", 8), ("alpaca", 32), (str(PACKED), 8), (str(PACKED), 32)]
    made = [
        Step("device", "device", "bf16 and fp32 GEMM rate, copy bandwidth", 0.4),
        *_suites(2.0),
    ]
    made += [_sft(small, "lora", tool, both) for tool in TOOLS]
    made += [_sft(middle, "lora", tool, both) for tool in TOOLS]
    made += [_other(tool, shape, both[:1]) for tool in OTHER_TOOLS for shape in (small, middle)]
    made += [_dpo(small, tool, [("alpaca", 8), ("alpaca", 32)]) for tool in TOOLS[:3]]
    made += [_waiting(small, 0.8), _loading(small, 32), _lora(small, both[::2], LORA_WAYS), _sharing(small)]
    made += [_plan(small, 8), _generation(small, [1, 32], 64), _memory(middle), _launch(small)]
    made += [_sft(shape, arm, tool, both) for shape in (small, middle) for arm in ("full", "qlora")
             for tool in TOOLS[:3]]  # fmt: skip
    made += [_sft(large, "lora", tool, [(str(PACKED), 4)]) for tool in TOOLS[:3]]
    made += [_generation(middle, [1, 32], 64)]
    made += [_dpo(middle, tool, [("alpaca", 8)]) for tool in TOOLS[:3]]
    return made


def _suites(minutes: float) -> list[Step]:
    """A step for each file with tests that need a GPU: by the mark, or by a module's own condition (conftest.py)."""
    made, marks = [], ("pytest.mark.gpu", "needs a CUDA GPU")
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        if any(mark in file.read_text(encoding="utf-8") for mark in marks):
            path = file.relative_to(ROOT).as_posix()
            name = "tests-" + "-".join(file.relative_to(ROOT / "tests").with_suffix("").parts).replace("_", "-")
            made.append(Step(name, "suite", f"the GPU tests of {path}", minutes, {"file": path}))
    return made


def _tiny() -> list[Step]:
    cells = [("alpaca", 4), ("64", 4)]
    return [
        Step("device", "device", "GEMM rates, copy bandwidth", 0.1, {"size": 128}),
        *_suites(0.2),
        *[_sft("tiny", "lora", tool, cells) for tool in TOOLS],
        *[_other(tool, "tiny", cells[:1]) for tool in OTHER_TOOLS],
        _sft("tiny", "full", "peft-recipes", cells[:1]),
        *[_dpo("tiny", tool, cells[:1]) for tool in TOOLS[:3]],
        _waiting("tiny", 0.1, ("sft", "sft padded", "dpo")),
        _loading("tiny", 4),
        _lora("tiny", cells[:1], ("peft", "one operation")),
        _plan("tiny", 4, ("full", "qlora")),
        _generation("tiny", [1, 4], 4),
        _memory("tiny"),
        _launch("tiny"),
    ]


def _minutes(shape: str, arm: str, tool: str, cells: list[tuple[str, int]], sequences: int = 1) -> float:
    """Minutes of a process that measures these cells, from its matrix products at an assumed rate."""
    operations = (6 if arm == "full" else 4) * _PARAMETERS[shape] * sequences
    tokens = sum(batch * (104 if rows == "alpaca" else int(rows)) for rows, batch in cells)
    steps = STEPS * operations * tokens / _RATES[tool]
    load = 1e-8 * _PARAMETERS[shape] * len(cells)
    return (_START + _CELL * len(cells) + load + steps + (_COMPILE if tool == "peft-recipes" else 0)) / 60


def _sft(shape: str, arm: str, tool: str, cells: list[tuple[str, int]]) -> Step:
    options = {"shape": shape, "arm": arm, "tool": tool, "cells": cells}
    about = f"SFT, {arm}: {', '.join(f'{rows} x {batch}' for rows, batch in cells)}"
    return Step(f"sft-{shape}-{arm}-{tool}", "sft", about, _minutes(shape, arm, tool, cells), options, arm == "qlora")


def _other(tool: str, shape: str, cells: list[tuple[str, int]]) -> Step:
    options = {"shape": shape, "arm": "lora", "tool": tool, "cells": cells}
    return Step(f"sft-{shape}-lora-{tool}", "other_tool", f"SFT, lora, by {tool} where it is installed", 0.7, options)


def _dpo(shape: str, tool: str, cells: list[tuple[str, int]]) -> Step:
    options = {"shape": shape, "tool": tool, "cells": cells}
    about = f"DPO, lora: {', '.join(f'{rows} x {batch}' for rows, batch in cells)}"
    return Step(f"dpo-{shape}-{tool}", "dpo", about, _minutes(shape, "lora", tool, cells, 3), options)


def _waiting(shape: str, minutes: float, tasks: tuple[str, ...] = WATCHED) -> Step:
    about = "how often the host waits for the GPU in a step of each task, and where"
    return Step(f"waiting-{shape}", "step_parts.waiting", about, minutes, {"shape": shape, "tasks": tasks})


def _loading(shape: str, batch: int) -> Step:
    options = {"shape": shape, "rows": "alpaca", "batch": batch}
    about = "SFT, lora: batches collated in workers and in the training process"
    return Step(f"loading-{shape}", "step_parts.loading", about, 1.2, options)


def _lora(shape: str, cells: list[tuple[str, int]], ways: tuple[str, ...]) -> Step:
    about = f"SFT, lora, its layers by {', '.join(ways)}"
    minutes = 0.5 * len(ways) * len(cells)
    return Step(f"lora-{shape}", "step_parts.lora", about, minutes, {"shape": shape, "cells": cells, "ways": ways})


def _sharing(shape: str) -> Step:
    about = "a comparison's runs on this GPU one after another and two at a time"
    return Step(f"sharing-{shape}", "step_parts.sharing", about, 2.5, {"shape": shape, "jobs": (1, 2)})


def _plan(shape: str, batch: int, arms: tuple[str, ...] = ARMS_PLANNED) -> Step:
    about = f"the plan's memory and the measured peak of {len(arms)} arms"
    return Step(f"plan-{shape}", "plan", about, 2.5, {"shape": shape, "arms": arms, "batch": batch}, True)


def _generation(shape: str, batches: list[int], tokens: int) -> Step:
    options = {"shape": shape, "batches": batches, "tokens": tokens}
    return Step(f"generation-{shape}", "generation", f"generation at batch {batches[0]} and {batches[1]}", 1.0, options)


def _memory(shape: str) -> Step:
    about = "a comparison with an arm that runs out of memory"
    return Step("out-of-memory", "out_of_memory", about, 1.5, {"shape": shape})


def _launch(shape: str) -> Step:
    about = "accelerate launch, one process (NCCL on a GPU)"
    return Step("launch", "launch", about, 0.8, {"shape": shape})


assert set(_PARAMETERS) == set(SHAPES)
