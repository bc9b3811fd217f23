"""The block `gpu` of benchmarks/README.md: tables of the kept files of benchmarks/on_gpu/, or that there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "on_gpu"
_TOOLS = {"peft-recipes": "peft_recipes", "trl-default": "trl, defaults", "trl-best": "trl, best flags",
          "trl-packed": "trl, packed", "unsloth": "Unsloth", "llama-factory": "LLaMA-Factory"}  # fmt: skip
_TITLES = {"smollm2-135m": "SmolLM2-135M", "qwen3-0.6b": "Qwen3-0.6B", "llama3-8b": "Llama-3-8B", "tiny": "tiny Llama"}
_PEAKS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}  # FLOP/s, dense bf16, by the datasheets
_NONE = """\
**No figure of a GPU exists yet.** Nothing on this page or elsewhere in the repository was measured on one. On a machine
with a CUDA GPU, torch and transformers:

```bash
python benchmarks/on_gpu.py --wheels                        # the packages it lacks
python benchmarks/on_gpu.py --list                          # what would run, in which order, for how many minutes
python benchmarks/on_gpu.py --out results --minutes 9       # as often as needed: a step with a result is not run again
python benchmarks/on_gpu.py --out results --keep            # writes benchmarks/on_gpu/DEVICE.json
make readme                                                 # writes the tables here
```

Without a GPU, `python benchmarks/on_gpu.py --out results --device cpu --tiny` runs the same steps on a tiny model, as
a test does. The tests that need a GPU are marked `gpu`, skipped without one, and counted at the end of `make test`.
"""


def block(folder: Path = FOLDER) -> str:
    """The block's text, from every file of the folder."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return "\n".join(map(device_tables, documents)) if documents else _NONE


def device_tables(document: dict[str, Any]) -> str:
    """The tables of one device."""
    environment, steps = document["environment"], {step["step"]: step for step in document["steps"]}
    versions = environment["versions"]
    rate = _rate(steps)
    peak = next((peak for name, peak in _PEAKS.items() if name in environment["device_name"]), None)
    lines = [
        f"### {environment['device_name']}",
        "",
        f"Driver {environment.get('driver')}, CUDA {environment.get('cuda')}, torch {versions.get('torch')}, "
        f"transformers {versions.get('transformers')}, trl {versions.get('trl')}; {environment['precision']}; random "
        "weights, made rows with Alpaca's lengths or of one length. Not installed there: "
        f"{', '.join(sorted(n for n, there in environment.get('installed', {}).items() if not there)) or 'nothing'}.",
    ]  # fmt: skip
    if rate:
        of_peak = f", {rate / peak:.0%} of the datasheet's {peak / 1e12:.0f}" if peak else ""
        lines.append(
            f"A bf16 matrix product runs at {rate / 1e12:.0f} TFLOP/s here{of_peak}. The share of it counts 4 FLOP a "
            "weight and token for an adapter and 6 for full, and the LM head at labelled positions alone."
        )
    lines += ["", *_training(steps, rate, peak), *_step_parts(steps), *_plan(steps), *_generation(steps),
              *_others(steps), ""]  # fmt: skip
    return "\n".join(lines)


def _rate(steps: dict[str, Any]) -> float | None:
    cells = steps.get("device", {}).get("cells", [])
    return next((cell["flops_per_second"] for cell in cells
                 if cell["cell"] == "gemm-bf16" and cell["status"] == "ok"), None)  # fmt: skip


