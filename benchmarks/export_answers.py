"""llama.cpp's greedy answers next to PEFT's: SmolLM2 with its kept adapters, and a random model of each architecture.

    python benchmarks/export_answers.py                                    # with the engine that is installed
    python benchmarks/export_answers.py --engine llama-cpp-python --keep

Each adapter is exported to GGUF (one of SmolLM2's in f32 and one in f16, the random ones in f32), and the 24 prompts of
exporting/verify.py are answered by llama.cpp, with base and adapter loaded from the files, and by transformers and PEFT
in fp32. Of answers that differ, the first differing token is kept, and how far apart the two tokens are in either
model. Prints the result as JSON; --keep writes benchmarks/export_answers.json.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import result_parser, write_result

KEPT, ROOT = Path(__file__).with_suffix(".json"), Path(__file__).parent.parent
SMOLLM2 = {"smollm2-alpaca": ("f32",), "smollm2-arithmetic": ("f16",)}  # the types of each
sys.path.append(str(ROOT / "tests" / "helpers"))


def main() -> None:
    from exported_models import ARCHITECTURES

    parser = result_parser(__doc__)
    parser.add_argument("--engine", help="xllamacpp or llama-cpp-python (default: the one that is installed)")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="export-") as folder:
        for name, types in SMOLLM2.items():
            for dtype in types:
                adapter = ROOT / "adapters" / name / "lora" / "seed-0"
                rows.append(_row(name, adapter, dtype, given.engine, Path(folder)))
        for kind in ARCHITECTURES:
            adapter = _random_adapter(kind, Path(folder) / kind)
            rows.append(_row(f"random {kind}", adapter, "f32", given.engine, Path(folder)))
    summary = {f"{row['model']} {row['type']}": f"{row['same']} of {row['prompts']}" for row in rows}
    write_result(given, KEPT, {"rows": rows, "environment": _environment()}, summary)


def _random_adapter(kind: str, folder: Path) -> Path:
    from exported_models import save_model, targets_of
    from saved_adapters import lora, saved

    base = save_model(folder / "base", kind)
    return saved(base, folder / "adapter", lora(r=4, lora_alpha=8, target_modules=targets_of(kind)))


def _row(name: str, adapter: Path, dtype: str, engine: str | None, folder: Path) -> dict[str, Any]:
    """Export, and return what the verification found."""
    import shutil

    from peft_recipes.exporting.export import export_adapter

    output = folder / "exported"
    made = export_adapter(adapter, output, "gguf", dtype=dtype, engine=engine, allow_differences=True)
    shutil.rmtree(output)
    found = made["verification"]
    answers = found["answers"]
    print(f"{name} {dtype}: {answers['same']} of {answers['prompts']}", file=sys.stderr, flush=True)
    return {
        "model": name,
        "type": dtype,
        "engine": found["engine"],
        "passed": found["passed"],
        "texts_tokenised_alike": f"{found['tokens']['same']} of {found['tokens']['texts']}",
        "chats_rendered_alike": found["template"] and f"{found['template']['same']} of {found['template']['chats']}",
        "end_token": found["end_token"]["llama.cpp"],
        **{key: answers[key] for key in ("prompts", "same", "tokens", "new_tokens", "differing")},
        "bytes": made["bytes"],
    }


def _environment() -> dict[str, Any]:
    from peft_recipes.hardware.device import choose
    from peft_recipes.hardware.environment import environment

    return environment(choose())


if __name__ == "__main__":
    main()
