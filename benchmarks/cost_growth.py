"""Growth of time and memory with batch size, length and data: SmolLM2-135M's shape, LoRA r=16, random weights.

    python benchmarks/cost_growth.py

Each point runs in a fresh process: the median of the steps after 3 warm-up steps, the process's peak memory during
them, and the plan's estimate. More data costs preparation only, whose seconds and memory are measured on Alpaca-like
examples.
Prints the result as JSON; --keep writes benchmarks/cost_growth.json, the source of the table in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import in_fresh_process, result_parser, write_result

POINTS = [(4, 128), (8, 64), (8, 128), (8, 256), (16, 128)]  # batch, length of every example
ROWS = [1_000, 5_000, 20_000]
STEPS, WARMUP = 6, 3


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one or given.rows:
        print(json.dumps(_steps(*given.one) if given.one else _preparation(given.rows)))
        return
    steps = [in_fresh_process(__file__, ["--one", str(batch), str(length)]) for batch, length in POINTS]
    rows = [in_fresh_process(__file__, ["--rows", str(count)]) for count in ROWS]
    environment = steps[0]["environment"]
    for row in steps:
        row.pop("environment")
    result = {"steps": steps, "rows": rows, "environment": environment}
    write_result(given, Path(__file__).with_suffix(".json"), result)


def _steps(batch: int, length: int) -> dict[str, Any]:
    from peft_recipes.distributed.quiet import quiet_libraries

    quiet_libraries()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    from peft_recipes import targets
    from peft_recipes.data.packing import SharedPrefixCollator
    from peft_recipes.hardware.device import choose
    from peft_recipes.hardware.environment import environment
    from peft_recipes.kernels import activations, allocator, lora_linear, onednn_linear
    from peft_recipes.measuring.disturbance import Disturbance
    from peft_recipes.measuring.memory import PeakMemory
    from peft_recipes.planning.memory import FREED
    from peft_recipes.planning.step_memory import loaded_libraries_bytes, step_memory
    from peft_recipes.tasks.causal_losses import labelled_losses, tensors

    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=16, target_modules=targets("llama", "attention"), task_type="CAUSAL_LM")
    draw = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(batch):
        ids = torch.randint(3, 49_152, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    libraries = loaded_libraries_bytes()
    with torch.device("meta"):
        planned = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    given = tensors(SharedPrefixCollator.for_model(planned.get_base_model(), 0, 4096)(rows))
    estimated = step_memory(planned, given, lambda m, b: labelled_losses(m, b)[0].sum())
    allocator.set_for_training()  # from here on as in a run
    base = AutoModelForCausalLM.from_config(config)
    activations.fuse(base)
    onednn_linear.speed_up(base)
    model = get_peft_model(base, lora).train()
    lora_linear.speed_up(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    seconds, memory, disturbance = [], PeakMemory("cpu"), Disturbance()
    for number in range(STEPS):
        memory.reset()
        disturbance.begin()
        start = time.perf_counter()
        labelled_losses(model, dict(given))[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        disturbance.end(warmup=number < WARMUP)
        memory.read()
    step = statistics.median(seconds[WARMUP:])
    return {"batch": batch, "length": length, "seconds": step, "tokens_per_second": batch * length / step,
            "peak_memory_bytes": memory.peak, "disturbance": disturbance.figures("cpu"),
            "estimated_bytes": estimated["total"] + int(FREED * estimated["activations"]) + libraries,
            "libraries_bytes": libraries, "environment": environment(choose({"use_cpu": True}))}  # fmt: skip


def _preparation(count: int) -> dict[str, Any]:
    from peft_recipes.distributed.quiet import quiet_libraries

    quiet_libraries()
    from peft_recipes import load_recipe
    from peft_recipes.planning.step_memory import loaded_libraries_bytes
    from peft_recipes.tasks.registry import task_of

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        words = [f"word{i}" for i in range(500)]
        with path.open("w") as file:
            for i in range(count):
                question = " ".join(words[(i * 7 + k) % 500] for k in range(20))
                answer = " ".join(words[(i * 11 + k) % 500] for k in range(30))
                file.write(json.dumps({"instruction": f"{i} {question}", "input": "", "output": answer}) + "\n")
        changes = [f"dataset.path={path}", "dataset.train=0.9", "dataset.validation=0.05", "dataset.test=0.05"]
        task = task_of(load_recipe("smollm2-alpaca", embedded=True, changes=changes))
        before, start = loaded_libraries_bytes(), time.perf_counter()
        task.prepare()
        return {
            "rows": count,
            "seconds": time.perf_counter() - start,
            "memory_bytes": loaded_libraries_bytes() - before,
        }


if __name__ == "__main__":
    main()
