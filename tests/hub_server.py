"""A small Hub for tests: the real client downloads from it over HTTP, and it can be told to fail.

Serves the folders below `root` (`<root>/<org>/<name>/...`, models only, one revision) by the Hub's own addresses and
headers. `faults` are taken by the first requests that fit: Fault("config.json", 503, times=2).
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Fault:
    """Requests whose path holds `part` answer `status` (or are cut in the middle: "cut"), `times` times."""

    part: str
    status: int | str
    times: int = 10**6
    code: str = ""  # the Hub's X-Error-Code


class Hub:
    """with Hub(root) as hub: ... hub.url; hub.requests holds (method, path, authorization) of what was asked."""

    def __init__(self, root: Path):
        self.root, self.faults, self.requests = root, [], []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.part in path and fault.times > 0:
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.hub.requests.append((self.command, path, self.headers.get("authorization", "")))
        fault = self.hub.fault(path)
        if fault and isinstance(fault.status, int):
            self._fail(fault.status, fault.code)
            return
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            self._repository("/".join(parts[2:4]), parts[4:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), "/".join(parts[4:]), body, cut=fault is not None)
        else:
            self._fail(404, "EntryNotFound")

    def _repository(self, name: str, rest: list[str]) -> None:
        folder = self.hub.root / name
        if not folder.is_dir():
            self._fail(404, "RepoNotFound")
            return
        files = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
        if rest[:1] == ["tree"]:
            below = "/".join(rest[2:])
            found = [f for f in files if f.startswith(f"{below}/" if below else "")]
            if not found:
                self._fail(404, "EntryNotFound")
                return
            self._send(json.dumps([{"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": COMMIT}
                                   for f in found]).encode())  # fmt: skip
            return
        self._send(json.dumps({"id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [],
                               "siblings": [{"rfilename": f} for f in files]}).encode())  # fmt: skip

    def _file(self, name: str, file: str, body: bool, cut: bool) -> None:
        path = self.hub.root / name / file
        if not (self.hub.root / name).is_dir():
            self._fail(404, "RepoNotFound")
        elif not path.is_file():
            self._fail(404, "EntryNotFound")
        else:
            content = path.read_bytes()
            start = int(self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")[0] or 0)
            self.send_response(206 if start else 200)
            for key, value in (("ETag", f'"{hashlib.sha256(content).hexdigest()}"'), ("X-Repo-Commit", COMMIT),
                               ("Content-Length", str(len(content) - start)), ("Accept-Ranges", "bytes")):  # fmt: skip
                self.send_header(key, value)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if body and cut:
                self.wfile.write(content[start : start + (len(content) - start) // 2])
                self.close_connection = True
            elif body:
                self.wfile.write(content[start:])

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", "as the test asked")
        self.send_header("Content-Length", "0")
        self.end_headers()
