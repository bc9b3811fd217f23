"""Cost of many adapters on one base: memory compared with the base alone, and the time of a switch.

    python benchmarks/adapter_set.py                       # SmolLM2-135M, 20 adapters of rank 16
    python benchmarks/adapter_set.py --random-weights      # without the model: the sizes are the same

The base alone and the base with its adapters run in a fresh process each; each answers the same prompt (with each of
its adapters) before its resident memory is read, so that all weights are paged in. A switch is `AdapterSet.use`, shown
next to PEFT's own `set_adapter`; the logits of some adapters are compared with a fresh model that has that adapter
alone. Prints the result as JSON; --keep writes benchmarks/adapter_set.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import in_fresh_process, result_parser, write_result

KEPT = Path(__file__).with_suffix(".json")
RANK, SWITCHES = 16, 200


def main() -> None:
    given = _arguments()
    if given.one:
        print(json.dumps(_one(given)))
        return
    with tempfile.TemporaryDirectory(prefix="adapters-") as folder:
        where = Path(folder)
        print(f"making {given.adapters} adapters of rank {RANK}", flush=True)
        _in_fresh_process("make", where, given)
        alone = _in_fresh_process("base", where, given)
        together = _in_fresh_process("set", where, given)
    environment = together.pop("environment")
    summary = {
        "memory_ratio": together["resident_bytes"] / alone["resident_bytes"],
        "weights_ratio": together["weights_bytes"] / alone["weights_bytes"],
        "switch_ms": together["switch_ms"]["median"],
        "peft_set_adapter_ms": together["peft_set_adapter_ms"]["median"],
        "largest_difference": together["largest_difference"],
    }
    document = {**summary, "model": given.model, "random_weights": given.random_weights, "rank": RANK,
                "adapters": given.adapters, "base": alone, "set": together, "environment": environment}  # fmt: skip
    write_result(given, KEPT, document, summary)


def _arguments() -> argparse.Namespace:
    parser = result_parser(__doc__)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--random-weights", action="store_true", help="use a random base; the sizes are the same")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "DIR"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_fresh_process(way: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    words = ["--one", way, str(folder), "--model", given.model, "--adapters", str(given.adapters)]
    words += ["--random-weights"] if given.random_weights else []
    result = in_fresh_process(__file__, words)
    if "resident_bytes" in result:
        print(f"{way:5} {result['resident_bytes'] / 1e6:8.0f} MB resident, {result['weights_bytes'] / 1e6:8.0f} MB of "
              "weights", flush=True)  # fmt: skip
    return result


def _one(given: argparse.Namespace) -> dict[str, Any]:
    from peft_recipes.distributed.quiet import quiet_libraries

    quiet_libraries()
    way, folder = given.one[0], Path(given.one[1])
    if way == "make":
        return _make(given, folder)
    import peft  # noqa: F401  (both processes import the same libraries)
    import torch

    from peft_recipes import AdapterSet
    from peft_recipes.hardware.device import choose
    from peft_recipes.hardware.environment import environment

    prompt = {"input_ids": torch.arange(100, 132)[None]}
    if way == "base":
        from peft_recipes.adapters.open import open_adapter

        served = open_adapter(folder / "0")
        base = served.load_base()
        with torch.no_grad():
            base(**prompt)
        return {"resident_bytes": _resident(), "weights_bytes": _weights(base)}
    adapters = AdapterSet(_base(given, folder))
    for number in range(given.adapters):
        adapters.load(folder / str(number), str(number))
    answers = {}
    for name in adapters.names:
        with torch.no_grad():
            answers[name] = adapters.use(name)(**prompt).logits[:, -1].clone()  # a view would keep all of them
    result = {"resident_bytes": _resident(), "weights_bytes": _weights(adapters.model)}
    names = adapters.names
    result["switch_ms"] = _timed(lambda i: adapters.use(names[i % len(names)]))
    inner = [adapters.peft_name(name) for name in names]
    result["peft_set_adapter_ms"] = _timed(lambda i: adapters.model.set_adapter(inner[i % len(inner)]), 20)
    result["largest_difference"] = _largest_difference(answers, folder, prompt)
    return {**result, "environment": environment(choose())}


def _base(given: argparse.Namespace, folder: Path) -> str:
    return str(folder / "base") if given.random_weights else given.model


def _make(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Save plain PEFT adapters on the attention layers, with random weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from peft_recipes import targets
    from peft_recipes.models import bases

    path = bases.location(given.model)
    if given.random_weights:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        model.save_pretrained(folder / "base")
        AutoTokenizer.from_pretrained(path).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base" if given.random_weights else path)
    lora = LoraConfig(r=RANK, target_modules=targets("llama", "attention"), task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    adapted.peft_config["default"].base_model_name_or_path = _base(given, folder)
    for number in range(given.adapters):
        torch.manual_seed(number)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_" in name:
                    weight.normal_(std=0.02)
        adapted.save_pretrained(folder / str(number))
    return {"trainable": sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)}


def _resident() -> int:
    """Resident memory of this process, in bytes, after the allocator returns what was freed."""
    import psutil

    from peft_recipes.kernels import allocator

    gc.collect()
    allocator.give_back()
    return psutil.Process().memory_info().rss


def _weights(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _timed(switch: Any, times: int = SWITCHES) -> dict[str, float]:
    each = []
    for i in range(times):
        start = time.perf_counter()
        switch(i)
        each.append(1e3 * (time.perf_counter() - start))
    each.sort()
    return {"median": statistics.median(each), "p95": each[int(0.95 * len(each))], "largest": each[-1]}


def _largest_difference(answers: dict[str, Any], folder: Path, prompt: dict[str, Any]) -> float:
    """Largest logit difference of three adapters from plain PEFT with that adapter alone on a fresh base."""
    import torch
    from peft import PeftModel

    from peft_recipes.adapters.open import open_adapter

    gaps = []
    for name in list(answers)[:: max(len(answers) // 2 - 1, 1)][:3]:
        alone = PeftModel.from_pretrained(open_adapter(folder / name).load_base(), folder / name).eval()
        with torch.no_grad():
            gaps.append(float((alone(**prompt).logits[:, -1] - answers[name]).abs().max()))
    return max(gaps)


if __name__ == "__main__":
    main()
