"""A small Hub for tests, with faults on request: the real client downloads from it and pushes to it over HTTP.

Serves the folders below `root` (`<root>/<org>/<name>/...`, models only) under the Hub's URLs and headers, and accepts
pushes by its protocol: create, preupload, LFS batch and upload, one atomic commit. A fault applies to the first
requests that match: Fault("config.json", 503, times=2).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LFS = (".safetensors", ".parquet", ".png")


@dataclass
class Fault:
    """The answer to `times` requests whose path contains `part`: a status, "cut" (half a file) or "slow" (never)."""

    part: str
    status: int | str
    times: int = 10**6
    code: str = ""  # the Hub's X-Error-Code
    said: str = "as the test asked"
    method: str = ""  # only requests of this method


def front_matter(card: str) -> Any:
    """The YAML front matter of a card."""
    import yaml

    found = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    return yaml.safe_load(found[1]) if found else {}


class Hub:
    """with Hub(root) as hub: ... hub.url; hub.requests holds (method, path, authorization) of each request.

    token: needed for pushes and private repositories; None accepts any. owners: namespaces in which repositories may
    be created. commits: (repository, message, changed paths) of each commit.
    """

    def __init__(self, root: Path, token: str | None = None, owners: tuple[str, ...] = ("me",)):
        self.root, self.token, self.owners = root, token, owners
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str]] = []
        self.commits: list[tuple[str, str, list[str]]] = []
        self.private: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.lock = threading.Lock()

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.part in path and fault.times > 0 and fault.method in ("", method):
                fault.times -= 1
                return fault
        return None

    def files(self, name: str) -> dict[str, bytes]:
        """The files of a repository."""
        folder = self.root / name
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    def commit_of(self, name: str) -> str:
        """A repository's commit: a hash of its files."""
        digest = hashlib.sha1(name.encode())
        for path, content in self.files(name).items():
            digest.update(path.encode() + hashlib.sha1(content).digest())
        return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        sent = self._body()
        self.hub.requests.append((self.command, path, self.headers.get("authorization", "")))
        fault = self.hub.fault(self.command, path)
        if fault and isinstance(fault.status, int):
            self._fail(fault.status, fault.code, fault.said)
            return
        if fault and fault.status == "slow":
            self.connection.recv(1)  # until the client gives up
            self.close_connection = True
            return
        parts = path.split("/")
        if self.command in ("POST", "PUT", "DELETE"):
            self._take(parts, sent)
        elif path == "api/whoami-v2":
            self._whoami()
        elif parts[:2] == ["api", "models"]:
            self._repository("/".join(parts[2:4]), parts[4:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), "/".join(parts[4:]), self.command == "GET", cut=fault is not None)
        else:
            self._fail(404, "EntryNotFound")

    do_HEAD = do_GET = do_POST = do_PUT = do_DELETE = _answer

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        read = b""
        while size := int(self.rfile.readline(), 16):
            read += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return read

    # --- downloads ---------------------------------------------------------------------------------------------------

    def _visible(self, name: str) -> bool:
        """Whether a repository exists for this request: a private one needs the token."""
        return (self.hub.root / name).is_dir() and (name not in self.hub.private or self._authorized())

    def _repository(self, name: str, rest: list[str]) -> None:
        if not self._visible(name):
            self._fail(404, "RepoNotFound")
            return
        folder = self.hub.root / name
        files = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
        commit = self.hub.commit_of(name)
        if rest[:1] == ["tree"]:
            below = "/".join(rest[2:])
            found = [f for f in files if f.startswith(f"{below}/" if below else "")]
            if not found:
                self._fail(404, "EntryNotFound")
                return
            self._send([{"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": commit} for f in found])
            return
        card = front_matter((folder / "README.md").read_text()) if "README.md" in files else None
        self._send({"id": name, "modelId": name, "sha": commit, "private": name in self.hub.private, "tags": [],
                    "siblings": [{"rfilename": f} for f in files], "cardData": card})  # fmt: skip

    def _file(self, name: str, file: str, body: bool, cut: bool) -> None:
        path = self.hub.root / name / file
        if not self._visible(name):
            self._fail(404, "RepoNotFound")
        elif not path.is_file():
            self._fail(404, "EntryNotFound")
        else:
            content = path.read_bytes()
            start = int(self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")[0] or 0)
            self.send_response(206 if start else 200)
            for key, value in (("ETag", f'"{hashlib.sha256(content).hexdigest()}"'),
                               ("X-Repo-Commit", self.hub.commit_of(name)),
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

    # --- pushes ------------------------------------------------------------------------------------------------------

    def _authorized(self) -> bool:
        return self.hub.token is None or self.headers.get("authorization") == f"Bearer {self.hub.token}"

    def _whoami(self) -> None:
        if not self._authorized() or not self.headers.get("authorization"):
            self._fail(401, "", "Invalid user token.")
            return
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self._send({"name": self.hub.owners[0], "type": "user", "fullname": "Me", "orgs": [], "auth": token})

    def _take(self, parts: list[str], sent: bytes) -> None:
        path = "/".join(parts)
        if path == "api/validate-yaml":
            self._validate(json.loads(sent)["content"])
        elif parts[0] == "lfs-storage":  # as on the Hub: a signed URL, without the token
            self._store(parts[1], sent)
        elif not self._authorized():
            self._fail(401, "", "Invalid username or password.")
        elif path == "api/repos/create":
            self._create(json.loads(sent))
        elif path == "api/repos/delete":
            request = json.loads(sent)
            shutil.rmtree(self.hub.root / f"{request['organization']}/{request['name']}")
            self._send({})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(sent)["objects"])
        elif parts[:2] == ["api", "models"] and len(parts) > 5 and parts[4] in ("preupload", "commit"):
            name = "/".join(parts[2:4])
            if not (self.hub.root / name).is_dir():
                self._fail(404, "RepoNotFound")
            elif parts[4] == "preupload":
                self._preupload(name, json.loads(sent)["files"])
            else:
                self._commit(name, [json.loads(line) for line in sent.splitlines()])
        else:
            self._fail(404, "EntryNotFound")

    def _validate(self, card: str) -> None:
        """As on the Hub: front matter must be a mapping, and base_model a valid repository name."""
        data = front_matter(card)
        wrong = [] if isinstance(data, dict) else ["the front matter is no mapping"]
        if not wrong and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(data.get("base_model", "x"))):
            wrong.append(f'"base_model" with value "{data["base_model"]}" is not valid.')
        self._send({"errors": [{"message": text} for text in wrong], "warnings": []}, 400 if wrong else 200)

    def _create(self, request: dict[str, Any]) -> None:
        owner = request.get("organization") or self.hub.owners[0]
        name = f"{owner}/{request['name']}"
        if owner not in self.hub.owners:
            self._fail(403, "", f'You don\'t have the rights to create a model under the namespace "{owner}".')
        elif (self.hub.root / name).is_dir():
            self._fail(409, "", "You already created this model repo")
        else:
            (self.hub.root / name).mkdir(parents=True)
            (self.hub.root / name / ".gitattributes").write_text("*.safetensors filter=lfs\n")
            if request.get("visibility") == "private" or request.get("private"):
                self.hub.private.add(name)
            self._send({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def _preupload(self, name: str, files: list[dict[str, Any]]) -> None:
        there, answers = self.hub.files(name), []
        for file in files:
            lfs = file["path"].endswith(LFS)
            answer = {"path": file["path"], "shouldIgnore": False, "uploadMode": "lfs" if lfs else "regular"}
            if (old := there.get(file["path"])) is not None:
                blob = f"blob {len(old)}\0".encode() + old
                answer["oid"] = hashlib.sha256(old).hexdigest() if lfs else hashlib.sha1(blob).hexdigest()
            answers.append(answer)
        self._send({"files": answers})

    def _batch(self, objects: list[dict[str, Any]]) -> None:
        answers = []
        for requested in objects:
            actions = {"upload": {"href": f"{self.hub.url}/lfs-storage/{requested['oid']}", "header": {}}}
            answers.append({**requested, **({} if requested["oid"] in self.hub.blobs else {"actions": actions})})
        self._send({"transfer": "basic", "objects": answers})

    def _store(self, oid: str, sent: bytes) -> None:
        if hashlib.sha256(sent).hexdigest() != oid:
            self._fail(400, "", "The content is not what its sha256 says.")
        else:
            self.hub.blobs[oid] = sent
            self._send({})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        """Apply all operations of a commit, or none."""
        with self.hub.lock:
            header = next(line["value"] for line in lines if line["key"] == "header")
            if header.get("parentCommit") not in (None, self.hub.commit_of(name)):
                self._fail(412, "", "A commit has happened since. Please refresh and try again.")
                return
            files, changed = self.hub.files(name), []
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                elif line["key"] == "deletedFile":
                    files.pop(value["path"])
                if "path" in value:
                    changed.append(value["path"])
            folder = self.hub.root / name
            shutil.rmtree(folder)
            for path, content in files.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)
            self.hub.commits.append((name, header["summary"], sorted(changed)))
            commit = self.hub.commit_of(name)
        self._send({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})

    def _send(self, answer: Any, status: int = 200) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _fail(self, status: int, code: str = "", message: str = "as the test asked") -> None:
        content = b"" if self.command == "HEAD" else json.dumps({"error": message}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", message)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
