"""What a packed batch costs the host in each step, by attention kernel: collating it, and the model's attention mask.

    python benchmarks/packed_collating.py

16 examples of 1,024 tokens behind a common prefix of 128, and 8 of 256 behind 64, in one sequence. "mask" makes the
dense mask of all pairs of positions, as every step did before there were kernels without one. Medians of one thread;
prints a Markdown table and the result as JSON; --keep writes benchmarks/packed_collating.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from harness import result_parser, write_result

BATCHES = [(16, 1_024, 128), (8, 256, 64)]  # examples, tokens of each, of which shared
SECONDS = 2.0  # for each figure
VOCABULARY = 49_152


def main() -> None:
    given = result_parser(__doc__).parse_args()
    import torch
    from transformers import LlamaConfig

    from peft_recipes.data.packing import SEGMENTS, SharedPrefixCollator
    from peft_recipes.hardware.device import choose
    from peft_recipes.hardware.environment import environment
    from peft_recipes.kernels.packed_attention import KERNELS, Preparation, attention_mask

    torch.set_num_threads(1)
    config = LlamaConfig(attn_implementation="sdpa")
    hardware, rows = choose({"use_cpu": True}), []
    for examples, length, shared in BATCHES:
        batch = _examples(examples, length, shared)
        for kernel in KERNELS:
            prepare = Preparation(kernel)
            collator = SharedPrefixCollator(0, break_even=float("inf"), max_row_tokens=10**6, prepare=prepare)
            mask_of = partial(attention_mask, collator(batch)[SEGMENTS], config, "cpu")
            rows.append({
                "examples": examples, "tokens": length, "shared": shared, "kernel": kernel,
                "collating_ms": _median_ms(partial(collator, batch)), "mask_ms": _median_ms(mask_of),
                "mask_bytes": mask_of().untyped_storage().nbytes(),
            })  # fmt: skip
    print("| batch | kernel | collating (ms) | mask (ms) | mask (MB) |\n|:---|:---|---:|---:|---:|")
    for row in rows:
        name = f"{row['examples']} x {row['tokens']:,} tokens"
        print(f"| {name} | {row['kernel']} | {row['collating_ms']:.1f} | {row['mask_ms']:.1f} | "
              f"{row['mask_bytes'] / 1e6:.1f} |")  # fmt: skip
    write_result(given, Path(__file__).with_suffix(".json"), {"rows": rows, "environment": environment(hardware)})


def _examples(count: int, length: int, shared: int) -> list[dict[str, list[int]]]:
    import random

    draw = random.Random(0)
    prefix = [draw.randrange(3, VOCABULARY) for _ in range(shared)]
    rows = [prefix + [draw.randrange(3, VOCABULARY) for _ in range(length - shared)] for _ in range(count)]
    return [{"input_ids": ids, "labels": [-100] * (shared + 8) + ids[shared + 8 :]} for ids in rows]


def _median_ms(work: Callable[[], Any]) -> float:
    seconds: list[float] = []
    last = time.perf_counter() + SECONDS
    while time.perf_counter() < last or len(seconds) < 5:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1000


if __name__ == "__main__":
    main()
