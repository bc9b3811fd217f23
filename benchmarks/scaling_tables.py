"""The tables of docs/scaling.md: memory and traffic per process by the formulas, compared with measured traffic.

    python benchmarks/scaling_tables.py                  # print the tables made from the kept JSON
    python benchmarks/scaling_tables.py --keep           # write them to docs/scaling.md
    python benchmarks/scaling_tables.py --measure        # trace a step of every model on meta tensors (minutes)

--measure prints the sizes as JSON; with --keep it writes them to benchmarks/scaling/sizes.json, and then the tables.
traffic/traffic.json is written by benchmarks/traffic.py.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import result_parser, write_result

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "scaling.md"
SIZES, TRAFFIC = HERE / "scaling" / "sizes.json", HERE / "traffic" / "traffic.json"
GPU = 80e9
LENGTH = 1_024  # tokens of the one example per process and step

# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied: the published configurations.
MODELS = {
    "SmolLM2-135M": (576, 1_536, 30, 9, 3, 49_152, True),
    "Llama-3.2-1B": (2_048, 8_192, 16, 32, 8, 128_256, True),
    "Llama-3.1-8B": (4_096, 14_336, 32, 32, 8, 128_256, False),
    "Qwen2.5-32B": (5_120, 27_648, 64, 40, 8, 152_064, False),
    "Llama-3.1-70B": (8_192, 28_672, 80, 64, 8, 128_256, False),
}


def sizes_of(name: str) -> dict[str, dict[str, int]]:
    """Memory of one process's training step, full and LoRA r=16 on all linear layers, traced without weights.

    fp32 weights, bf16 computation, gradient checkpointing, AdamW, one example of 1,024 labelled tokens.
    """
    import transformers
    from peft import LoraConfig

    from peft_recipes import Arm, Dataset, Recipe, targets
    from peft_recipes.arms.meta import with_arm_on_meta
    from peft_recipes.models import bases
    from peft_recipes.planning import scaling
    from peft_recipes.planning.memory import arm_step_memory
    from peft_recipes.tasks.registry import task_of

    hidden, inner, layers, heads, pairs, words, tied = MODELS[name]
    shape = transformers.LlamaConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=pairs, tie_word_embeddings=tied, max_position_embeddings=LENGTH,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        shape.save_pretrained(folder)
        lora = LoraConfig(r=16, target_modules=targets("llama", "all-linear"))
        recipe = Recipe(
            name="scaling", task="sft", model=folder, dataset=Dataset("unused.jsonl"), max_length=LENGTH,
            training={"per_device_train_batch_size": 1, "bf16": True, "gradient_checkpointing": True, "use_cpu": True},
            arms={"full": Arm(), "lora": Arm(lora, learning_rate=1e-4)}, batches="padded",
        )  # fmt: skip
        task, config, sizes = task_of(recipe), bases.load_config(recipe), {}
        for arm in recipe.arms:
            step = arm_step_memory(task, None, config, arm, True, scaling.Spread())
            model, _ = with_arm_on_meta(recipe, config, recipe.arms[arm], arm)
            sizes[arm] = asdict(scaling.model_sizes(model, step, lower=True))
    return sizes


def tables() -> dict[str, str]:
    """The page's tables by name, as Markdown, from the kept JSON."""
    from peft_recipes.planning.scaling import Sizes

    kept = json.loads(SIZES.read_text())
    sizes = {name: {arm: Sizes(**given) for arm, given in arms.items()} for name, arms in kept.items()}
    return {"traffic": _measured(), "memory": _memory(sizes), "sent": _sent(sizes), "fewest": _fewest(sizes)}


def _measured() -> str:
    measured = json.loads(TRAFFIC.read_text())
    rows = ["| processes | shared by | arm | sent a step | by the formula, gloo | off by | by the formula, rings |",
            "|---:|:---|:---|---:|---:|---:|---:|"]  # fmt: skip
    for run in measured["runs"]:
        for arm, row in run["arms"].items():
            sent, over_gloo = max(row["sent"]), gloo_bytes(row["formula"], run)
            rows.append(f"| {run['processes']} | {run['kind']} | {arm} | {sent:,} | {over_gloo:,} | "
                        f"{(sent - over_gloo) / over_gloo:+.1%} | {row['formula']['total']:,} |")  # fmt: skip
    factors = "; ".join(
        f"{run['processes']} processes: " + ", ".join(f"{name} {factor:.3f}" for name, factor in run["gloo"].items())
        for run in measured["runs"] if run["kind"] == "DDP"
    )  # fmt: skip
    return "\n".join([*rows, "", f"Bytes that gloo sends a byte of the whole tensor, measured alone: {factors}."])


