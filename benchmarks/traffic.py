"""Bytes that a training step sends with two and four ranks over gloo, compared with planning/scaling.py's formulas.

    python benchmarks/traffic.py

Launches itself under Accelerate, and reads from the kernel (TCP_INFO) what each rank's sockets sent in each step.
Nothing is timed. Prints the result as JSON; --keep writes benchmarks/traffic/traffic.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import result_parser, write_result

HERE = Path(__file__).parent
STEPS = 6
_SENT = 200  # offset of bytes_sent in tcp_info, followed by bytes_retrans (Linux 4.19)


def sent_bytes() -> int:
    """Bytes sent by this process's TCP connections, without retransmissions."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.type != socket.SOCK_STREAM or connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                sent, twice = struct.unpack_from("<QQ", info, _SENT)
                total += sent - twice
        except OSError:
            continue  # closed in the meantime
    return total


def factors() -> dict[str, float]:
    """For each collective, the bytes that a rank sends per byte of the gathered tensor."""
    import torch
    import torch.distributed as dist

    n, size = dist.get_world_size(), 2**20
    whole, part = torch.ones(size), torch.ones(size // n)
    calls = {
        "all-reduce": lambda: dist.all_reduce(whole),
        "all-gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, whole),
    }
    sent_per_byte = {}
    for name, call in calls.items():
        call()
        dist.barrier()
        before = sent_bytes()
        for _ in range(4):
            call()
        sent_per_byte[name] = (sent_bytes() - before) / (4 * whole.numel() * 4)
        dist.barrier()
    return sent_per_byte


def in_process(folder: Path, kind: str) -> None:
    """Train each arm; rank 0 writes what each rank sent per step, without the first steps."""
    from dataclasses import asdict

    from peft_recipes import train
    from peft_recipes.arms.meta import with_arm_on_meta
    from peft_recipes.distributed import processes
    from peft_recipes.distributed.quiet import quiet_libraries
    from peft_recipes.models import bases
    from peft_recipes.planning import scaling
    from peft_recipes.runs.folder import resolved_recipe
    from peft_recipes.training import stages

    quiet_libraries()
    recipe, rows = resolved_recipe(folder / "recipe.yaml"), {}
    log_step, seen = stages.log_step, []

    def logged(*step: object) -> None:
        log_step(*step)
        seen.append(sent_bytes())

    stages.log_step = logged
    for arm in recipe.arms:
        seen.clear()
        train(recipe, arm, output=folder / f"{kind}-{processes.count()}")
        mine = [after - before for before, after in itertools.pairwise(seen)]
        each = processes.all_gather(round(statistics.median(mine[1:])))
        model, _ = with_arm_on_meta(recipe, bases.load_config(recipe), recipe.arms[arm], arm)
        weights, learning = (
            sum(p.numel() * 4 for p in model.parameters() if p.requires_grad or everything) for everything in (1, 0)
        )
        step = {"weights": weights, "gradients": learning, "optimizer": 2 * learning, "activations": 0}
        sizes = scaling.model_sizes(model, step)
        rows[arm] = {
            "sent": each,
            "formula": scaling.traffic(sizes, processes.distributed_type(), processes.count()),
            "sizes": asdict(sizes),
        }
    measured = factors()
    if processes.is_rank_zero():
        made = {"kind": processes.distributed_type(), "processes": processes.count(), "arms": rows, "gloo": measured}
        (folder / f"{kind}-{processes.count()}.json").write_text(json.dumps(made))


def recipe_in(folder: Path) -> None:
    """Make a Llama of 5 million weights, a tokenizer and training examples."""
    import transformers
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers

    from peft_recipes import Arm, Dataset, Recipe, targets

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(509))]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i % 7}"} for i in range(200)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lora = LoraConfig(r=16, target_modules=targets("llama", "all-linear"))
    Recipe(
        name="traffic", task="sft", model=str(folder / "base"), max_length=16,
        dataset=Dataset(str(folder / "rows.jsonl"), train=100, validation=8, test=8),
        training={"max_steps": STEPS, "per_device_train_batch_size": 8, "use_cpu": True, "eval_strategy": "no",
                  "bf16": False},
        arms={"full": Arm(learning_rate=1e-4), "lora": Arm(lora, learning_rate=1e-3)},
    ).to_yaml(folder / "recipe.yaml")  # fmt: skip


def main() -> None:
    """Launch all cases one after another."""
    parser = result_parser(__doc__)
    parser.add_argument("--one", nargs=2, metavar=("DIR", "KIND"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        in_process(Path(given.one[0]), given.one[1])
        return
    from importlib.metadata import version

    from peft_recipes.distributed.launch import read_launch

    made = []
    with tempfile.TemporaryDirectory(prefix="traffic-") as temporary:
        folder = Path(temporary)
        recipe_in(folder)
        for processes in (2, 4):
            for kind in ("ddp", "fsdp2"):
                command = read_launch(kind, processes).command("unused")
                command[-2:] = [__file__, "--one", temporary, kind]
                subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                made.append(json.loads((folder / f"{kind}-{processes}.json").read_text()))
                print(json.dumps(made[-1]), file=sys.stderr)
    result = {"versions": {name: version(name) for name in ("torch", "accelerate", "peft")}, "runs": made}
    write_result(given, HERE / "traffic" / "traffic.json", result)


if __name__ == "__main__":
    main()
