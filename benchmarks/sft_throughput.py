"""Speed of one SFT step: trl with its defaults, trl with its best flags, and this project, on the same rows.

    python benchmarks/sft_throughput.py --data embedded --steps 12
    python benchmarks/sft_throughput.py --data alpaca --steps 12       # needs the Hub

Each of the three runs in a fresh process with the same model, LoRA, rows, batch and number of steps. tokens/s come
from the step times after 3 warm-up steps; memory is the process's peak during the steps; losses and gradient norms of
each step show that nothing changed (of the two that see the rows in the same order). The limit is the time that the
needed matrix products alone would take at the measured GEMM rate. Prints the result as JSON, with every step of every
arm; --keep writes a file in benchmarks/sft_throughput/.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import (
    WARMUP,
    add_arguments,
    check_steps,
    compare_arms,
    count_waiting,
    disable_speedups,
    installed,
    norms_callback,
    result_parser,
    step_figures,
    trl_options,
)

MEANS = {
    "trl-default": "trl's SFTTrainer with its defaults (gradient checkpointing on), fp32",
    "trl-best": "trl without gradient checkpointing, batches grouped by length (its packing is not exact here)",
    "peft-recipes": "prefix-shared packing, the LM head at labelled positions alone",
}  # fmt: skip


def main() -> None:
    given = _arguments()
    if given.one:
        print(json.dumps(measure(given)))
        return
    words = ["--data", given.data, "--model", given.model, "--steps", str(given.steps), "--batch", str(given.batch)]
    options = (("--bf16", given.bf16), ("--compile", given.compile), ("--random-weights", given.random_weights))
    words += [flag for flag, on in options if on]
    about = {"data": given.data, "model": given.model, "batch": given.batch, "steps": given.steps}
    kind = f"{given.data}-{given.model}-batch{given.batch}{'-compiled' if given.compile else ''}"

    def limit(ours: dict[str, Any]) -> dict[str, float]:
        return {"fraction_of_limit": ours["tokens_per_second"] / ours["limit_tokens_per_second"]}

    compare_arms(given, __file__, words, kind, MEANS, about, limit)


def _arguments() -> argparse.Namespace:
    parser = result_parser(__doc__)
    parser.add_argument("--data", choices=["alpaca", "embedded"], default="embedded")
    parser.add_argument("--model", choices=["smollm2-135m", "gpt2"], default="smollm2-135m")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16 (on a GPU)")
    parser.add_argument("--compile", action="store_true", help="use torch.compile in this project's arm")
    parser.add_argument("--random-weights", action="store_true", help="use random weights; the speed is the same")
    add_arguments(parser)
    parser.set_defaults(batch=None)
    given = parser.parse_args()
    # trl with its best flags takes 7 GB for 8 rows of Alpaca, 10 GB for 16 of the shorter embedded questions.
    given.batch = given.batch or (8 if given.data == "alpaca" else 16)
    check_steps(parser, given)
    return given


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Measure one way (`given.one`) to train in this process.

    recipe and arm, where they are given: a recipe of the caller's, and its arm, in place of smollm2-alpaca's LoRA; then
    the ways are `trl-packed` too, and each sees the same examples in each step.
    """
    from peft_recipes.distributed.quiet import quiet_libraries

    quiet_libraries()
    import transformers

    from peft_recipes.hardware.device import choose
    from peft_recipes.hardware.environment import environment
    from peft_recipes.kernels import activations, allocator, lora_linear, onednn_linear
    from peft_recipes.measuring.steps import StepMeter
    from peft_recipes.tasks.registry import task_of

    recipe = _recipe(given)
    task = task_of(recipe)
    prepared = task.prepare()
    rows = prepared.splits["train"].select(range(min(given.batch * given.steps, len(prepared.splits["train"]))))
    prepared.splits["train"] = rows
    ours, own = given.one == "peft-recipes", bool(getattr(given, "recipe", None))
    if not ours:
        disable_speedups()
    transformers.set_seed(0)
    model, arm = _model(given, task, prepared), _arm(given, recipe)
    hardware = choose(recipe.training)
    body, head = _matrix_parameters(model)
    meter, norms = StepMeter(hardware.device), []
    tokens, labelled = _step_tokens(rows, given.batch)
    with tempfile.TemporaryDirectory() as folder:
        if ours:
            allocator.set_for_training()
            activations.fuse(model)
            onednn_linear.speed_up(model)
            arguments = task.arguments(arm, 0, hardware, Path(folder), True)
            from peft_recipes.arms.apply import apply_arm, fit_targets

            recipe, _ = fit_targets(recipe, model.config)
            transformers.set_seed(0)
            model, _ = apply_arm(model, _arm(given, recipe), recipe.task, [])
            if getattr(given, "one_operation", False):
                lora_linear.speed_up(model, everywhere=True)
            trainer = task.trainer(model, prepared, arguments, [meter, norms_callback(norms)])
        else:
            trainer = _trl(given, model, recipe, prepared, hardware, folder, [meter, norms_callback(norms)])
            if given.one == "trl-packed":
                tokens, labelled = _step_tokens(trainer.train_dataset, trainer.args.per_device_train_batch_size)
            elif not own and given.one == "trl-best":  # it orders the rows by length
                trainer.data_collator = _counting(trainer.data_collator, tokens := [], labelled := [])
        count_waiting(trainer, meter)
        trainer.train()
    tokens, labelled = tokens[: len(meter.steps)], labelled[: len(meter.steps)]  # the loader is a batch ahead
    timed, made = slice(WARMUP, None), step_figures(meter, norms, tokens)
    made["matrix_operations"] = (6 if arm.method == "full" else 4) * (
        body * sum(tokens[timed]) + head * sum(labelled[timed])
    )
    made["seconds"] = sum(meter.steps[timed])
    if ours:
        computed = [int(counts.computed) for counts in trainer.step_counts()[timed]]
        made["batches"], made["warmup_seconds"] = trainer.batches, meter.steps[:WARMUP]
        made["packed_attention"] = getattr(trainer, "packed_attention", None)
        if not own:
            made |= _limit(model, hardware, (body, head), computed, sum(labelled[timed]), sum(tokens[timed]), given)
        made["environment"] = environment(hardware)
    return made


