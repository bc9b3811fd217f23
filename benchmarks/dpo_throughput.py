"""Speed of one DPO step: trl with its defaults, trl with its best flags, and this project, on the same pairs.

    python benchmarks/dpo_throughput.py --steps 12
    python benchmarks/dpo_throughput.py --data ultrafeedback --steps 12       # needs the Hub

Each of the three runs in a fresh process with the same model, LoRA, pairs, batch and number of steps. tokens/s come
from the step times after 3 warm-up steps, with the time that the reference's log-probabilities of those steps' pairs
took, where they are computed before (in trl's default they are computed in each step). A pair's tokens are those of its
two sequences, as trl counts them, however often they are computed. Memory is the process's peak during the steps; the
losses and gradient norms of each step show that nothing changed (of the two that see the pairs in the same order).
Prints the result as JSON, with every step of every arm; --keep writes a file in benchmarks/dpo_throughput/.
"""

from __future__ import annotations

import argparse
import json
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
    "trl-default": "trl's DPOTrainer with its defaults (gradient checkpointing on, the reference in each step), fp32",
    "trl-best": "trl without gradient checkpointing, batches grouped by length, the reference computed once",
    "peft-recipes": "each prompt once for both answers, the LM head at the answers alone, the reference once",
}


def main() -> None:
    given = _arguments()
    if given.one:
        print(json.dumps(measure(given)))
        return
    words = ["--data", given.data, "--steps", str(given.steps), "--batch", str(given.batch)]
    about = {"data": given.data, "batch": given.batch, "steps": given.steps}
    compare_arms(given, __file__, words, f"{given.data}-smollm2-135m-batch{given.batch}", MEANS, about)


def _arguments() -> argparse.Namespace:
    parser = result_parser(__doc__)
    parser.add_argument("--data", choices=["embedded", "ultrafeedback"], default="embedded")
    add_arguments(parser)
    given = parser.parse_args()
    check_steps(parser, given)
    return given


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Measure one way (`given.one`) to train in this process. recipe, where given: a recipe of the caller's."""
    from peft_recipes.distributed.quiet import quiet_libraries

    quiet_libraries()
    import transformers

    from peft_recipes import load_recipe
    from peft_recipes.arms.apply import apply_arm, fit_targets
    from peft_recipes.hardware.device import choose
    from peft_recipes.hardware.environment import environment
    from peft_recipes.kernels import allocator
    from peft_recipes.measuring.steps import StepMeter
    from peft_recipes.tasks.registry import task_of

    changes = [f"training.per_device_train_batch_size={given.batch}", f"training.max_steps={given.steps}",
               "training.train_sampling_strategy=sequential", "training.eval_strategy=no",
               f"dataset.train={given.batch * given.steps}", "dataset.validation=1", "dataset.test=1"]  # fmt: skip
    own = getattr(given, "recipe", None)
    recipe = load_recipe(own or "smollm2-dpo", embedded=not own and given.data == "embedded", changes=changes)
    task = task_of(recipe)
    prepared = task.prepare()
    hardware = choose(recipe.training)
    meter, norms, tokens = StepMeter(hardware.device), [], []
    ours = given.one == "peft-recipes"
    if ours:
        allocator.set_for_training()
    else:
        disable_speedups()
    # For trl the base is loaded without our reference log-probabilities, which trl computes itself.
    model, _ = task.load_base(prepared)
    if ours:
        task.use_base(model, prepared)
    recipe, _ = fit_targets(recipe, model.config)
    with tempfile.TemporaryDirectory() as folder:
        if ours:
            arguments = task.arguments(recipe.arms["lora"], 0, hardware, Path(folder), True)
            transformers.set_seed(0)
            model, _ = apply_arm(model, recipe.arms["lora"], recipe.task, [])
            trainer = task.trainer(model, prepared, arguments, [meter, norms_callback(norms)])
            seconds_before = trainer.pass_figures["seconds"]
        else:
            trainer = _trl(given, model, recipe, prepared, hardware, folder, [meter, norms_callback(norms)])
            seconds_before = trainer.seconds_before
        if not own:
            trainer.data_collator = _counting(trainer.data_collator, tokens)
        count_waiting(trainer, meter)
        trainer.train()
    if own:  # every way sees the pairs in their order
        each = prepared.splits["train"]["length"]
        tokens = [sum(each[i : i + given.batch]) for i in range(0, len(each), given.batch)]
    tokens = tokens[: given.steps]  # the loader is a batch ahead
    before = seconds_before * sum(tokens[WARMUP:]) / sum(tokens)
    made = {**step_figures(meter, norms, tokens, before), "reference_seconds_before": seconds_before}
    if ours:
        made["computed_positions"] = [int(counts.computed) for counts in trainer.step_counts()]
        made["batches"] = trainer.batches
        made["environment"] = environment(hardware)
    return made


def _trl(given: Any, model: Any, recipe: Any, prepared: Any, hardware: Any, folder: str, callbacks: list[Any]) -> Any:
    """trl's trainer on the same tokenised pairs, with its own collator, loss, reference and flags."""
    from trl import DPOConfig, DPOTrainer

    class Plain(DPOTrainer):
        """A DPOTrainer for tokenised pairs that measures the time of the reference's forward passes."""

        seconds_before = 0.0

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *given: Any) -> Any:
            start = time.perf_counter()
            result = super()._precompute_ref_logps(*given)
            self.seconds_before += time.perf_counter() - start
            return result

    options = trl_options(given, recipe, hardware, folder)
    if getattr(given, "recipe", None):
        options["train_sampling_strategy"] = "sequential"
        liger = hardware.device == "cuda" and given.one == "trl-best" and installed("liger_kernel")
        options |= {"use_liger_kernel": True} if liger else {}
    config = DPOConfig(
        **options,
        warmup_steps=recipe.training.get("warmup_steps", 0),
        beta=recipe.training.get("beta", 0.1),
        precompute_ref_log_probs=given.one == "trl-best",
        remove_unused_columns=False,  # the sampler groups by the column of lengths
    )
    # trl applies the adapter itself, from the same seed: its reference is then the base with the adapter disabled.
    adapter = recipe.arms["lora"].peft
    adapter.task_type = "CAUSAL_LM"
    return Plain(model=model, args=config, train_dataset=prepared.splits["train"], callbacks=callbacks,
                 processing_class=prepared.processor, peft_config=adapter)  # fmt: skip


def _counting(collate: Any, tokens: list[int]) -> Any:
    """Wrap a collator to record the tokens of each batch."""

    def counted(pairs: list[dict[str, Any]]) -> Any:
        tokens.append(sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs))
        return collate(pairs)

    return counted


if __name__ == "__main__":
    main()
