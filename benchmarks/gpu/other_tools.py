"""SFT steps of other toolkits, on the same model and rows. Both are written from their documentation and were not run.

A failure is a result of its step, as everywhere in on_gpu.py.
"""

from __future__ import annotations

import tempfile
from typing import Any

from harness import norms_callback, step_figures, trl_options
from sft_throughput import _arm, _recipe, _step_tokens


def unsloth(given: Any) -> dict[str, Any]:
    """Unsloth's model with its LoRA, trained by trl's trainer as its notebooks do."""
    from unsloth import FastLanguageModel  # before trl and transformers, which it patches

    import transformers  # isort: skip
    from trl import SFTConfig, SFTTrainer

    from peft_recipes.hardware.device import choose
    from peft_recipes.measuring.steps import StepMeter
    from peft_recipes.tasks.registry import task_of

    recipe = _recipe(given)
    prepared, hardware = task_of(recipe).prepare(), choose(recipe.training)
    rows = prepared.splits["train"].select(range(given.batch * given.steps))
    lora = _arm(given, recipe).peft
    transformers.set_seed(0)
    model, _ = FastLanguageModel.from_pretrained(recipe.model, max_seq_length=recipe.max_length, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=lora.r, lora_alpha=lora.lora_alpha, lora_dropout=0,
                                             target_modules=sorted(lora.target_modules))  # fmt: skip
    meter, norms = StepMeter(hardware.device), []
    with tempfile.TemporaryDirectory() as folder:
        options = trl_options(given, recipe, hardware, folder)
        options["train_sampling_strategy"] = "sequential"
        trainer = SFTTrainer(
            model=model, args=SFTConfig(**options, dataset_kwargs={"skip_prepare_dataset": True}), train_dataset=rows,
            processing_class=prepared.processor, callbacks=[meter, norms_callback(norms)],
        )  # fmt: skip
        trainer.train()
    return step_figures(meter, norms, _step_tokens(rows, given.batch)[0])


def llama_factory(given: Any) -> dict[str, Any]:
    """LLaMA-Factory's own trainer, through the function that its command line calls."""
    import json
    import statistics
    from pathlib import Path

    from llamafactory.train.tuner import run_exp

    from peft_recipes.measuring.memory import PeakMemory

    recipe = _recipe(given)
    lora = _arm(given, recipe).peft
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text(Path(recipe.dataset.path).read_text())
        columns = {"prompt": "prompt", "response": "completion"}
        info = {"rows": {"file_name": data.name, "columns": columns}}
        (Path(folder) / "dataset_info.json").write_text(json.dumps(info))
        memory = PeakMemory("cuda" if given.bf16 else "cpu")
        memory.reset()
        run_exp({
            "model_name_or_path": recipe.model, "stage": "sft", "do_train": True, "finetuning_type": "lora",
            "lora_rank": lora.r, "lora_alpha": lora.lora_alpha, "lora_target": "all", "dataset": "rows",
            "dataset_dir": folder, "template": "empty", "cutoff_len": recipe.max_length, "output_dir": f"{folder}/out",
            "per_device_train_batch_size": given.batch, "max_steps": given.steps, "logging_steps": 1,
            "bf16": given.bf16, "save_strategy": "no", "report_to": "none", "include_num_input_tokens_seen": True,
        })  # fmt: skip
        logged = [json.loads(line) for line in (Path(folder) / "out" / "trainer_log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    return {"losses": losses, "peak_memory_bytes": memory.read(), "log": logged[-3:],
            "tokens_per_second": next((e["throughput"] for e in reversed(logged) if "throughput" in e), None),
            "median_loss": statistics.median(losses)}  # fmt: skip