def _arm(given: argparse.Namespace, recipe: Any) -> Any:
    return recipe.arms[getattr(given, "arm", None) or "lora"]


def _step_tokens(rows: Any, batch: int) -> tuple[list[int], list[int]]:
    """(tokens, labelled tokens) of each step of `batch` rows, in their order. A row's first token is not predicted."""
    tokens = [len(ids) for ids in rows["input_ids"]]
    labelled = [sum(label != -100 for label in labels[1:]) for labels in rows["labels"]]
    starts = range(0, len(tokens), batch)
    return [sum(tokens[i : i + batch]) for i in starts], [sum(labelled[i : i + batch]) for i in starts]


def _matrix_parameters(model: Any) -> tuple[int, int]:
    """(weights of the matrix products outside the LM head, weights of the LM head), also of a quantised model."""
    import torch
    from gpu.workspace import matrix_parameters
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        return matrix_parameters(AutoModelForCausalLM.from_config(config))


def _recipe(given: argparse.Namespace) -> Any:
    from peft_recipes import load_recipe

    if getattr(given, "recipe", None):
        return load_recipe(given.recipe, changes=[
            f"training.per_device_train_batch_size={given.batch}", f"training.max_steps={given.steps}",
            "training.train_sampling_strategy=sequential", "training.eval_strategy=no",
            f"dataset.train={given.batch * given.steps}", *getattr(given, "changes", ()),
        ])  # fmt: skip
    changes = [
        f"training.per_device_train_batch_size={given.batch}",
        f"training.max_steps={given.steps}",
        "training.train_sampling_strategy=sequential",
        "training.eval_strategy=no",
        f"dataset.train={max(given.batch * given.steps, 8)}",
        "max_length=256",
        *(["training.bf16=true"] if given.bf16 else []),
        *(["training.torch_compile=true"] if given.compile and given.one == "peft-recipes" else []),
    ]
    if given.model == "gpt2":
        changes.append("model=embedded:gpt2-docstrings")  # its tokenizer; the weights are made below
    return load_recipe("smollm2-alpaca", embedded=given.data == "embedded", changes=changes)


