"""Entry point of the subprocess in which a comparison checks the adapters that it has trained.

`python -m peft_recipes.adapters.check_subprocess DIR ...` runs `check_adapter` of check.py, without merging, on each
folder, and prints a JSON line for each: {"folder": str, "error": str or null, "not_run": str or null}; not_run: the
check ran out of memory, which says nothing about the adapter. The process that trained an adapter can't notice that a
weight exists in its memory only; a new one does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from peft_recipes.distributed.quiet import quiet_libraries, skip_bitsandbytes
from peft_recipes.errors import says_out_of_memory

TRUSTED = "--trust-remote-code"


def main(folders: list[str], trust_remote_code: bool) -> None:
    """Check each folder on a fresh base and print its line."""
    quiet_libraries()
    if not any_quantised(folders):
        skip_bitsandbytes()
    from peft_recipes.adapters.check import check_adapter

    for folder in folders:
        not_run = None
        try:
            findings = check_adapter(folder, merge=False, trust_remote_code=trust_remote_code)
            failed = [f"{finding.name}: {finding.message}" for finding in findings if finding.ok is False]
            error = "; ".join(failed) or None
        except Exception as problem:  # whatever it is, the next adapter is checked all the same
            error = f"{type(problem).__name__}: {problem}"
            if isinstance(problem, MemoryError) or says_out_of_memory(error):
                error, not_run = None, error
        print(json.dumps({"folder": folder, "error": error, "not_run": not_run}), flush=True)


def any_quantised(folders: list[str]) -> bool:
    """Whether the base of one of these runs needs bitsandbytes, or may need it."""
    return any(_is_quantised(Path(folder)) for folder in folders)


def _is_quantised(folder: Path) -> bool:
    """Whether the run has a quantised base; True where run.json does not say."""
    try:
        return bool(json.loads((folder / "run.json").read_text(encoding="utf-8")).get("quantise"))
    except (OSError, ValueError):
        return True


if __name__ == "__main__":
    main([argument for argument in sys.argv[1:] if argument != TRUSTED], TRUSTED in sys.argv)
