"""Which runs were timed under the same conditions: one environment, and nothing else at work on the machine.

Quality may be compared across machines. Time, memory and latency are compared only among runs of one environment.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from peft_recipes.runs.folder import Run

# Of the recorded packages, those that compute; a new `datasets` or `evaluate` changes no step.
COMPUTING = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
SHARED = "runs at a time shared th"  # "the device" in measuring/disturbance.py, "this machine" in runs/facts.py
HOW_TO_REPEAT = "take times and memory again with `--measure`, or train again with `--overwrite`"

# How to say each condition in a sentence, and its value in an older run.json that does not hold it.
_CONDITIONS: dict[str, tuple[str, Any]] = {
    "device": ("on the device {}", None),
    "device_name": ("on {}", None),
    "threads": ("with {} CPU thread(s)", None),
    "precision": ("in {}", None),
    "processes": ("by {} process(es)", 1),
    "machines": ("on {} machine(s)", 1),
    "distributed": ("under {}", None),
    "jobs": ("with {} run(s) at a time", 1),
    "shared_base": ("with {} runs on one base", None),
    "warm": ("in a process {}", False),  # of its own, or one that trained others in turns
}


def timed(data: Mapping[str, Any]) -> dict[str, Any]:
    """The content of run.json with the figures of `--measure`, where there are any, in place of training's own."""
    again = data.get("measured")
    if not again:
        return dict(data)
    return {**data, **again, "training": {**data["training"], **again["training"]}}


