"""The running server: its address, its key, and its end on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from peft_recipes.errors import RecipeError
from peft_recipes.serving.app import Access, build_app
from peft_recipes.serving.engine import Limits
from peft_recipes.serving.models import Models

KEY_VARIABLE = "PEFT_RECIPES_API_KEY"
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
_GRACE = 5.0  # seconds for running requests after a signal
_UNTOLD = 0.5  # seconds without a word: an answer that was sent leaves its place a moment later
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def read_key(file: Path | None) -> str | None:
    """The API key: the first line of a file, else the environment's. It is not taken from the command line, which
    every user of a machine can read. Raises RecipeError for a file that can't be read or is empty.
    """
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = file.read_text(encoding="utf-8").strip().partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--api-key-file {file} can't be read: {getattr(error, 'strerror', error)}.") from error
    if not key:
        raise RecipeError(f"--api-key-file {file} is empty.")
    return key


def open_socket(host: str, port: int) -> socket.socket:
    """Listen on an address. Raises RecipeError if that is not possible, before a model is loaded."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise RecipeError(
            f"{host}:{port} is not available ({error.strerror}); name another --host or --port."
        ) from error
    listening.set_inheritable(True)
    return listening


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    address = listening.getsockname()[0]
    return address.startswith("127.") or address == "::1"


class _Server(uvicorn.Server):
    """uvicorn's server, whose end on a signal is this module's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """A server on an open socket. host: a name that requests may use. received: the signal that ended it, if any."""

    def __init__(
        self, models: Models, listening: socket.socket, *, limits: Limits | None = None, key: str | None = None,
        max_bytes: int = 2**20, grace: float = _GRACE, host: str | None = None,
    ):  # fmt: skip
        self._listening, self._grace = listening, grace
        own = {(host or "localhost").lower(), listening.getsockname()[0]}
        hosts = _LOOPBACK | own if is_loopback(listening) else None
        self.app = build_app(models, limits, Access(key, hosts, max_bytes))
        config = uvicorn.Config(
            self.app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=2,
            timeout_keep_alive=30,
        )  # fmt: skip
        self._server = _Server(config)
        self._ending: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.received: signal.Signals | None = None

    @property
    def url(self) -> str:
        """The address of the API."""
        host, port = self._listening.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until a signal, or until `end` is called from another thread."""
        asyncio.run(self._serve(on_ready))

    def end(self) -> None:
        """Answer what is running, for a few seconds, and return from `run`. For other threads."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_end)

    async def _serve(self, on_ready: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        with self._handling_signals():
            serving = asyncio.ensure_future(self._server.serve([self._listening]))
            while not self._server.started and not serving.done():
                await asyncio.sleep(0.01)
            if not serving.done():
                on_ready()
            await serving

    @contextlib.contextmanager
    def _handling_signals(self) -> Iterator[None]:
        """Begin the end on a signal; outside the main thread, where Python allows no handlers, do nothing."""
        before: dict[int, Any] = {}
        with contextlib.suppress(ValueError):
            before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        again, self.received = self.received is not None, signal.Signals(number)
        if again:
            self._server.force_exit = self._server.should_exit = True
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_end)

    def _begin_end(self) -> None:
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        """Take no new request, wait for those that run, then end."""
        engine = self.app.state.api.engine
        engine.drain()
        now = asyncio.get_running_loop().time
        start, told = now(), False
        while not engine.idle and now() < start + self._grace and not self._server.should_exit:
            if not told and now() > start + _UNTOLD:
                print(f"Ending; running requests have {self._grace:g} seconds.", file=sys.stderr, flush=True)
                told = True
            await asyncio.sleep(0.02)
        await asyncio.to_thread(engine.stop)
        self._server.should_exit = True
