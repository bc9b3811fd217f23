"""Runs killed at random moments (SIGKILL), called again until they are done, and held against runs that were not.

    python benchmarks/fault_injection.py --kills 20

lora and full, sft and classification, on small random models made here. Each trial starts a run in a process of its
own, kills it after a random share of the time that an undisturbed one takes (start-up, steps, evaluation, saving, the
writing of results), calls it again and lets it end; every other trial is killed twice. It holds where losses, test
predictions, figures (times aside) and final weights (to 1e-6) are those of the undisturbed run and nothing is left
behind. The last line is one JSON document, also written to benchmarks/fault_injection.json.
"""

from __future__ import annotations

import argparse
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))  # small models and data are made there

CASES = [(task, arm) for task in ("classification", "sft") for arm in ("lora", "full")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="trials in all, shared among the four cases")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw, trials = random.Random(given.seed), []
    with tempfile.TemporaryDirectory() as folder:
        recipes = _recipes(Path(folder))
        for number in range(given.kills):
            task, arm = CASES[number % len(CASES)]
            whole = _undisturbed(recipes[task], arm, Path(folder) / "whole")
            moments = sorted(draw.random() for _ in range(1 + number // len(CASES) % 2))
            trials.append(_trial(recipes[task], arm, whole, moments, Path(folder) / f"trial-{number}"))
            print(f"{number + 1:3} {task:14} {arm:5} {trials[-1]}", flush=True)
    held = sum(trial["differences"] == [] for trial in trials)
    document = {"tried": len(trials), "held": held, "killed_in": Counter(s for t in trials for s in t["killed_in"]),
                "trials": trials}  # fmt: skip
    (ROOT / "benchmarks" / "fault_injection.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({key: document[key] for key in ("tried", "held", "killed_in")}))
    raise SystemExit(0 if held == len(trials) else 1)


def _recipes(folder: Path) -> dict[str, Path]:
    """The recipes' YAML files, their models and data beside them."""
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
    """The run that nobody kills, and its seconds; done once a case, and timed once the machine's caches are warm."""
    folder, note = _folder(recipe, arm, output), output / f"{recipe.stem}-{arm}.seconds"
    if not note.is_file():
        for place in (output.with_name("warm-up") / arm, output):
            start = time.perf_counter()
            process = _start(recipe, arm, place)
            _, said = process.communicate()
            if process.returncode:
                raise SystemExit(said.decode()[-2000:])
        note.write_text(str(time.perf_counter() - start))
    return folder, float(note.read_text())


def _trial(recipe: Path, arm: str, whole: tuple[Path, float], moments: list[float], output: Path) -> dict[str, Any]:
    reference, seconds = whole
    folder, killed_in = _folder(recipe, arm, output), []
    for moment in moments:
        process = _start(recipe, arm, output)
        time.sleep(moment * seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_in.append(_stage(folder) if process.returncode == -signal.SIGKILL else "done already")
    process = _start(recipe, arm, output)
    _, said = process.communicate()
    differences = [said.decode()[-300:]] if process.returncode else _differences(reference, folder)
    resumed = (
        [] if process.returncode else json.loads((folder / "run.json").read_text())["training"]["resumed_at_steps"]
    )
    shutil.rmtree(output)
    return {"moments": [round(m, 3) for m in moments], "killed_in": killed_in, "resumed_at_steps": resumed,
            "differences": differences}  # fmt: skip


def _stage(folder: Path) -> str:
    """What a killed run was at, by its log."""
    try:
        last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return "start-up"
    return last.get("stage", "steps")


def _differences(one: Path, two: Path) -> list[str]:
    """What differs between two runs' folders, times aside."""
    import pandas
    from safetensors.torch import load_file

    a, b = (json.loads((folder / "run.json").read_text()) for folder in (one, two))
    same = ("metrics", "per_class", "parameters", "checkpoint_bytes", "answers", "notes")
    found = [f"run.json: {key}" for key in same
             if a[key] != b[key]]  # fmt: skip
    found += [f"training: {key}" for key in ("steps", "losses", "tokens", "computed_tokens", "examples", "batches")
              if a["training"][key] != b["training"][key]]  # fmt: skip
    if not pandas.read_parquet(one / "predictions.parquet").equals(pandas.read_parquet(two / "predictions.parquet")):
        found.append("predictions")
    if left := {p.name for p in two.iterdir()} ^ {p.name for p in one.iterdir()}:
        found.append(f"files: {sorted(left)}")
    for path in one.glob("*.safetensors"):
        first, second = load_file(path), load_file(two / path.name)
        gap = max(float((first[name] - second[name]).abs().max()) for name in first)
        if gap > 1e-6:
            found.append(f"{path.name}: weights differ by {gap:.1e}")
    return found


if __name__ == "__main__":
    main()