def _model(given: argparse.Namespace, task: Any, prepared: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    if getattr(given, "recipe", None):
        return task.load_base(prepared, _arm(given, task.recipe).quantise)[0]
    if given.model == "gpt2":  # GPT-2 small's shape, with this tokenizer's vocabulary
        words = max(50_257, len(prepared.processor))
        # Without its dropout, whose draws would hide whether the losses are the same.
        config = GPT2Config(vocab_size=words, pad_token_id=prepared.processor.pad_token_id,
                            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if given.random_weights:
        from peft_recipes.models.bases import load_config

        return AutoModelForCausalLM.from_config(load_config(task.recipe), dtype=torch.float32)
    return task.load_base(prepared)[0]


def _trl(given: Any, model: Any, recipe: Any, prepared: Any, hardware: Any, folder: str, callbacks: list[Any]) -> Any:
    """trl's trainer on the same tokenised rows, with its own collator, loss and flags."""
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from peft_recipes.arms.apply import apply_arm, fit_targets

    recipe, _ = fit_targets(recipe, model.config)
    arm, rows = _arm(given, recipe), prepared.splits["train"]
    options = trl_options(given, recipe, hardware, folder, arm)
    if getattr(given, "recipe", None) and given.one != "trl-default":
        rows, more = _best_on_gpu(given, model, arm, rows, hardware)
        options |= more
    config = SFTConfig(**options, dataset_kwargs={"skip_prepare_dataset": True})
    # The adapter is applied here, with the seed of our arm: SFTTrainer draws random numbers before it applies one.
    set_seed(0)
    model, _ = apply_arm(model, arm, recipe.task, [])
    return SFTTrainer(model=model, args=config, train_dataset=rows, callbacks=callbacks,
                      processing_class=prepared.processor)  # fmt: skip


def _best_on_gpu(given: Any, model: Any, arm: Any, rows: Any, hardware: Any) -> tuple[Any, dict[str, Any]]:
    """trl's best flags on a GPU: the rows (packed for `trl-packed`) and the options, which see the same examples.

    Without padding, without gradient checkpointing; with flash attention and liger's kernels where they are installed;
    a frozen base in bf16. `trl-packed`: as many rows of the longest length as a batch has tokens.
    """
    import torch

    options = {"padding_free": True, "max_length": None, "train_sampling_strategy": "sequential",
               "use_liger_kernel": hardware.device == "cuda" and installed("liger_kernel")}  # fmt: skip
    if hardware.device == "cuda":
        if installed("flash_attn"):
            model.set_attn_implementation("flash_attention_2")
        if arm.peft is not None and arm.quantise is None and hardware.precision == "bf16":
            model.to(torch.bfloat16)
    if given.one == "trl-packed":
        from trl import pack_dataset

        longest, tokens = given.pack_to, sum(map(len, rows["input_ids"])) / given.steps
        options |= {"packing": True, "max_length": longest}
        options["per_device_train_batch_size"] = max(round(tokens / longest), 1)
        rows = pack_dataset(rows.select_columns(["input_ids", "labels"]), longest, "bfd")
        options["max_steps"] = max(len(rows) // options["per_device_train_batch_size"], 1)
    return rows, options


def _counting(collate: Any, tokens: list[int], labelled: list[int]) -> Any:
    """Wrap a collator to record the tokens and the labels of each batch."""

    def counted(rows: list[dict[str, Any]]) -> Any:
        tokens.append(sum(len(row["input_ids"]) for row in rows))
        labelled.append(sum(label != -100 for row in rows for label in row["labels"][1:]))
        return collate(rows)

    return counted


def _limit(
    model: Any, hardware: Any, parameters: tuple[int, int], computed: list[int], labelled: int, tokens: int, given: Any
) -> dict[str, Any]:
    """Tokens/s if only the needed matrix products took time, at the measured GEMM rate.

    A frozen layer takes 2 operations per weight and position forward and 2 backward (no gradient of its weight); the LM
    head the same at labelled positions. Attention is not counted, so the limit can't quite be reached.
    """
    body, head = parameters
    hidden, positions = model.config.hidden_size, max(int(statistics.median(computed)), 64)
    operations = 4 * (body * sum(computed) + head * labelled)
    rate = _gemm_rate(hardware, hidden, positions, given.bf16, given.compile)
    return {
        "gemm_flops_per_second": rate,
        "needed_operations": operations,
        "computed_positions": sum(computed),
        "limit_tokens_per_second": tokens / (operations / rate),
    }


def _gemm_rate(hardware: Any, hidden: int, positions: int, bf16: bool, compiled: bool) -> float:
    """Operations per second of our arm's product [positions, hidden] x [hidden, 4 hidden], the best of 30 tries."""
    import torch

    from peft_recipes.hardware.device import synchronise
    from peft_recipes.kernels import onednn_linear

    ours = onednn_linear.pays() and hardware.device == "cpu" and not compiled
    product = onednn_linear.linear if ours else torch.nn.functional.linear
    kind = torch.bfloat16 if bf16 else torch.float32
    a = torch.randn(positions, hidden, device=hardware.device, dtype=kind)
    b = torch.randn(4 * hidden, hidden, device=hardware.device, dtype=kind)
    best = float("inf")
    for _ in range(30):
        synchronise(hardware.device)
        start = time.perf_counter()
        for _ in range(10):
            product(a, b, None)
        synchronise(hardware.device)
        best = min(best, (time.perf_counter() - start) / 10)
    return 2 * positions * hidden * 4 * hidden / best


if __name__ == "__main__":
    main()
