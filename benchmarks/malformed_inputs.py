"""Malformed recipes, datasets and adapters given to the command line, and how many were answered as they should be.

    python benchmarks/malformed_inputs.py

Rightly answered: the exit code of the case, one message that holds the words that say where, no traceback, no file
written or lost. The cases are those of tests/malformed.py. The last line is one JSON document, also written to
benchmarks/malformed_inputs.json.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))


def main() -> None:
    from malformed import CASES

    tried, wrong = Counter(case.kind for case in CASES), []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        there = _sound_inputs(root / "there")
        for number, case in enumerate(CASES):
            if not _answered(case, root / str(number), there):
                wrong.append(f"{case.kind}: {case.name}")
                print("WRONG", wrong[-1], flush=True)
    document = {"tried": dict(tried), "total": len(CASES), "answered": len(CASES) - len(wrong), "wrong": wrong}
    (ROOT / "benchmarks" / "malformed_inputs.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    raise SystemExit(1 if wrong else 0)


def _answered(case, folder: Path, there: dict[str, Path]) -> bool:
    from typer.testing import CliRunner

    from peft_recipes.cli.app import app

    (folder / "work").mkdir(parents=True)
    (folder / "given").mkdir()
    os.chdir(folder / "work")
    words = case.make(folder / "given", there)
    before = sorted(folder.rglob("*"))
    shown = CliRunner().invoke(app, words)
    text = " ".join((shown.stdout + shown.stderr).split())
    right = shown.exit_code == case.code and case.message in text and "Traceback" not in text
    return right and sorted(folder.rglob("*")) == before


def _sound_inputs(root: Path) -> dict[str, Path]:
    """A sound recipe, a sound adapter and another base, small and random, made here."""
    import small
    import transformers
    from peft import LoraConfig

    from peft_recipes import Arm, Dataset, Recipe, targets, train

    root.mkdir()
    data = root / "reviews.jsonl"
    data.write_text("".join(json.dumps({"text": t, "label": k}) + "\n" for t, k in small.sentences(160)))
    for kind, auto in (("distilbert", transformers.AutoModel), ("gpt2", transformers.AutoModelForCausalLM)):
        words = small.tokenizer()
        auto.from_config(small.tiny_config(kind, len(words))).save_pretrained(root / kind)
        words.save_pretrained(root / kind)
    lora = LoraConfig(r=4, target_modules=targets("distilbert", "attention"))
    recipe = Recipe(name="tiny", task="text-classification", model=str(root / "distilbert"), max_length=16,
                    dataset=Dataset(str(data), train=0.6, validation=0.2, test=0.2),
                    training={"max_steps": 4, "use_cpu": True},
                    arms={"full": Arm(learning_rate=1e-3), "lora": Arm(lora, learning_rate=1e-2)})  # fmt: skip
    recipe.to_yaml(root / "classify.yaml")
    adapter = train(recipe, "lora", output=root / "runs").folder
    return {"classify": root / "classify.yaml", "adapter": adapter, "gpt2": root / "gpt2"}


if __name__ == "__main__":
    main()
