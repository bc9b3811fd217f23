"""Install the lowest versions that pyproject.toml declares into .venv-floors, and run a short part of the tests.

    make test-floors

torch comes from constraints.txt: its floor is not tested, since older builds are several gigabytes with CUDA.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-floors"
TESTS = (
    "tests/data/test_sources.py", "tests/tasks/test_causal.py", "tests/tasks/test_dpo.py", "tests/training/test_run.py",
    "tests/arms/test_targets.py", "tests/tasks/test_convolutional.py", "tests/adapters/test_merge.py",
)  # fmt: skip
# What the comparison rests on. The numeric libraries come from constraints.txt.
LIBRARIES = ("transformers", "peft", "trl", "accelerate", "datasets", "huggingface_hub")


def floors() -> dict[str, str]:
    """The lowest version of each library for this Python, from pyproject.toml."""
    from packaging.requirements import Requirement

    block = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    found = [Requirement(text) for text in re.findall(r'^\s*"([^"]+)"', block[1], re.MULTILINE)]
    chosen = [need for need in found if need.marker is None or need.marker.evaluate()]
    return {need.name: next(s.version for s in need.specifier if s.operator == ">=") for need in chosen}


def main() -> None:
    lowest = floors()
    pinned = {name: lowest[name] for name in LIBRARIES}
    python = FOLDER / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", FOLDER], check=True)
    kept = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.partition("==")[0].strip() not in (*LIBRARIES, "tokenizers")
    ]
    constraints = FOLDER / "constraints.txt"
    constraints.write_text("\n".join([*kept, *(f"{name}=={version}" for name, version in pinned.items())]) + "\n")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", constraints]
    subprocess.run([*install, "--editable", f"{ROOT}[embedded,test]"], check=True)
    print(*(f"{name} {version}" for name, version in pinned.items()), sep="\n", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    sys.exit(subprocess.run([python, "-m", "pytest", *TESTS], cwd=ROOT, env=environment).returncode)


if __name__ == "__main__":
    main()
