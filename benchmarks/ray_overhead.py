"""What a Ray cluster adds to a comparison: seconds for each run and the driver's memory; 24 runs on Ray and locally.

    python benchmarks/ray_overhead.py

A cluster of two nodes is started on this machine. Runs of nothing (submitted, placed and reported like any other, but
no process is started) are submitted 1, 10, 100 and 1,000 at once, each count by a driver of its own. Then four arms of
a tiny model are compared with six seeds on the two nodes, and with `--jobs 2`; their figures must be equal.
Prints the result as JSON; --keep writes benchmarks/ray_overhead.json, the source of a table in docs/guides/cluster.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import in_fresh_process, result_parser, write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))  # the tests' small models and texts

COUNTS = [1, 10, 100, 1_000]
ARMS = ["full", "head", "lora", "lora-r2"]


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)), help="how many runs of nothing at once")
    parser.add_argument("--seeds", type=int, default=6, help="seeds of the comparison; 0 leaves it out")
    parser.add_argument("--nothing", nargs=2, metavar=("COUNT", "ADDRESS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.nothing:
        print(json.dumps(_nothing(int(given.nothing[0]), given.nothing[1])))
        return
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")
    before = os.getloadavg()[0]
    with _cluster() as address:
        counts = [int(count) for count in given.counts.split(",")]
        nothing = [in_fresh_process(__file__, ["--nothing", str(count), address]) for count in counts]
        compared = _compared(address, given.seeds) if given.seeds else None
    result = {"runs_of_nothing": nothing, "comparison": compared, "nodes": 2, "load_before": round(before, 2)}
    result |= {"cpus": os.cpu_count(), "environment": _environment()}
    write_result(given, Path(__file__).with_suffix(".json"), result)


@contextlib.contextmanager
def _cluster() -> Iterator[str]:
    """A head that runs nothing and two nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    logging.getLogger("ray").setLevel(logging.CRITICAL)
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
        yield cluster.address
    finally:
        cluster.shutdown()


def _nothing(count: int, address: str) -> dict[str, Any]:
    """Submit runs that start no process, and wait for all of them. One more is run first: Ray starts its workers."""
    import psutil

    from peft_recipes.cluster.nodes import RayNodes
    from peft_recipes.cluster.pool import Pool
    from peft_recipes.cluster.work import Work

    me = psutil.Process()
    with tempfile.TemporaryDirectory() as folder, RayNodes(address) as nodes, Pool(nodes) as pool:
        base = Path(folder)

        def submit(names: list[str]) -> float:
            start = time.perf_counter()
            for name in names:
                pool.submit(Work(name, "", (), base, base / name))
            if (ended := len(list(filter(None, pool.finished())))) != len(names):
                raise SystemExit(f"{ended} of {len(names)} runs came back.")
            return time.perf_counter() - start

        first = submit([f"first {number}" for number in range(2)])
        before = me.memory_info().rss
        seconds = submit([f"run {number}" for number in range(count)])
        after = me.memory_info().rss
    return {
        "runs": count, "seconds": round(seconds, 4), "seconds_per_run": round(seconds / count, 5),
        "first_seconds": round(first, 3), "driver_bytes": after, "driver_grew_bytes": after - before,
    }  # fmt: skip


def _compared(address: str, seeds: int) -> dict[str, Any]:
    """Compare a tiny model on the cluster and on this machine; the figures and whether they are equal."""
    from peft_recipes import compare
    from peft_recipes.distributed.quiet import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(Path(folder))
        timed, found = {}, {}
        for name, options in {"ray": {"on": "ray", "address": address}, "local": {"jobs": 2}}.items():
            start = time.perf_counter()
            made = compare(recipe, ARMS, list(range(seeds)), output=Path(folder) / name, **options)
            timed[name] = round(time.perf_counter() - start, 1)
            keys = ("metric", "metrics", "seeds", "failures", "trainable_parameters")
            arms = {arm: {key: entry[key] for key in keys} for arm, entry in made.data["arms"].items()}
            found[name] = {"arms": arms, "differences": made.data["differences"], "base": made.data["base"]["metrics"]}
    equal = found["ray"] == found["local"]
    accuracies = {arm: entry["metric"]["mean"] for arm, entry in found["ray"]["arms"].items()}
    return {"runs": len(ARMS) * seeds, "equal_figures": equal, "seconds": timed, "accuracy": accuracies}


def _recipe(folder: Path) -> Any:
    import transformers
    from peft import LoraConfig
    from small import sentences, tiny_config, tokenizer

    from peft_recipes import Arm, Dataset, Recipe, targets

    words = tokenizer()
    transformers.set_seed(0)
    transformers.AutoModel.from_config(tiny_config("distilbert", len(words))).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    rows = [{"text": text, "label": label} for text, label in sentences(160)]
    (folder / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def lora(rank: int) -> LoraConfig:
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets("distilbert", "all-linear"))

    return Recipe(
        name="tiny", task="text-classification", model=str(folder / "model"),
        dataset=Dataset(str(folder / "reviews.jsonl"), train=96, validation=24, test=40), max_length=16,
        training={"num_train_epochs": 2, "per_device_train_batch_size": 16, "use_cpu": True, "bf16": False},
        arms={
            "full": Arm(learning_rate=5e-3), "head": Arm("head", learning_rate=1e-2),
            "lora": Arm(lora(4), learning_rate=2e-2), "lora-r2": Arm(lora(2), learning_rate=2e-2),
        },
    )  # fmt: skip


def _environment() -> dict[str, Any]:
    import ray

    from peft_recipes.hardware.device import choose
    from peft_recipes.hardware.environment import environment

    return {**environment(choose({"use_cpu": True, "bf16": False})), "ray": ray.__version__}


if __name__ == "__main__":
    main()
