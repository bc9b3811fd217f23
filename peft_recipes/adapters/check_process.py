"""The process that checks saved adapters: `python -m peft_recipes.adapters.check_process DIR ...`.

One JSON line a folder: {"folder": ..., "error": null, or what is not as it was saved}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from peft_recipes.distributed.quiet import quiet_libraries, skip_bitsandbytes

TRUSTED = "--trust-remote-code"  # as the user's own recipe says


def main(folders: list[str], trust_remote_code: bool) -> None:
    """Checks each folder on a fresh base, and prints its line."""
    quiet_libraries()
    if not any(_is_quantised(Path(folder)) for folder in folders):
        skip_bitsandbytes()
    from peft_recipes.adapters.check import check_adapter

    for folder in folders:
        try:
            found = {
                finding.name: finding
                for finding in check_adapter(folder, merge=False, trust_remote_code=trust_remote_code)
            }
            wrong = [f"{name}: {finding.said}" for name, finding in found.items() if finding.ok is False]
            error = "; ".join(wrong) or None
        except Exception as problem:  # whatever it is, it is this adapter's and not the next one's
            error = f"{type(problem).__name__}: {problem}"
        print(json.dumps({"folder": folder, "error": error}), flush=True)


def _is_quantised(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "run.json").read_text(encoding="utf-8")).get("quantise"))
    except (OSError, ValueError):
        return True  # unknown


if __name__ == "__main__":
    main([word for word in sys.argv[1:] if word != TRUSTED], TRUSTED in sys.argv)
