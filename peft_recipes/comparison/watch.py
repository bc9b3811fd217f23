"""`--watch`: serve a comparison's page on loopback while its runs are trained. Standard library alone, one thread.

The server has the page and nothing else: no file is read by a request's path. It answers requests to its own address
only (a Host header of another name is a page elsewhere that resolves to this machine: DNS rebinding). While the
comparison is provisional, the header `Refresh` makes the browser ask again; the page itself has no script.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from peft_recipes.errors import Terminated

PORT = 8765  # or the first free one of the next
PORTS = 20
REFRESH = 3  # seconds
_PATHS = ("/", "/comparison.html")
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Watch:
    """The server of one page. page: returns it as of now, called in the server's threads."""

    def __init__(self, page: Callable[[], bytes], refresh: int = REFRESH):
        self._page, self._final = page, None
        self.refresh = refresh
        self._shown: list[float] = []  # when a page was shown that a browser will ask for again
        self._waiting = 0
        self._changed = threading.Condition()
        self._server = _listen(self)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.hosts = {f"{name}:{self.port}" for name in ("127.0.0.1", "localhost")}

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True, name="watch").start()

    def content(self) -> tuple[bytes, bool]:
        """The page, and whether it is the final one."""
        final = self._final
        return (self._page(), False) if final is None else (final, True)

    def shown(self, final: bool) -> None:
        """Take down that a browser got the page."""
        with self._changed:
            if final:
                self._waiting -= 1
                self._changed.notify_all()
            else:
                self._shown = [*self._recent(), time.monotonic()]

    def finish(self, page: bytes) -> None:
        """Serve the final page from here on, and wait until each open browser has it, two refreshes at most."""
        with self._changed:
            self._final, self._waiting = page, len(self._recent())
            with contextlib.suppress(KeyboardInterrupt, Terminated):  # everything is finished: only the wait ends
                self._changed.wait_for(lambda: self._waiting <= 0, timeout=2 * self.refresh)

    def _recent(self) -> list[float]:
        """The times of the last refresh: one for each browser that is open."""
        return [at for at in self._shown if time.monotonic() - at < 1.5 * self.refresh]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def watched(page: Callable[[], bytes], wanted: bool = True) -> Iterator[Callable[[bytes], None]]:
    """Serve a page within the block; yields a function that takes the final one and waits until browsers have it."""
    if not wanted:
        yield lambda final: None
        return
    page()  # the first one is made before a run is trained
    watch = Watch(page)
    watch.start()
    print(f"Watch it at {watch.url} (on this machine only).", file=sys.stderr, flush=True)
    try:
        yield watch.finish
    finally:
        watch.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    watch: Watch

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that closes its connection is no error to print."""


def _listen(watch: Watch) -> _Server:
    for port in [*range(PORT, PORT + PORTS), 0]:
        with contextlib.suppress(OSError):
            server = _Server(("127.0.0.1", port), _Handler)
            server.watch = watch
            return server
    raise OSError("no port is free on 127.0.0.1")


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "peft-recipes", ""
    timeout = 10  # seconds that a silent connection keeps its thread

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        watch = self.server.watch
        if self.headers.get("Host", "").lower() not in watch.hosts:
            self._send(403, b"This server answers requests to its own address only.\n", "text/plain", body)
        elif self.path.partition("?")[0] not in _PATHS:
            self._send(404, b"There is one page here: /\n", "text/plain", body)
        else:
            page, final = watch.content()
            self._send(200, page, "text/html", body, {} if final else {"Refresh": str(watch.refresh)})
            if body:
                watch.shown(final)

    def _send(self, code: int, content: bytes, kind: str, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {**_HEADERS, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            with contextlib.suppress(OSError):
                self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Requests are not logged."""
