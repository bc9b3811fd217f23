"""How fast one DPO step is: trl with its defaults, trl with its best flags, and this project, on the same pairs.

    python benchmarks/dpo_throughput.py --steps 12
    python benchmarks/dpo_throughput.py --data ultrafeedback --steps 12       # needs the Hub

Each of the three runs in a fresh process with the same model, LoRA, pairs, batch and number of steps. tokens/s come
from the step times after 3 warm-up steps, with the time that the reference's log-probabilities of those steps' pairs
took, where they are computed before (in trl's default they are computed in each step). A pair's tokens are those of its
two sequences, as trl counts them, however often they are computed. Memory is the process's peak during the steps; the
losses and gradient norms of each step show that nothing changed (of the two that see the pairs in the same order).
The last line of the output is one JSON document, which is also written to benchmarks/dpo_throughput/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ARMS = {
    "trl-default": "trl's DPOTrainer as it comes (gradient checkpointing on, the reference in each step), fp32",
    "trl-best": "trl without gradient checkpointing, batches grouped by length, the reference computed once",
    "peft-recipes": "each prompt once for both answers, the vocabulary head at the answers alone, the reference once",
}
WARMUP = 3


def main() -> None:
    given = _arguments()
    if given.one:
        print(json.dumps(_one(given)))
        return
    found = {}
    for arm in ARMS:
        found[arm] = _in_fresh_process(arm, given)
        speed, step = found[arm]["tokens_per_second"], found[arm]["median_step_seconds"]
        peak = found[arm]["peak_memory_bytes"] / 1e9
        print(f"{arm:13} {speed:9.1f} tokens/s   median step {step:7.3f} s   peak {peak:5.2f} GB", flush=True)
    summary = _summary(found)
    document = {**summary, "data": given.data, "batch": given.batch, "steps": given.steps, "means": ARMS,
                "arms": found, "environment": found["peft-recipes"].pop("environment")}  # fmt: skip
    name = f"{given.data}-smollm2-135m-batch{given.batch}-{document['environment']['device']}.json"
    path = Path(__file__).parent / "dpo_throughput" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(summary))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["embedded", "ultrafeedback"], default="embedded")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--one", choices=list(ARMS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.steps <= WARMUP:
        parser.error(f"--steps must be more than the {WARMUP} warm-up steps")
    return given


def _in_fresh_process(arm: str, given: argparse.Namespace) -> dict[str, Any]:
    words = ["--one", arm, "--data", given.data, "--steps", str(given.steps), "--batch", str(given.batch)]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _summary(found: dict[str, Any]) -> dict[str, float]:
    ours, default, best = found["peft-recipes"], found["trl-default"], found["trl-best"]
    gaps = [abs(a - b) for a, b in zip(ours["losses"], default["losses"], strict=True)]
    norms = [abs(a - b) for a, b in zip(ours["gradient_norms"], default["gradient_norms"], strict=True)]
    return {
        "ratio_to_trl_default": ours["tokens_per_second"] / default["tokens_per_second"],
        "ratio_to_trl_best": ours["tokens_per_second"] / best["tokens_per_second"],
        "memory_ratio_to_trl_default": ours["peak_memory_bytes"] / default["peak_memory_bytes"],
        "largest_loss_difference": max(gaps),
        "largest_gradient_norm_difference": max(norms),
    }


def _one(given: argparse.Namespace) -> dict[str, Any]:
    """One arm, in this process."""
    from peft_recipes.quiet import quiet_libraries

    quiet_libraries()
    import transformers
    from sft_throughput import _norms

    from peft_recipes import allocator, load_recipe
    from peft_recipes.arms import apply_arm, fit_targets
    from peft_recipes.hardware import choose, environment
    from peft_recipes.measuring import StepMeter
    from peft_recipes.tasks import task_of

    changes = [f"training.per_device_train_batch_size={given.batch}", f"training.max_steps={given.steps}",
               "training.train_sampling_strategy=sequential", "training.eval_strategy=no",
               f"dataset.train={given.batch * given.steps}", "dataset.validation=1", "dataset.test=1"]  # fmt: skip
    recipe = load_recipe("smollm2-dpo", embedded=given.data == "embedded", changes=changes)
    task = task_of(recipe)
    prepared = task.prepare()
    hardware = choose(recipe.training)
    meter, norms, tokens = StepMeter(hardware.device), [], []
    ours = given.one == "peft-recipes"
    if ours:
        allocator.set_for_training()
    # trl's arms load the base without asking it for the reference, which trl computes itself.
    model, _ = task.load_base(prepared) if ours else super(type(task), task).load_base(prepared)
    recipe, _ = fit_targets(recipe, model.config)
    with tempfile.TemporaryDirectory() as folder:
        if ours:
            arguments = task.arguments(recipe.arms["lora"], 0, hardware, Path(folder), True)
            transformers.set_seed(0)
            model, _ = apply_arm(model, recipe.arms["lora"], recipe.task, [])
            trainer = task.trainer(model, prepared, arguments, [meter, _norms(norms)])
            seconds_before = trainer.pass_figures["seconds"]
        else:
            trainer = _trl(given, model, recipe, prepared, hardware, folder, [meter, _norms(norms)])
            seconds_before = trainer.seconds_before
        trainer.data_collator = _counting(trainer.data_collator, tokens)
        trainer.train()
    timed, tokens = slice(WARMUP, None), tokens[: given.steps]  # the loader is a batch ahead
    before = seconds_before * sum(tokens[timed]) / sum(tokens)
    made = {
        "tokens_per_second": sum(tokens[timed]) / (sum(meter.steps[timed]) + before),
        "median_step_seconds": statistics.median(meter.steps[timed]),
        "step_seconds": meter.steps,
        "reference_seconds_before": seconds_before,
        "tokens": tokens,
        "peak_memory_bytes": meter.memory.peak,
        "losses": [loss for _, loss in meter.losses],
        "gradient_norms": norms,
    }
    if ours:
        made["computed_positions"] = [counts.computed for counts in trainer.step_counts()]
        made["batches"] = trainer.batches
        made["environment"] = environment(hardware)
    return made


def _trl(given: Any, model: Any, recipe: Any, prepared: Any, hardware: Any, folder: str, callbacks: list[Any]) -> Any:
    """trl's trainer on the same tokenised pairs, with its own collator, loss, reference and flags."""
    from trl import DPOConfig, DPOTrainer

    class Plain(DPOTrainer):
        """On rows that are tokenised already; tells what the reference's pass took."""

        seconds_before = 0.0

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *given: Any) -> Any:
            start = time.perf_counter()
            made = super()._precompute_ref_logps(*given)
            self.seconds_before += time.perf_counter() - start
            return made

    best = given.one == "trl-best"
    config = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=given.batch,
        max_steps=given.steps,
        learning_rate=recipe.arms["lora"].learning_rate,
        warmup_steps=recipe.training["warmup_steps"],
        beta=recipe.training["beta"],
        train_sampling_strategy="group_by_length" if best else "sequential",
        **({"gradient_checkpointing": False, "precompute_ref_log_probs": True} if best else {}),
        max_length=recipe.max_length,
        remove_unused_columns=False,  # the sampler groups by the column of lengths
        use_cpu=hardware.device == "cpu",
        bf16=hardware.precision == "bf16",
        dataloader_pin_memory=hardware.device == "cuda",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        data_seed=0,
    )
    # The adapter is put on by trl, from the same seed: so the reference is the base with the adapter off.
    adapter = recipe.arms["lora"].peft
    adapter.task_type = "CAUSAL_LM"
    return Plain(model=model, args=config, train_dataset=prepared.splits["train"], callbacks=callbacks,
                 processing_class=prepared.processor, peft_config=adapter)  # fmt: skip


def _counting(collate: Any, tokens: list[int]) -> Any:
    """A collator that writes down the tokens of each batch it makes."""

    def counted(pairs: list[dict[str, Any]]) -> Any:
        tokens.append(sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs))
        return collate(pairs)

    return counted


if __name__ == "__main__":
    main()
