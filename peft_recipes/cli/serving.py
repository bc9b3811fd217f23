"""The command that serves saved adapters over HTTP."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from peft_recipes.cli.common import ADAPTERS, Base, Trust, command, say
from peft_recipes.errors import RecipeError, Terminated
from peft_recipes.training.interruption import terminable


@command(ADAPTERS)
def serve(
    adapters: Annotated[
        list[str], Argument(metavar="ADAPTER ...", help="Name folders or Hub repositories, or NAME=ADAPTER.")
    ],
    host: Annotated[str, Option("--host", metavar="ADDRESS", help="Listen on this address.")] = "127.0.0.1",
    port: Annotated[int, Option("--port", min=0, max=65535, help="Listen on this port; 0: any free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        Option("--api-key-file", metavar="FILE", help="Require the key in this file (or in PEFT_RECIPES_API_KEY)."),
    ] = None,
    batch_size: Annotated[int, Option("--batch-size", metavar="N", min=1, help="Answer N requests at a time.")] = 16,
    queue: Annotated[int, Option("--queue", metavar="N", min=1, help="Let N more wait, then refuse (429).")] = 64,
    max_tokens: Annotated[int, Option("--max-tokens", metavar="N", min=1, help="Limit an answer's tokens.")] = 1024,
    timeout: Annotated[
        float, Option("--timeout", metavar="SECONDS", min=1, help="Limit a request's time, the waiting included.")
    ] = 300.0,
    max_request_bytes: Annotated[
        int, Option("--max-request-bytes", metavar="N", min=1024, help="Limit the size of a request.")
    ] = 2**20,
    base: Base = "",
    trust_remote_code: Trust = False,
) -> None:
    """Serve adapters of one base as an OpenAI-compatible API: `model` chooses the adapter, streaming, one batch."""
    _check_installed()
    received: signal.Signals | None = signal.SIGINT
    with terminable():
        try:
            received = _serve(adapters, host, port, api_key_file, base or None, trust_remote_code, max_request_bytes,
                              batch_size=batch_size, queue=queue, max_tokens=max_tokens, timeout=timeout)  # fmt: skip
        except KeyboardInterrupt:  # while the models load
            pass
        except Terminated:
            received = signal.SIGTERM
    say("Ended by Ctrl-C." if received == signal.SIGINT else "Ended.")
    raise typer.Exit(130 if received == signal.SIGINT else 0)


def _serve(
    adapters: list[str], host: str, port: int, key_file: Path | None, base: str | None, trust_remote_code: bool,
    max_bytes: int, **limits: float,
) -> signal.Signals | None:  # fmt: skip
    """Serve until a signal, and return it."""
    from peft_recipes.serving.engine import Limits
    from peft_recipes.serving.models import load_models
    from peft_recipes.serving.server import KEY_VARIABLE, Server, is_loopback, open_socket, read_key

    key = read_key(key_file)
    with contextlib.closing(open_socket(host, port)) as listening:
        if key is None and not is_loopback(listening):
            say(f"Without a key, everyone who reaches {host} can use this server: --api-key-file or {KEY_VARIABLE}.")
        models = load_models(adapters, base, trust_remote_code=trust_remote_code)
        server = Server(models, listening, limits=Limits(**limits), key=key, max_bytes=max_bytes, host=host)
        server.run(lambda: say(f"{', '.join(models.by_name)} at {server.url}  (Ctrl-C ends)"))
    return server.received


def _check_installed() -> None:
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(f"`serve` needs {', '.join(missing)}: pip install 'peft_recipes[serve]'.")
