"""Kill runs at random moments (SIGKILL), resume them, and compare them with undisturbed runs.

    python benchmarks/fault_injection.py --kills 20

LoRA and full fine-tuning, SFT and classification, on small random models. Each trial starts a run in a process of its
own, kills it after a random share of the duration of an undisturbed one (start-up, steps, evaluation, saving, writing
results), starts it again and lets it finish; every other round of trials kills twice. A trial passes if losses, test
predictions, figures (except times) and final weights (to 1e-6) equal those of the undisturbed run and no files are left
behind. Prints the result as JSON; --keep writes benchmarks/fault_injection.json. Exit code 1 if a trial fails.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from harness import result_parser, write_result

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))  # for its small models and data

CASES = [(task, arm) for task in ("classification", "sft") for arm in ("lora", "full")]


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="number of trials, spread over the four cases")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw, trials = random.Random(given.seed), []
    with tempfile.TemporaryDirectory() as folder:
        recipes = _recipes(Path(folder))
        for number in range(given.kills):
            task, arm = CASES[number % len(CASES)]
            reference = _undisturbed(recipes[task], arm, Path(folder) / "whole")
            moments = sorted(draw.random() for _ in range(1 + number // len(CASES) % 2))
            trials.append(_trial(recipes[task], arm, reference, moments, Path(folder) / f"trial-{number}"))
            print(f"{number + 1:3} {task:14} {arm:5} {trials[-1]}", flush=True)
    held = sum(trial["differences"] == [] for trial in trials)
    document = {"tried": len(trials), "held": held, "killed_in": Counter(s for t in trials for s in t["killed_in"]),
                "trials": trials}  # fmt: skip
    summary = {key: document[key] for key in ("tried", "held", "killed_in")}
    write_result(given, Path(__file__).with_suffix(".json"), document, summary)
    raise SystemExit(0 if held == len(trials) else 1)


def _recipes(folder: Path) -> dict[str, Path]:
    """Write the recipes' YAML files, with their models and data."""
    import small
    import transformers
    from peft import LoraConfig

    from peft_recipes import Arm, Dataset, Recipe, targets

    reviews, questions = folder / "reviews.jsonl", folder / "questions.jsonl"
    reviews.write_text("".join(json.dumps({"text": t, "label": k}) + "\n" for t, k in small.sentences(240)))
    rows = [{"prompt": f"say {t.split()[0]} in a film", "completion": t} for t, _ in small.sentences(120, 3)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {}
    for task, kind, data in (("classification", "distilbert", reviews), ("sft", "llama", questions)):
        words = small.tokenizer(chat=kind == "llama")
        transformers.set_seed(0)
        auto = transformers.AutoModel if kind == "distilbert" else transformers.AutoModelForCausalLM
        auto.from_config(small.tiny_config(kind, len(words))).save_pretrained(folder / kind)
        words.save_pretrained(folder / kind)
        lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=targets(kind, "attention"))
        recipe = Recipe(
            name=task,
            task="text-classification" if task == "classification" else "sft",
            model=str(folder / kind),
            dataset=Dataset(str(data), validation=0.1, test=0.2),
            max_length=32,
            training={"num_train_epochs": 8, "per_device_train_batch_size": 4, "use_cpu": True},
            arms={"full": Arm(learning_rate=1e-3), "lora": Arm(lora, learning_rate=1e-2)},
            checkpoint_seconds=0.3,
        )
        made[task] = folder / f"{task}.yaml"
        recipe.to_yaml(made[task])
    return made


def _start(recipe: Path, arm: str, output: Path) -> subprocess.Popen[bytes]:
    output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "peft_recipes.comparison.worker", str(recipe), arm, "0", str(output)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _folder(recipe: Path, arm: str, output: Path) -> Path:
    return output / recipe.stem / arm / "seed-0"


def _undisturbed(recipe: Path, arm: str, output: Path) -> tuple[Path, float]:
    """The folder and seconds of an undisturbed run; made once per case, and timed after a warm-up run."""
    folder, note = _folder(recipe, arm, output), output / f"{recipe.stem}-{arm}.seconds"
    if not note.is_file():
        for folder_of_run in (output.with_name("warm-up") / arm, output):
            start = time.perf_counter()
            process = _start(recipe, arm, folder_of_run)
            _, stderr = process.communicate()
            if process.returncode:
                raise SystemExit(stderr.decode()[-2000:])
        note.write_text(str(time.perf_counter() - start))
    return folder, float(note.read_text())


def _trial(
    recipe: Path, arm: str, undisturbed: tuple[Path, float], moments: list[float], output: Path
) -> dict[str, Any]:
    reference, seconds = undisturbed
    folder, killed_in = _folder(recipe, arm, output), []
    for moment in moments:
        process = _start(recipe, arm, output)
        time.sleep(moment * seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_in.append(_stage(folder) if process.returncode == -signal.SIGKILL else "done already")
    process = _start(recipe, arm, output)
    _, stderr = process.communicate()
    differences = [stderr.decode()[-300:]] if process.returncode else _differences(reference, folder)
    resumed = (
        [] if process.returncode else json.loads((folder / "run.json").read_text())["training"]["resumed_at_steps"]
    )
    shutil.rmtree(output)
    return {"moments": [round(m, 3) for m in moments], "killed_in": killed_in, "resumed_at_steps": resumed,
            "differences": differences}  # fmt: skip


def _stage(folder: Path) -> str:
    """The stage at which a run was killed, from its log."""
    try:
        last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return "start-up"
    return last.get("stage", "steps")


def _differences(one: Path, two: Path) -> list[str]:
    """The differences between two runs' folders, except times."""
    import pandas
    from safetensors.torch import load_file

    a, b = (json.loads((folder / "run.json").read_text()) for folder in (one, two))
    same = ("metrics", "per_class", "parameters", "checkpoint_bytes", "answers", "notes")
    differing = [f"run.json: {key}" for key in same if a[key] != b[key]]
    differing += [f"training: {key}" for key in ("steps", "losses", "tokens", "computed_tokens", "examples", "batches")
              if a["training"][key] != b["training"][key]]  # fmt: skip
    if not pandas.read_parquet(one / "predictions.parquet").equals(pandas.read_parquet(two / "predictions.parquet")):
        differing.append("predictions")
    if left := {p.name for p in two.iterdir()} ^ {p.name for p in one.iterdir()}:
        differing.append(f"files: {sorted(left)}")
    for path in one.glob("*.safetensors"):
        first, second = load_file(path), load_file(two / path.name)
        gap = max(float((first[name] - second[name]).abs().max()) for name in first)
        if gap > 1e-6:
            differing.append(f"{path.name}: weights differ by {gap:.1e}")
    return differing


if __name__ == "__main__":
    main()
