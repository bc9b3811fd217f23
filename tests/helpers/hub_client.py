"""Runs command lines in a subprocess with the real huggingface_hub client, which imports the libraries only once.

The client reads the Hub's address when it is imported, so it needs a process of its own. `Client` starts this file as a
script, which reads {"words": [...], "env": {...}} lines and writes {"code", "out", "err"} lines.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class Client:
    """with Client(url, home, token) as client: client("push", ...) -> .code, .out, .err, .said (err on one line).

    seconds: how long it waits for an answer of the Hub.
    """

    def __init__(self, url: str, home: Path, token: str, seconds: float = 5):
        self.token = token
        self.environment = {
            **os.environ, "HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": str(seconds),
            "HF_HUB_ETAG_TIMEOUT": str(seconds),
        }  # fmt: skip

    def __enter__(self) -> Client:
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=self.environment)  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(30)

    def __call__(self, *words: object, env: dict[str, str | None] | None = None, cwd: Path | None = None) -> Any:
        """Run a command. env: changes to the environment (None removes a variable)."""
        return self._ask(words=[str(word) for word in words], env=env or {}, cwd=str(cwd) if cwd else None)

    def python(self, code: str, *words: object) -> Any:
        """Run Python code with these words as its arguments."""
        return self._ask(code=code, words=[str(word) for word in words])

    def _ask(self, **request: Any) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        result = SimpleNamespace(**json.loads(self.process.stdout.readline()))
        result.said = " ".join(result.err.split())
        assert self.token not in result.out + result.err and "Traceback" not in result.err, result.err
        return result


def _run_code(words: list[str], code: str) -> dict[str, Any]:
    out, err = io.StringIO(), io.StringIO()
    sys.argv[1:] = words
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    return {"code": 0, "out": out.getvalue(), "err": err.getvalue()}


def _run(words: list[str], env: dict[str, str | None], cwd: str | None) -> dict[str, Any]:
    from typer.testing import CliRunner

    from peft_recipes.cli.app import app

    for name, value in env.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    if cwd:
        os.chdir(cwd)
    result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        import traceback

        return {"code": 99, "out": result.stdout, "err": "".join(traceback.format_exception(result.exception))}
    return {"code": result.exit_code, "out": result.stdout, "err": result.stderr}


def main() -> None:
    stdout = os.fdopen(os.dup(1), "w")  # the libraries' prints go to stderr instead
    os.dup2(2, 1)
    environment, cwd = dict(os.environ), os.getcwd()
    for line in sys.stdin:
        request = json.loads(line)
        result = _run_code(**request) if "code" in request else _run(**request)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        print(json.dumps(result), file=stdout, flush=True)


if __name__ == "__main__":
    main()
