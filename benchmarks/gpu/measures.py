"""What the steps of on_gpu.py measure; each function writes its cells through a `step.Result`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu import workspace
from gpu.steps import OTHER_TOOLS, PACKED, STEPS

ROOT = Path(__file__).parents[2]


def environment_of(device: str) -> dict[str, Any]:
    """Device, precision and versions, as every run has them, with the GPU's driver, CUDA and memory."""
    import torch

    from peft_recipes.hardware.device import choose
    from peft_recipes.hardware.environment import environment

    made = environment(choose({"use_cpu": device == "cpu", **({"bf16": True} if device == "cuda" else {})}))
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip()
        except (OSError, subprocess.SubprocessError):
            driver = None
        made |= {"driver": driver or None, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
                 "capability": ".".join(map(str, torch.cuda.get_device_capability()))}  # fmt: skip
    optional = ("flash_attn", "liger_kernel", "kernels", "bitsandbytes", *OTHER_TOOLS.values())
    return made | {"installed": {name: importlib.util.find_spec(name) is not None for name in optional}}


def device(result: Any, size: int = 8_192) -> None:
    """The rates that everything else is compared with: a large matrix product and a large copy."""
    import torch

    from peft_recipes.hardware.device import synchronise

    result.data["environment"] = environment_of(result.device)

    def best_seconds(work: Any, tries: int = 20) -> float:
        work()
        each = []
        for _ in range(tries):
            synchronise(result.device)
            start = time.perf_counter()
            work()
            synchronise(result.device)
            each.append(time.perf_counter() - start)
        return statistics.median(each)

    def gemm(dtype: Any) -> dict[str, float]:
        a, b = (torch.randn(size, size, device=result.device, dtype=dtype) for _ in range(2))
        return {"flops_per_second": 2 * size**3 / best_seconds(lambda: a @ b), "size": size}

    def copy() -> dict[str, float]:
        a = torch.randn(8 * size, size, device=result.device)
        b = torch.empty_like(a)
        return {"bytes_per_second": 2 * a.numel() * 4 / best_seconds(lambda: b.copy_(a))}

    result.cell("gemm-bf16", lambda: gemm(torch.bfloat16))
    result.cell("gemm-fp32", lambda: gemm(torch.float32))
    result.cell("copy", copy)