def gloo_bytes(formula: dict[str, int], run: dict[str, Any]) -> int:
    """The formula's traffic with gloo's algorithms, whose bytes per collective were measured separately."""
    share, total = (run["processes"] - 1) / run["processes"], 0.0
    for name, size in formula.items():
        if name == "total":
            continue
        collective = name.partition(" of ")[0]
        gathered = size / (share * (2 if collective == "all-reduce" else 1))
        total += gathered * run["gloo"][collective]
    return round(total)


WAYS = [(None, 1), ("DDP", 8), ("ZeRO-2", 8), ("FSDP2", 8), ("ZeRO-2", 64), ("FSDP2", 64)]


def _memory(sizes: dict[str, Any]) -> str:
    from peft_recipes.planning.scaling import memory

    heads = ["one" if kind is None else f"{kind}, {n}" for kind, n in WAYS]
    rows = [f"| model | arm | {' | '.join(heads)} |", f"|:---|:---|{'---:|' * len(heads)}"]
    for name, arms in sizes.items():
        for arm, size in arms.items():
            totals = [memory(size, kind, n)["total"] for kind, n in WAYS]
            rows.append(f"| {name} | {arm} | {' | '.join(_gb(total) for total in totals)} |")
    return "\n".join([*rows, "", "GB of each process; **bold** fits 80 GB."])


def _sent(sizes: dict[str, Any]) -> str:
    from peft_recipes.planning.scaling import traffic

    ways = [(kind, n) for kind, n in WAYS if kind is not None and (kind, n) != ("ZeRO-2", 64)]
    rows = [f"| model | arm | {' | '.join(f'{kind}, {n}' for kind, n in ways)} |", f"|:---|:---|{'---:|' * len(ways)}"]
    for name, arms in sizes.items():
        for arm, size in arms.items():
            totals = [traffic(size, kind, n)["total"] for kind, n in ways]
            rows.append(f"| {name} | {arm} | {' | '.join(f'{total / 1e9:.3g}' for total in totals)} |")
    return "\n".join([*rows, "", "GB that each process sends in a step of one batch, by rings."])


def _fewest(sizes: dict[str, Any]) -> str:
    from peft_recipes.planning.scaling import memory

    rows = ["| model | arm | one process or DDP | ZeRO-2 | FSDP2 | choose |", "|:---|:---|---:|---:|---:|:---|"]
    for name, arms in sizes.items():
        for arm, size in arms.items():
            fewest = {kind: next((n for n in (1, 2, 4, 8, 16, 32, 64) if memory(size, kind, n)["total"] < GPU), None)
                     for kind in ("DDP", "ZeRO-2", "FSDP2")}  # fmt: skip
            words = ["none" if n is None else str(n) for n in fewest.values()]
            both = all(memory(size, "DDP", n)["total"] < GPU for n in (1, 2))
            choice = "`ddp`" if both else "`fsdp2`" if fewest["FSDP2"] else "more GPUs"
            rows.append(f"| {name} | {arm} | {' | '.join(words)} | {choice} |")
    return "\n".join([*rows, "", "The fewest GPUs of 80 GB, of 1, 2, 4, ... 64, on which a step fits."])


def _gb(total: float) -> str:
    text = f"{total / 1e9:,.1f}" if total < 1e11 else f"{total / 1e9:,.0f}"
    return f"**{text}**" if total < GPU else text


def written(page: str) -> str:
    """The page with its tables made from the kept JSON."""
    for name, table in tables().items():
        marked = re.compile(rf"(<!-- {name}: .*?-->\n).*?(<!-- /{name} -->)", re.DOTALL)
        assert marked.search(page), name
        page = marked.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", page)
    return page


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("--measure", action="store_true", help="trace a step of every model again")
    given = parser.parse_args()
    if given.measure:
        write_result(given, SIZES, {name: sizes_of(name) for name in MODELS})
    if given.keep:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    elif not given.measure:
        print("\n\n".join(tables().values()))


if __name__ == "__main__":
    main()
