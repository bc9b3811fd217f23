"""A process of its own with the real client of a Hub, running one command line after another: it imports once.

The client reads the Hub's address when it is imported, so it can't be the tests' own process. `Client` starts it;
started itself, it reads {"words": [...], "env": {...}} lines and answers {"code", "out", "err"} lines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class Client:
    """with Client(url, home, token) as client: client("push", ...) -> .code, .out, .err, .said (err on one line)."""

    def __init__(self, url: str, home: Path, token: str):
        self.token = token
        self.environment = {
            **os.environ, "HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        }  # fmt: skip

    def __enter__(self) -> Client:
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=self.environment)  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(30)

    def __call__(self, *words: object, env: dict[str, str | None] | None = None, cwd: Path | None = None) -> Any:
        """Runs a command. env: what of the environment is another for it (None: not set)."""
        asked = {"words": [str(word) for word in words], "env": env or {}, "cwd": str(cwd) if cwd else None}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        found = SimpleNamespace(**json.loads(self.process.stdout.readline()))
        found.said = " ".join(found.err.split())
        assert self.token not in found.out + found.err and "Traceback" not in found.err, found.err
        return found


def _run(words: list[str], env: dict[str, str | None], cwd: str | None) -> dict[str, Any]:
    from typer.testing import CliRunner

    from peft_recipes.cli.app import app

    for name, value in env.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    if cwd:
        os.chdir(cwd)
    done = CliRunner().invoke(app, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        import traceback

        return {"code": 99, "out": done.stdout, "err": "".join(traceback.format_exception(done.exception))}
    return {"code": done.exit_code, "out": done.stdout, "err": done.stderr}


def main() -> None:
    stdout = os.fdopen(os.dup(1), "w")  # what a library prints does not come between
    os.dup2(2, 1)
    before, here = dict(os.environ), os.getcwd()
    for line in sys.stdin:
        found = _run(**json.loads(line))
        os.environ.clear()
        os.environ.update(before)
        os.chdir(here)
        print(json.dumps(found), file=stdout, flush=True)


if __name__ == "__main__":
    main()
