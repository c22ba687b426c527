# SPDX-License-Identifier: Apache-2.0
"""The HTTP interface: rows in, answers out, prompts that come and go.

Requests are checked and encoded in threads, then answered in shared batches (see
`batcher`). A mistake in a row is that row's error; the others are answered.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import importlib.resources
import json
import pathlib
import re
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from prompt_tuning.checkpoints import prompt_formats
from prompt_tuning.errors import UserError
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import StoredPrompt
from prompt_tuning.serving.batcher import Batcher, ClosedError, QueueFullError
from prompt_tuning.serving.metrics import Metrics

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
# Anyone may see these: they say nothing of what is served.
OPEN = ("/", "/healthz")
NAME = re.compile(r"\w[\w.-]{0,127}", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
      body: bytes of a request's body.
      prompt: bytes of a prompt file.
      rows: rows of a request.
      seconds: from a request to its answer.
    """

    body: int = 1 << 20
    prompt: int = 64 << 20
    rows: int = 256
    seconds: float = 30.0


class RefusedError(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: int, message: str, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = headers


def create(
    engine: Engine,
    batcher: Batcher,
    metrics: Metrics,
    limits: Limits,
    token: str | None = None,
) -> FastAPI:
    """Makes the application; its end drains the batcher.

    Args:
      engine: answers rows with the prompts of its store.
      batcher: runs the engine.
      metrics: what is counted.
      limits: what is refused.
      token: what requests must bear; None takes requests to loopback names only.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(batcher.close)

    # The generated pages of documentation fetch scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    if token is None:
        # Else a web page could reach the server by a name that it points to loopback.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))

    @app.middleware("http")
    async def counted(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        started = time.monotonic()
        if token is None or request.url.path in OPEN or _bears(request, token):
            response = await call_next(request)
        else:
            response = _error(
                RefusedError(
                    401,
                    "give the server's token in the header 'Authorization: Bearer ...'",
                    **{"WWW-Authenticate": "Bearer"},
                )
            )
        route = request.scope.get("route")
        metrics.response(
            getattr(route, "path", "other"),
            response.status_code,
            time.monotonic() - started,
        )
        return response

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        return _error(error)

    @app.exception_handler(UserError)
    async def mistaken(_: Request, error: UserError) -> Response:
        return _error(RefusedError(400, str(error)))

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return (importlib.resources.files(__package__) / "page.html").read_text("utf-8")

    @app.get("/healthz")
    async def healthz() -> Response:
        if not batcher.alive:
            raise RefusedError(503, "the server is shutting down")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.post("/v1/predict")
    async def predict(request: Request) -> Response:
        content = _parse(await _body(request, limits.body))
        rows = content.get("rows", content)
        if isinstance(rows, dict):
            (result,) = await _predict([rows])
            return JSONResponse(result, 400 if "error" in result else 200)
        if not isinstance(rows, list) or len(rows) > limits.rows:
            raise RefusedError(
                400, f"'rows' must be a list of at most {limits.rows} rows"
            )
        return JSONResponse({"results": await _predict(rows)})

    async def _predict(rows: list[Any]) -> list[dict[str, Any]]:
        prepared = await run_in_threadpool(lambda: [_prepare(row) for row in rows])
        sound = [each for each in prepared if not isinstance(each, UserError)]
        metrics.rows("refused", len(rows) - len(sound))
        try:
            futures = batcher.submit(sound)
        except QueueFullError as error:
            metrics.rows("rejected", len(sound))
            raise RefusedError(
                429, "too many rows wait already; try again", **{"Retry-After": "1"}
            ) from error
        except ClosedError as error:
            raise RefusedError(503, "the server is shutting down") from error
        answered = asyncio.gather(*map(asyncio.wrap_future, futures))
        try:
            results = iter(await asyncio.wait_for(answered, limits.seconds))
        except TimeoutError as error:
            metrics.rows("failed", len(sound))
            raise RefusedError(
                504, f"no answer within {limits.seconds:g} seconds"
            ) from error
        except Exception as error:
            # What it was is in the server's log, and nothing of a client's concern.
            metrics.rows("failed", len(sound))
            raise RefusedError(500, "the server could not answer") from error
        metrics.rows("answered", len(sound))
        return [
            {"error": str(each)} if isinstance(each, UserError) else next(results)
            for each in prepared
        ]

    def _prepare(row: Any) -> Any:
        if not isinstance(row, dict):
            return UserError('a row must be an object such as {"prompt": ..., ...}')
        try:
            return engine.prepare(row)
        except UserError as error:
            return error

    @app.get("/v1/prompts")
    async def prompts() -> Response:
        described = [_described(prompt) for prompt in engine.store.prompts()]
        return JSONResponse({"prompts": described})

    @app.put("/v1/prompts/{name}")
    async def add(name: str, request: Request) -> Response:
        if not NAME.fullmatch(name):
            raise RefusedError(
                400, "a prompt's name has letters, digits, '.', '_' and '-' only"
            )
        if name in engine.store.names():
            raise RefusedError(409, f"there is a prompt {name!r} already: remove it")
        data = await _body(request, limits.prompt, "application/octet-stream")
        prompt = await run_in_threadpool(_add, name, data)
        return JSONResponse(_described(prompt), 201)

    def _add(name: str, data: bytes) -> StoredPrompt:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / f"{name}.safetensors"
            path.write_bytes(data)
            try:
                array, card = prompt_formats.load(path)
            except UserError as error:
                # Where the server keeps its files is nobody's business.
                raise UserError(str(error).replace(str(path), path.name)) from error
        return engine.store.add(name, array, card)

    @app.delete("/v1/prompts/{name}")
    async def remove(name: str) -> Response:
        try:
            engine.store.remove(name)
        except UserError as error:
            raise RefusedError(404, str(error)) from error
        return Response(status_code=204)

    return app


def _error(error: RefusedError) -> Response:
    return JSONResponse({"error": str(error)}, error.status, error.headers)


def _bears(request: Request, token: str) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    same = hmac.compare_digest(given.strip().encode(), token.encode())
    return scheme.lower() == "bearer" and same


async def _body(request: Request, limit: int, kind: str = "application/json") -> bytes:
    """The body, read no further than to its limit.

    Its type is asked for because a browser sends it across sites only if the server
    allows that, which this one does not.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != kind:
        raise RefusedError(415, f"send 'Content-Type: {kind}'")
    too_large = RefusedError(
        413, f"the body is larger than {limit} bytes", Connection="close"
    )
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RefusedError(
            400, f"the body is not UTF-8 (byte {error.start})"
        ) from error
    except (ValueError, RecursionError) as error:
        where = getattr(error, "pos", None)
        at = "" if where is None else f" (character {where})"
        raise RefusedError(400, f"the body is not JSON{at}") from error
    if not isinstance(content, dict):
        raise RefusedError(
            400, 'the body must be an object: a row, or {"rows": [row, ...]}'
        )
    return content


def _described(prompt: StoredPrompt) -> dict[str, Any]:
    labels = prompt.encoding.labels
    return {
        "name": prompt.name,
        "length": len(prompt.array),
        "columns": list(prompt.encoding.columns),
        "labels": None if labels is None else list(labels.names),
        "task": prompt.card.get("task"),
        "metric": prompt.card.get("metric"),
    }
