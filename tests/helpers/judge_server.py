"""A small server of OpenAI's chat completions that judges two answers by a rule; it counts and keeps its requests."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_ANSWERS = re.compile(r"### Answer A\n(.*)\n\n### Answer B\n(.*)\n\n### Your decision\n", re.DOTALL)


def longer(first: str, second: str) -> str:
    """Prefer the longer answer."""
    return "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


def later(first: str, second: str) -> str:
    """Prefer the answer that comes later in the alphabet."""
    return "tie" if first == second else "A" if first > second else "B"


class JudgeServer:
    """A server at `url`. rule: (first answer, second answer) -> reply. key: refuses requests with another one.

    questions: the text of every request that was answered. headers: of every request, their names in lower case.
    failures: status codes of the next requests, which fail. model: refuses the name of another one.
    """

    def __init__(self, rule: Callable[[str, str], str] = longer, key: str | None = None, model: str = "a-judge"):
        self.rule, self.key, self.model = rule, key, model
        self.questions: list[str] = []
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.failures: list[int] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"judge": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reply(self, request: dict) -> str:
        question = request["messages"][0]["content"]
        self.questions.append(question)
        answers = _ANSWERS.search(question)
        return self.rule(*answers.groups()) if answers else self.rule("", "")


class _Handler(BaseHTTPRequestHandler):
    judge: JudgeServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        judge = self.judge
        judge.requests.append(request)
        judge.headers.append({name.lower(): value for name, value in self.headers.items()})
        if self.path != "/v1/chat/completions":
            self._send(404, {"error": {"message": "no such path"}})
        elif judge.failures:
            self._send(judge.failures.pop(0), {"error": {"message": "busy"}})
        elif judge.key is not None and self.headers["Authorization"] != f"Bearer {judge.key}":
            self._send(401, {"error": {"message": f"wrong key: {self.headers['Authorization']}"}})
        elif request["model"] != judge.model:
            self._send(404, {"error": {"message": f"the model '{request['model']}' does not exist"}})
        else:
            message = {"role": "assistant", "content": judge.reply(request)}
            self._send(200, {"id": "1", "object": "chat.completion", "created": 0, "model": judge.model,
                             "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})  # fmt: skip

    def _send(self, status: int, body: dict) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Retry-After-Ms", "1")  # or the client would wait half a second before it tries again
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass
