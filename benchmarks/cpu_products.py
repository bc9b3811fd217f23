"""Matrix products of linear layers on this CPU: torch's (MKL) compared with oneDNN's, forward and both gradients.

    python benchmarks/cpu_products.py

Shapes of SmolLM2-135M and DistilBERT with 430 positions, and of SmolLM2's LM head with 286. Medians; the two alternate,
so that both see the same load. Prints a Markdown table and the result as JSON; --keep writes
benchmarks/cpu_products.json.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from harness import result_parser, write_result

SHAPES = [(430, 576, 1536), (430, 1536, 576), (430, 576, 576), (430, 576, 192), (430, 768, 3072), (430, 3072, 768),
          (430, 768, 768), (286, 576, 49152)]  # fmt: skip
SECONDS = 2.0  # for each product of each library


def main() -> None:
    given = result_parser(__doc__).parse_args()
    import torch

    from peft_recipes.hardware.device import choose
    from peft_recipes.hardware.environment import environment
    from peft_recipes.kernels import onednn_linear

    if not onednn_linear.pays():
        raise SystemExit("Models use torch's own products on this machine: it has a GPU or no AMD CPU.")
    rows = []
    for positions, inner, outer in SHAPES:
        x, weight, gradient = torch.randn(positions, inner), torch.randn(outer, inner), torch.randn(positions, outer)
        pairs = {"forward": (x, weight), "to the input": (gradient, weight.t()), "to the weight": (gradient.t(), x.t())}
        for name, (a, b) in pairs.items():
            seconds: tuple[list[float], list[float]] = ([], [])
            last = time.perf_counter() + 2 * SECONDS
            while time.perf_counter() < last or len(seconds[0]) < 5:
                for kept, product in zip(seconds, (torch.nn.functional.linear, onednn_linear.product), strict=True):
                    start = time.perf_counter()
                    product(a, b)
                    kept.append(time.perf_counter() - start)
            own, ours = (statistics.median(kept[2:]) for kept in seconds)
            rows.append({"positions": positions, "inner": inner, "outer": outer, "product": name,
                         "own_ms": own * 1e3, "onednn_ms": ours * 1e3, "ratio": own / ours})  # fmt: skip
    print("| positions x inner x outer | product | torch's own | oneDNN | ratio |\n|:---|:---|---:|---:|---:|")
    for row in rows:
        print(f"| {row['positions']} x {row['inner']} x {row['outer']} | {row['product']} | {row['own_ms']:.2f} ms "
              f"| {row['onednn_ms']:.2f} ms | {row['ratio']:.2f} |")  # fmt: skip
    result = {"products": rows, "environment": environment(choose({}))}
    write_result(given, Path(__file__).with_suffix(".json"), result)


if __name__ == "__main__":
    main()
