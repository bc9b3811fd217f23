"""Give malformed recipes, datasets and adapters to the command line, and count the correct error reports.

    python benchmarks/malformed_inputs.py

Correct: the expected exit code, a message that says where the error is, no traceback, no file written or lost. The
cases are those of tests/helpers/malformed_cases.py. Prints the result as JSON; --keep writes
benchmarks/malformed_inputs.json. Exit code 1 if a case fails.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from harness import result_parser, write_result

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))


def main() -> None:
    given = result_parser(__doc__).parse_args()
    from malformed_cases import CASES

    tried, wrong = Counter(case.kind for case in CASES), []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        valid = valid_inputs(root / "there")
        for number, case in enumerate(CASES):
            if not _reported(case, root / str(number), valid):
                wrong.append(f"{case.kind}: {case.name}")
                print("WRONG", wrong[-1], flush=True)
    document = {"tried": dict(tried), "total": len(CASES), "answered": len(CASES) - len(wrong), "wrong": wrong}
    write_result(given, Path(__file__).resolve().with_suffix(".json"), document, document)
    raise SystemExit(1 if wrong else 0)


def _reported(case, folder: Path, valid: dict[str, Path]) -> bool:
    from typer.testing import CliRunner

    from peft_recipes.cli.app import app

    (folder / "work").mkdir(parents=True)
    (folder / "given").mkdir()
    os.chdir(folder / "work")
    words = case.make(folder / "given", valid)
    before = sorted(folder.rglob("*"))
    shown = CliRunner().invoke(app, words)
    text = " ".join((shown.stdout + shown.stderr).split())
    right = shown.exit_code == case.code and case.message in text and "Traceback" not in text
    return right and sorted(folder.rglob("*")) == before


def valid_inputs(root: Path) -> dict[str, Path]:
    """Make a valid recipe, a valid adapter and another base, small and random."""
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
