# SPDX-License-Identifier: Apache-2.0
"""The HTTP interface: rows in, answers out, prompts that come and go.

Requests are checked and encoded in threads, then answered in shared batches (see
`batcher`). A mistake in a row is that row's error; the others are answered.
"""

import asyncio
import base64
import contextlib
import hashlib
import importlib.resources
import pathlib
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse

from prompt_tuning import __version__, prompt_names
from prompt_tuning.checkpoints import prompt_formats
from prompt_tuning.errors import UserError
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.prepared_rows import Request as Prepared
from prompt_tuning.inference.store import StoredPrompt
from prompt_tuning.serving import documentation, requests
from prompt_tuning.serving import limits as checks
from prompt_tuning.serving.batcher import Batcher, ClosedError, QueueFullError
from prompt_tuning.serving.limits import Limits, RefusedError
from prompt_tuning.serving.metrics import Metrics
from prompt_tuning.serving.requests import Json

# Anyone may see these: they say nothing of what is served.
OPEN = ("/", "/docs", "/openapi.json", "/healthz")


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
    bodies = requests.Bodies(limits)
    # Files are looked at, and programs compiled, for one request at a time.
    storing = asyncio.Lock()
    compiler = ThreadPoolExecutor(1, "compiler")
    page_text = (
        importlib.resources.files("prompt_tuning.serving") / "page.html"
    ).read_text(encoding="utf-8")
    page_headers = {"Content-Security-Policy": _policy(page_text)}

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        compiler.shutdown(wait=False, cancel_futures=True)
        await run_in_threadpool(batcher.close)

    # Its own pages of documentation fetch scripts from elsewhere.
    app = FastAPI(
        title="prompt_tuning",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    described = documentation.ROUTES

    @app.middleware("http")
    async def counted(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        started = time.monotonic()
        try:
            requests.check_sender(request, token)
            if token and request.url.path not in OPEN:
                requests.check_token(request, token)
            response = await call_next(request)
        except RefusedError as refused:
            response = requests.error(refused)
        response.headers["X-Content-Type-Options"] = "nosniff"
        route = request.scope.get("route")
        metrics.response(
            getattr(route, "path", "other"),
            response.status_code,
            time.monotonic() - started,
        )
        return response

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        return requests.error(error)

    @app.exception_handler(prompt_names.NameTakenError)
    async def taken(_: Request, error: prompt_names.NameTakenError) -> Response:
        return requests.error(RefusedError(409, str(error)))

    @app.exception_handler(UserError)
    async def mistaken(_: Request, error: UserError) -> Response:
        return requests.error(RefusedError(400, str(error)))

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(page_text, headers=page_headers)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        # It has no script to run.
        return HTMLResponse(documentation.page(app.openapi()), headers=page_headers)

    @app.get("/healthz", **described["healthz"])
    async def healthz() -> Response:
        if not batcher.alive:
            raise RefusedError(503, "the server is shutting down")
        return Json({"status": "ok"})

    @app.get("/metrics", **described["prometheus"])
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.post("/v1/predict", **described["predict"])
    async def predict(request: Request) -> Response:
        async with bodies.read(request, limits.body) as body:
            content = await run_in_threadpool(requests.parse, body)
        rows = content.get("rows", content)
        if isinstance(rows, dict):
            (result,) = await _predict([rows])
            return Json(result, 400 if "error" in result else 200)
        if not isinstance(rows, list):
            raise RefusedError(400, "'rows' must be a list of rows")
        return Json({"results": await _predict(rows)})

    async def _predict(rows: list[Any]) -> list[dict[str, Any]]:
        checks.check_rows(rows, limits)
        prepared = await run_in_threadpool(lambda: [_prepare(row) for row in rows])
        sound = [each for each in prepared if not isinstance(each, UserError)]
        checks.check_work(sound, limits)
        metrics.rows("refused", len(rows) - len(sound))
        try:
            async with asyncio.timeout(limits.seconds):
                results = iter(await _answer(sound))
        except TimeoutError as error:
            metrics.rows("failed", len(sound))
            raise RefusedError(
                504, f"no answer within {limits.seconds:g} seconds"
            ) from error
        metrics.rows("answered", len(sound))
        return [
            {"error": requests.shortened(str(each))}
            if isinstance(each, UserError)
            else next(results)
            for each in prepared
        ]

    async def _answer(sound: list[Prepared]) -> list[dict[str, Any]]:
        if not engine.is_compiled_for(sound):
            # Where a request is given up before its turn, nothing is compiled for it.
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(compiler, engine.compile_for, sound)
        try:
            futures = batcher.submit(sound)
        except QueueFullError as error:
            metrics.rows("rejected", len(sound))
            raise RefusedError(
                429, "too many rows wait already; try again", **{"Retry-After": "1"}
            ) from error
        except ClosedError as error:
            raise RefusedError(503, "the server is shutting down") from error
        try:
            return await asyncio.gather(*map(asyncio.wrap_future, futures))
        except Exception as error:
            # What it was is in the server's log, and nothing of a client's concern.
            metrics.rows("failed", len(sound))
            raise RefusedError(500, "the server could not answer") from error

    def _prepare(row: Any) -> Any:
        if not isinstance(row, dict):
            return UserError('a row must be an object such as {"prompt": ..., ...}')
        try:
            return engine.prepare(row)
        except UserError as error:
            return error

    @app.get("/v1/prompts", **described["prompts"])
    async def prompts() -> Response:
        found = [_described(prompt) for prompt in engine.store.prompts()]
        # Where the server keeps its files is nobody's business.
        model = pathlib.PurePath(engine.store.base_model).name
        return Json({"base_model": model, "prompts": found})

    @app.put("/v1/prompts/{name}", **described["add"])
    async def add(name: str, request: Request) -> Response:
        prompt_names.check(name)
        # Before its body is read; `put` asks again.
        prompt_names.check_free(name, engine.store.names())
        kind = "application/octet-stream"
        async with bodies.read(request, limits.prompt, kind) as data, storing:
            prompt = await run_in_threadpool(_add, name, data)
        return Json(_described(prompt), 201)

    def _add(name: str, data: bytes) -> StoredPrompt:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / f"{name}.safetensors"
            path.write_bytes(data)
            try:
                array, card = prompt_formats.load(path)
            except UserError as error:
                # Where the server keeps its files is nobody's business.
                raise UserError(str(error).replace(str(path), path.name)) from error
        store = engine.store
        checks.check_room(array, store.prompts(), limits)
        prompt = store.make(name, array, card, store.known_vocabulary(card))
        if prompt.encoding.labels is not None:
            checks.check_labels(prompt.encoding.labels, limits)
        return store.put(prompt)

    @app.delete("/v1/prompts/{name}", **described["remove"])
    async def remove(name: str) -> Response:
        try:
            engine.store.remove(name)
        except UserError as error:
            raise RefusedError(404, str(error)) from error
        return Response(status_code=204)

    return app


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


def _policy(page: str) -> str:
    """What the page may load and run: its own script, and nothing from elsewhere."""
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; connect-src 'self'; "
        "style-src 'unsafe-inline'; img-src 'self'; form-action 'none'; "
        "base-uri 'none'; frame-ancestors 'none'"
    )