def conditions(data: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions that time, memory and latency of a run depend on, from its run.json."""
    environment = data.get("environment") or {}
    found = {name: environment.get(name, default) for name, (_, default) in _CONDITIONS.items()}
    versions = environment.get("versions") or {}
    return found | {name: versions[name] for name in COMPUTING if name in versions}


def why_not_comparable(name: str, data: Mapping[str, Any], other: str, other_data: Mapping[str, Any]) -> str | None:
    """The first difference between the conditions of two runs in plain words; None where there is none.

    A package that only one of them records was not there for the other, so it computed nothing in it.
    """
    ours, theirs = conditions(data), conditions(other_data)
    for key in ours:
        if key in theirs and ours[key] != theirs[key]:
            said = _said(key, ours[key])
            return f"'{name}' was measured {said}, '{other}' {_said(key, theirs[key])}"
    return None


def disturbed(data: Mapping[str, Any]) -> str | None:
    """Why a run's times are not its own; None for a quiet run, and for an older one, of which nothing is known."""
    found = (data.get("training") or {}).get("disturbance") or {}
    return found.get("why") if found.get("verdict") == "disturbed" else None


def timing(runs: Mapping[str, Sequence[Run]], reference: str) -> dict[str, dict[str, Any]]:
    """Choose, for each arm, the runs whose times count, and decide whether they can be compared with the others'.

    runs: the finished runs of each arm, as `timed` returns them. One environment is chosen for all arms: the
    commonest, among those of the reference if it has a run. An arm's times are medians over its runs in it, the quiet
    ones if there are any. Returns for each arm: seeds (that count), same_environment (memory can be compared),
    comparable (times as well), why (not), and memory (False where a run's peak is not its own).
    """
    keys = {(arm, run.data["seed"]): _key(run.data) for arm, each in runs.items() for run in each}
    alone = {_key(run.data) for each in runs.values() for run in each if not conditions(run.data)["shared_base"]}
    wanted = {key for (arm, _), key in keys.items() if arm == reference} or set(keys.values())
    wanted = wanted & alone or wanted  # times of runs that shared their steps say nothing of an arm
    counted = Counter(key for key in keys.values() if key in wanted)
    chosen = counted.most_common(1)[0][0] if counted else None
    standard = next(
        ((arm, run) for arm in sorted(runs, key=lambda name: name != reference) for run in runs[arm]
         if keys[arm, run.data["seed"]] == chosen), None
    )  # fmt: skip
    return {arm: _arm_timing(arm, each, keys, chosen, standard) for arm, each in runs.items() if each and standard}


def _arm_timing(
    arm: str, runs: Sequence[Run], keys: Mapping[Any, str], chosen: str | None, standard: tuple[str, Run]
) -> dict[str, Any]:
    own = Counter(keys[arm, run.data["seed"]] for run in runs)
    key = chosen if chosen in own else own.most_common(1)[0][0]
    same = [run for run in runs if keys[arm, run.data["seed"]] == key]
    quiet = [run for run in same if not disturbed(run.data)]
    why = why_not_comparable(arm, same[0].data, standard[0], standard[1].data)
    elsewhere = why is not None
    if why is None and not quiet:
        found = disturbed(same[0].data)
        why = f"'{arm}' was timed on a busy machine ({found})"
        if found and SHARED in found:
            why = f"'{arm}' was timed while {found}"
    return {
        "comparable": why is None,
        "same_environment": not elsewhere,
        "why": why,
        "seeds": [run.data["seed"] for run in quiet or same],
        **({"memory": False} if any(shares_memory(run.data) for run in quiet or same) else {}),
    }


def notes(timings: Mapping[str, Mapping[str, Any]], runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """The notes of a comparison about arms whose times, or times and memory, can't be compared."""
    lines = []
    elsewhere = [found["why"] for found in timings.values() if not found["same_environment"]]
    if elsewhere:
        lines.append(
            "Some runs were measured under other conditions: their quality is compared, their time, memory and latency "
            f"are shown without a ratio ({'; '.join(elsewhere)}). To compare them, {HOW_TO_REPEAT}."
        )
    busy = [found["why"] for found in timings.values() if found["same_environment"] and not found["comparable"]]
    if busy and all(SHARED in why for why in busy):
        lines.append(
            f"Times are shown without a ratio, since runs at a time shared the device: {'; '.join(busy)}. Memory is "
            "each run's own. To compare times, take them again with `--measure`, which measures one run at a time."
        )
    elif busy:
        lines.append(
            f"Times are shown without a ratio where the machine was busy: {'; '.join(busy)}. To compare them, leave "
            f"the machine alone and {HOW_TO_REPEAT}."
        )
    left_out = [
        f"'{arm}' seed {run.data['seed']}"
        for arm, found in timings.items()
        for run in runs[arm]
        if run.data["seed"] not in found["seeds"]
    ]
    if left_out:
        lines.append(
            f"Not in the medians of time, memory and latency, since they were measured under other conditions or on a "
            f"busy machine: {', '.join(left_out)}."
        )
    if any(not found.get("memory", True) for found in timings.values()):
        lines.append(
            "Peak memory is shown without a ratio: the arms took turns in one process, whose peak on a CPU is not an "
            "arm's own. `--measure` takes it in a process of each arm's own."
        )
    if any("measured" in run.data for each in runs.values() for run in each):
        lines.append(
            "Times, memory and latency were taken again by `--measure`, a few steps an arm in turns; training time is "
            "the median step times the number of steps."
        )
    return lines


def shares_memory(data: Mapping[str, Any]) -> bool:
    """Whether a run's peak memory includes what its process kept of others; that of a GPU's allocator does not."""
    environment = data.get("environment") or {}
    return bool(environment.get("warm")) and environment.get("device") == "cpu"


def _key(data: Mapping[str, Any]) -> str:
    return json.dumps(conditions(data), sort_keys=True, default=str)


def _said(key: str, value: Any) -> str:
    if key not in _CONDITIONS:
        return f"with {key} {value}"
    if value is None and key in ("distributed", "shared_base"):
        return {"distributed": "by one process", "shared_base": "with a base of its own"}[key]
    if key == "warm":
        value = "that trained other runs in turns" if value else "of its own"
    plural = "" if value == 1 else "s" if key != "processes" else "es"
    return _CONDITIONS[key][0].format(value).replace("(s)", plural).replace("(es)", plural)