def _training(steps: dict[str, Any], rate: float | None, peak: float | None) -> list[str]:
    """A row for each cell of SFT and DPO and each tool, its losses compared with those of trl's defaults."""
    cells: dict[tuple, dict[str, dict[str, Any]]] = {}
    for step in steps.values():
        if step.get("tool") is None:
            continue
        for cell in step["cells"]:
            key = (step["task"], step["shape"], step["arm"], cell.get("rows"), cell.get("batch"))
            if cell.get("rows") is not None:
                cells.setdefault(key, {})[step["tool"]] = cell
    lines = ["| setting | by | tokens/s | times trl's defaults | peak memory | share of the GEMM rate "
             "| losses differ by |", "|:---|:---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for (task, shape, arm, rows, batch), by_tool in cells.items():
        title = f"{task.upper()}, {_TITLES[shape]}, {arm}, {_setting({'rows': rows, 'batch': batch})}"
        default = by_tool.get("trl-default", {})
        lines += [f"| {title} | {_TOOLS[tool]} | {' | '.join(_figures(tool, cell, default, rate, peak))} |"
                  for tool, cell in by_tool.items()]  # fmt: skip
    return [*lines, ""] if cells else []


def _figures(
    tool: str, cell: dict[str, Any], default: dict[str, Any], rate: float | None, peak: float | None = None
) -> list[str]:
    """The figures of one cell. rate: of the measured GEMM, peak: the datasheet's, in FLOP/s."""
    if cell["status"] != "ok":
        return [cell["status"].replace("-", " "), "", "", "", ""]
    speed, seconds = cell.get("tokens_per_second"), cell.get("seconds")
    there, busy = default.get("status") == "ok", _disturbed(cell)
    comparable = speed and there and not busy and not _disturbed(default)
    ratio = f"{speed / default['tokens_per_second']:.2f}" if comparable else ""
    share = f"{cell['matrix_operations'] / seconds / rate:.0%}" if rate and seconds else ""
    share += f" ({cell['matrix_operations'] / seconds / peak:.0%} of the peak)" if share and peak else ""
    same = there and tool not in ("trl-packed", "llama-factory") and len(cell["losses"]) == len(default["losses"])
    pairs = zip(cell["losses"], default["losses"], strict=True) if same else ()
    gap = max((abs(one - other) for one, other in pairs), default=None)
    words = f"{speed:,.0f}{', disturbed' if busy else ''}" if speed else ""
    return [words, ratio, f"{cell['peak_memory_bytes'] / 1e9:.1f} GB", share,
            "" if gap is None else f"{gap:.0e}"]  # fmt: skip


def _disturbed(cell: dict[str, Any]) -> bool:
    return (cell.get("disturbance") or {}).get("verdict") == "disturbed"


def _step_parts(steps: dict[str, Any]) -> list[str]:
    """Lines on waiting, batches and LoRA's layers."""
    lines = []
    for name, step in steps.items():
        kind, cells = name.partition("-")[0], [cell for cell in step["cells"] if cell["status"] == "ok"]
        if kind == "waiting" and cells:
            counts = ", ".join(f"{cell['task']} {cell['waits_a_step']:g}" for cell in cells)
            lines.append(
                "- How often the host waits for the device from the beginning of an optimizer step to its end (not: "
                f"fetching its batch, measuring, logging): {counts}."
            )
        if kind == "sharing" and cells:
            seconds = ", ".join(f"{cell['jobs']} at a time {cell['seconds']:.0f}" for cell in cells)
            lines.append(f"- Seconds of a comparison of four runs, {_TITLES[step['shape']]}: {seconds}.")
        for key, title in (("how", "batches collated"), ("way", "LoRA's layers by")):
            if cells and key in cells[0]:
                speeds = ", ".join(f"{_setting(cell)} {cell[key]} {cell['tokens_per_second']:,.0f}"
                                   f"{', disturbed' if _disturbed(cell) else ''}" for cell in cells)  # fmt: skip
                lines.append(f"- Tokens/s of SFT, {_TITLES[step['shape']]}, lora, {title}: {speeds}.")
    return lines


def _setting(cell: dict[str, Any]) -> str:
    return f"{'Alpaca' if cell['rows'] == 'alpaca' else cell['rows']} x {cell['batch']}"


def _plan(steps: dict[str, Any]) -> list[str]:
    lines = []
    for step in steps.values():
        ratios = {cell["arm"]: cell["ratio"] for cell in step["cells"] if "ratio" in cell}
        if ratios:
            low, high = min(ratios, key=ratios.get), max(ratios, key=ratios.get)
            lines.append(
                f"- The plan's memory is {ratios[low]:.2f} ({low}) to {ratios[high]:.2f} ({high}) times the measured "
                f"peak, over {len(ratios)} arms on {_TITLES[step['shape']]}."
            )
    return lines


def _generation(steps: dict[str, Any]) -> list[str]:
    lines = []
    for step in steps.values():
        if step.get("task") != "generation":
            continue
        done = [cell for cell in step["cells"] if cell["status"] == "ok"]
        words = [f"{cell['variant']} {'by transformers ' if cell['tool'] == 'transformers' else ''}at batch "
                 f"{cell['batch']}: {cell['tokens_per_second']:,.0f}" for cell in done]  # fmt: skip
        lines.append(f"- Generated tokens/s, {_TITLES[step['shape']]}: {'; '.join(words)}.")
    return lines


def _others(steps: dict[str, Any]) -> list[str]:
    lines = []
    tested = [cell for name, step in steps.items() if name.startswith("tests-") for cell in step["cells"]
              if cell["status"] == "ok"]  # fmt: skip
    if tested:
        counts = (f"{sum(cell[kind] for cell in tested)} {kind}" for kind in ("passed", "failed", "skipped"))
        lines.append(f"- Tests that need a GPU: {', '.join(counts)}.")
    for cell in steps.get("out-of-memory", {}).get("cells", []):
        if cell["status"] == "ok":
            states = ", ".join(f"{arm} {status}" for arm, status in cell["arms"].items())
            lines.append(f"- A comparison with too little memory for one arm: {states}.")
    for cell in steps.get("launch", {}).get("cells", []):
        if cell["status"] == "ok":
            lines.append(f"- `accelerate launch` with one process on {cell['backend']}: losses differ from a run "
                         f"without it by {cell['largest_loss_difference']:.0e} at most.")  # fmt: skip
    failed = [f"{name} ({made['status']})" for name, made in steps.items() if made["status"] != "ok"]
    return lines + ([f"- Without a whole result: {', '.join(failed)}."] if failed else [])