def suite(result: Any, file: str) -> None:
    """The tests of one file that need a GPU: how many passed, failed and were skipped, and which failed."""
    import xml.etree.ElementTree as Tree

    import pytest

    report = result.work / "suite.xml"
    os.environ.pop("PYTEST_XDIST_WORKER", None)

    def run() -> dict[str, Any]:
        words = ["-m", "gpu", "-p", "no:cacheprovider", f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")]
        code = pytest.main([*words, f"--junitxml={report}", str(ROOT / file)])
        if code not in (0, 1, 5):  # passed, failed, none selected
            raise RuntimeError(f"pytest ended with code {int(code)}")
        cases = list(Tree.parse(report).getroot().iter("testcase"))
        names: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
        for case in cases:
            kinds = {child.tag for child in case}
            kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            names[kind].append(f"{case.get('classname')}::{case.get('name')}")
        why = [result.without_paths((child.get("message") or "")[:500]) for case in cases for child in case
               if child.tag in ("failure", "error")]  # fmt: skip
        return {"exit_code": int(code), **{kind: len(found) for kind, found in names.items()},
                "failed_tests": names["failed"], "errors": why,
                "tests": names["passed"] + names["skipped"]}  # fmt: skip

    result.cell("pytest -m gpu", run, file=file)


def given_for(result: Any, rows: str, batch: int, shape: str, arm: str, tool: str, task: str = "sft") -> Any:
    file = workspace.recipe_file(result.work, shape, rows, batch * STEPS, result.device, result.tiny, task)
    return argparse.Namespace(
        recipe=str(file), arm=arm, one=tool, batch=batch, steps=STEPS, data="made", model=shape, compile=False,
        bf16=result.device == "cuda", random_weights=False, pack_to=64 if result.tiny else PACKED, changes=[],
    )  # fmt: skip


def about(rows: str, batch: int, **more: Any) -> dict[str, Any]:
    return {"rows": rows, "batch": batch, **more}


def sft(result: Any, shape: str, arm: str, tool: str, cells: list[tuple[str, int]]) -> None:
    """Steps of SFT by this project or trl."""
    import sft_throughput

    result.data |= {"task": "sft", "shape": shape, "arm": arm, "tool": tool}
    for rows, batch in cells:
        if tool == "trl-packed" and rows != "alpaca":
            continue  # its rows are of the packed length already
        given = given_for(result, rows, batch, shape, arm, tool)
        result.cell(f"{rows}-batch{batch}", lambda: without_environment(sft_throughput.measure(given)),  # noqa: B023
                    **about(rows, batch))  # fmt: skip


def dpo(result: Any, shape: str, tool: str, cells: list[tuple[str, int]]) -> None:
    """Steps of DPO by this project or trl."""
    import dpo_throughput

    result.data |= {"task": "dpo", "shape": shape, "arm": "lora", "tool": tool}
    for rows, batch in cells:
        given = given_for(result, rows, batch, shape, "lora", tool, "dpo")
        result.cell(f"{rows}-batch{batch}", lambda: without_environment(dpo_throughput.measure(given)),  # noqa: B023
                    **about(rows, batch))  # fmt: skip


def without_environment(made: dict[str, Any]) -> dict[str, Any]:
    made.pop("environment", None)
    return made


def other_tool(result: Any, shape: str, arm: str, tool: str, cells: list[tuple[str, int]]) -> None:
    """Steps of SFT by another toolkit, where it is installed."""
    result.data |= {"task": "sft", "shape": shape, "arm": arm, "tool": tool}
    if importlib.util.find_spec(OTHER_TOOLS[tool]) is None:
        result.data["cells"].append({"cell": "all", "status": "not installed", "error": f"{tool} is not installed"})
        return
    from gpu import other_tools

    for rows, batch in cells:
        given = given_for(result, rows, batch, shape, arm, tool)
        result.cell(f"{rows}-batch{batch}", lambda: getattr(other_tools, tool.replace("-", "_"))(given),  # noqa: B023
                    **about(rows, batch))  # fmt: skip


def plan(result: Any, shape: str, arms: tuple[str, ...], batch: int) -> None:
    """The plan's memory of each arm's step, and the peak of its steps."""
    import sft_throughput

    from peft_recipes import load_recipe
    from peft_recipes.arms.selection import choose_arms
    from peft_recipes.models import bases
    from peft_recipes.planning.memory import memory
    from peft_recipes.tasks.registry import task_of

    result.data |= {"task": "sft", "shape": shape}
    given = given_for(result, "alpaca", batch, shape, "lora", "peft-recipes")
    own = [name for name in arms if name in ("full", "lora", "qlora")]
    recipe = choose_arms(load_recipe(given.recipe), [*own, *(name for name in arms if name not in own)]).recipe
    recipe.to_yaml(Path(given.recipe).with_name(f"{shape}-plan.yaml"))
    given.recipe, given.steps = str(Path(given.recipe).with_name(f"{shape}-plan.yaml")), 5
    recipe = sft_throughput._recipe(given)
    task = task_of(recipe)
    prepared = task.prepare()
    config = bases.load_config(recipe)

    def both(name: str) -> dict[str, Any]:
        estimated = memory(task, prepared, config, name)
        measured = sft_throughput.measure(argparse.Namespace(**{**vars(given), "arm": name}))["peak_memory_bytes"]
        return {"estimated": estimated["total"], "measured": measured, "ratio": estimated["total"] / measured,
                "parts": estimated}  # fmt: skip

    for name in arms:
        result.cell(name, lambda: both(name), arm=name)  # noqa: B023


def generation(result: Any, shape: str, batches: list[int], tokens: int) -> None:
    """Generated tokens/s of a base, with an adapter and merged, beside transformers' own `generate`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    from peft_recipes import targets
    from peft_recipes.hardware.device import synchronise
    from peft_recipes.scoring.generation import generate

    result.data |= {"task": "generation", "shape": shape, "new_tokens": tokens}
    folder = workspace.model_folder(result.work, shape, result.device)
    dtype = torch.bfloat16 if result.device == "cuda" else torch.float32
    prompt_tokens = 8 if result.tiny else 64
    set_seed(0)

    def model_of(variant: str) -> Any:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(result.device).eval()
        if variant == "base":
            return base
        linear = targets(workspace.SHAPES[shape]["model_type"], "all-linear")
        adapted = get_peft_model(base, LoraConfig(r=16, target_modules=linear, task_type="CAUSAL_LM"))
        return adapted.merge_and_unload() if variant == "merged" else adapted

    def timed(variant: str, batch: int, how: str) -> dict[str, Any]:
        model = model_of(variant).eval()
        prompts = torch.randint(3, workspace.WORDS, (batch, prompt_tokens)).tolist()
        options = {"min_new_tokens": tokens}

        def ours() -> int:
            return sum(map(len, generate(model, prompts, 0, tokens, options, batch, ends=set())))

        def plain() -> int:
            ids = torch.tensor(prompts, device=result.device)
            with torch.no_grad():
                made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                                      do_sample=False, pad_token_id=0, **options)  # fmt: skip
            return (made.shape[1] - ids.shape[1]) * batch

        run = ours if how == "peft-recipes" else plain
        run()
        synchronise(result.device)
        start = time.perf_counter()
        count = run()
        synchronise(result.device)
        return {"tokens": count, "tokens_per_second": count / (time.perf_counter() - start)}

    for batch in batches:
        for variant in ("base", "adapter", "merged"):
            for how in ("peft-recipes", "transformers") if variant == "base" else ("peft-recipes",):
                result.cell(f"{variant}-batch{batch}-{how}", lambda: timed(variant, batch, how),  # noqa: B023
                            variant=variant, batch=batch, tool=how)  # fmt: skip


def out_of_memory(result: Any, shape: str) -> None:
    """A comparison of two arms, one of which does not fit: on a GPU beside held memory, on a CPU under a limit."""
    from gpu.scarce_memory import compare_with_scarce_memory

    result.cell("full beside lora", lambda: compare_with_scarce_memory(result, shape), shape=shape)


def launch(result: Any, shape: str) -> None:
    """`accelerate launch` with one process, compared with the same run without it."""
    from peft_recipes import load_recipe
    from peft_recipes.distributed.launch import launch_files
    from peft_recipes.runs.folder import read_run, run_folder

    file = workspace.recipe_file(result.work, shape, "alpaca", 32, result.device, result.tiny)
    changes = ["training.max_steps=4", "training.per_device_train_batch_size=8", "training.eval_strategy=no"]
    recipe, output = load_recipe(file, changes=changes), result.work / "launched"
    recipe.to_yaml(file)
    words = [str(file), "--arm", "lora", "--seed", "0"]

    def both() -> dict[str, Any]:
        from peft_recipes import train

        starter = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch_files()["ddp"]),
                   "--num_processes", "1", "--main_process_port", "0", "-m", "gpu.launched"]  # fmt: skip
        backend = result.work / "backend.json"
        env = {**os.environ, "PEFT_RECIPES_BACKEND_FILE": str(backend)}
        command = [*starter, *words, "--output", str(output), "--overwrite"]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT / "benchmarks")
        if done.returncode:
            raise RuntimeError(done.stderr[-1_500:])
        there = read_run(run_folder(output, recipe, "lora", 0)).data["training"]
        here = train(recipe, "lora", seed=0, output=result.work / "alone", overwrite=True).data["training"]
        gaps = [abs(a[1] - b[1]) for a, b in zip(there["losses"], here["losses"], strict=True)]
        return {**json.loads(backend.read_text()), "largest_loss_difference": max(gaps),
                "losses": [loss for _, loss in there["losses"]], "losses_alone": [loss for _, loss in here["losses"]],
                "peak_memory_bytes": there["peak_memory_bytes"],
                "peak_memory_bytes_alone": here["peak_memory_bytes"]}  # fmt: skip

    result.cell("one process", both)
