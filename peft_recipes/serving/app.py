"""The endpoints, as a FastAPI application."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from peft_recipes.serving.engine import Engine, Job, Limits
from peft_recipes.serving.errors import ApiError
from peft_recipes.serving.metrics import Metrics
from peft_recipes.serving.models import Models, Served
from peft_recipes.serving.rendering import find_model, render
from peft_recipes.serving.replies import Reply, error_event
from peft_recipes.serving.schema import ChatRequest, CompletionRequest, parse

_CLIENT_LEFT = 499  # nginx's status for it; it is only counted
Events = asyncio.Queue[tuple[str, Any]]  # of the engine, and ("left", None)
_BODY_SECONDS = 30.0  # for a client to send its request


@dataclass(frozen=True)
class Access:
    """Who may ask. key: that clients send as `Authorization: Bearer KEY`; None: anybody.

    hosts: names of this server in a request's Host header; None: any. A server on loopback takes its own only, so that
    a web page can't reach it under a name of its own.
    """

    key: str | None = None
    hosts: frozenset[str] | None = None
    max_bytes: int = 2**20

    def check(self, request: Request) -> None:
        """Raises ApiError 401 or 403."""
        host = request.headers.get("host", "").rpartition(":")[0] or request.headers.get("host", "")
        if self.hosts is not None and host.lower() not in self.hosts:
            raise ApiError(403, "This server answers requests to its own address only.", code="wrong_host")
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self.key is not None and not hmac.compare_digest(given.encode(), self.key.encode()):
            raise ApiError(401, "The API key is missing or wrong.", code="invalid_api_key")


class Api:
    """The server's state, and its handlers. engine: started and stopped by the application."""

    def __init__(self, models: Models, limits: Limits, access: Access):
        self.models, self.limits, self.access = models, limits, access
        self.metrics = Metrics()
        self.engine = Engine(models, limits, self.metrics.step)
        self.metrics.watch(lambda: self.engine.waiting, lambda: self.engine.running)
        self._created = int(time.time())
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")  # a tokenizer takes one thread at a time

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run the engine as long as the application."""
        self.engine.start()
        yield
        await asyncio.to_thread(self.engine.stop)
        self._tokenizing.shutdown(wait=False)

    def model_card(self, served: Served) -> dict[str, Any]:
        """An entry of /v1/models. parent: the base of an adapter; max_model_len as vLLM calls the context."""
        parent = None if served.name == self.models.base_name else self.models.base_name
        return {"id": served.name, "object": "model", "created": self._created, "owned_by": "peft_recipes",
                "parent": parent, "max_model_len": served.context}  # fmt: skip

    async def answer(self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        """Answer one request. Raises ApiError."""
        model = "unknown"
        try:
            parsed = parse(kind, await self._body(request))
            served = find_model(self.models, parsed.model)
            model = served.name
            run = asyncio.get_running_loop().run_in_executor
            prompt, sampling = await run(self._tokenizing, render, served, parsed, self.limits.max_tokens)
            events: Events = asyncio.Queue()
            job = Job(served, prompt, sampling, _to_loop(events))
            self.engine.submit(job)
        except ApiError as error:
            self.metrics.answered(model, error.status)
            raise
        watching = self._watch(request, job, events)
        reply = Reply(job, kind is ChatRequest)
        if not parsed.stream:
            return await self._whole(job, events, reply, watching)
        usage = parsed.stream_options is not None and parsed.stream_options.include_usage
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        chunks = self._chunks(job, events, reply, watching, usage)
        return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)

    def _watch(self, request: Request, job: Job, events: Events) -> asyncio.Future[None]:
        """Free the job's place as soon as the client closes the connection, also while it waits."""

        def left(watching: asyncio.Future[None]) -> None:
            if not watching.cancelled():
                self.engine.cancel(job)
                events.put_nowait(("left", None))

        watching = asyncio.ensure_future(_until_left(request))
        watching.add_done_callback(left)
        return watching

    async def _body(self, request: Request) -> Any:
        """The parsed body. Raises ApiError: 400, 408, 413, 415."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a web page of another site can't send without asking first
            raise ApiError(415, "Send the request as application/json.")
        too_large = ApiError(413, f"The request has more than {self.access.max_bytes} bytes.", code="request_too_large")
        if int(request.headers.get("content-length") or 0) > self.access.max_bytes:
            raise too_large
        body = bytearray()

        async def read() -> None:
            async for part in request.stream():
                body.extend(part)
                if len(body) > self.access.max_bytes:
                    raise too_large

        try:
            await asyncio.wait_for(read(), _BODY_SECONDS)
            return json.loads(body)
        except asyncio.TimeoutError:
            raise ApiError(408, f"The request was not complete after {_BODY_SECONDS:g} seconds.") from None
        except (ValueError, RecursionError):
            raise ApiError(400, "The body is not valid JSON.", code="invalid_json") from None

    async def _whole(self, job: Job, events: Events, reply: Reply, watching: asyncio.Future[None]) -> Response:
        """Wait for the complete answer, or until the client leaves."""
        status, pieces = _CLIENT_LEFT, []
        try:
            while True:
                kind, value = await events.get()
                if kind == "text":
                    pieces.append(value)
                elif kind == "done":
                    status = 200
                    return JSONResponse(reply.whole("".join(pieces), value))
                elif kind == "error":
                    status = value.status
                    raise value
                else:
                    return Response(status_code=_CLIENT_LEFT)
        finally:
            watching.cancel()
            self._finished(job, status)

    async def _chunks(
        self, job: Job, events: Events, reply: Reply, watching: asyncio.Future[None], usage: bool
    ) -> AsyncIterator[str]:
        """The answer as server-sent events. The generator is closed if the client leaves."""
        status = _CLIENT_LEFT
        try:
            for chunk in reply.start():
                yield chunk
            while True:
                kind, value = await events.get()
                if kind == "text":
                    yield reply.piece(value)
                elif kind == "done":
                    status = 200
                    for chunk in reply.end(value, usage):
                        yield chunk
                elif kind == "error":
                    status = value.status
                    yield error_event(value.body)
                if kind != "text":
                    return
        finally:
            watching.cancel()
            self._finished(job, status)

    def _finished(self, job: Job, status: int) -> None:
        if status == _CLIENT_LEFT:
            self.engine.cancel(job)
        self.metrics.answered(job.served.name, status)
        self.metrics.finished(job)


def _to_loop(events: Events) -> Callable[[str, Any], None]:
    """Pass events from the engine's thread to the event loop's queue."""
    loop = asyncio.get_running_loop()

    def put(kind: str, value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            loop.call_soon_threadsafe(events.put_nowait, (kind, value))

    return put


async def _until_left(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def build_app(models: Models, limits: Limits | None = None, access: Access | None = None) -> FastAPI:
    """Build the application; `app.state.api` is its Api."""
    api = Api(models, limits or Limits(), access or Access())
    app = FastAPI(title="peft-recipes serve", lifespan=api.lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.api = api

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}."
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failure(request: Request, error: Exception) -> Response:
        return JSONResponse(ApiError(500, "The server failed. See its log.").body, 500)

    @app.get("/health")
    async def health() -> Response:
        alive = api.engine.alive
        return JSONResponse({"status": "ok" if alive else "shutting down"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        api.access.check(request)
        return Response(api.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        api.access.check(request)
        return {"object": "list", "data": [api.model_card(served) for served in api.models.by_name.values()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(request: Request, name: str) -> dict[str, Any]:
        api.access.check(request)
        return api.model_card(find_model(api.models, name))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        api.access.check(request)
        return await api.answer(request, ChatRequest)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        api.access.check(request)
        return await api.answer(request, CompletionRequest)

    return app
