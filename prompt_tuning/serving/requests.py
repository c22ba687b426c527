# SPDX-License-Identifier: Apache-2.0
"""What a request may be: who may send it, how large it is, and in what form."""

import asyncio
import contextlib
import hmac
import json
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from prompt_tuning.data.rows import parse_object
from prompt_tuning.serving.limits import Limits, RefusedError
from prompt_tuning.serving.server import is_loopback

# Characters of an error that are sent: it may quote what was received.
LONGEST_ERROR = 500


class Json(JSONResponse):
    """JSON in ASCII: also what quotes half a character can be sent."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode("ascii")


def error(refused: RefusedError) -> Response:
    """The answer that says why."""
    return Json({"error": shortened(str(refused))}, refused.status, refused.headers)


def shortened(message: str) -> str:
    """An error that quotes no more than can be read."""
    if len(message) <= LONGEST_ERROR:
        return message
    return f"{message[:LONGEST_ERROR]}..."


def check_sender(request: Request, token: str | None) -> None:
    """Refuses web pages of other sites, and without a token all names but loopback's.

    A page may make a browser send requests here, and may have its own name lead to
    loopback; in both cases the browser says where the page is from.

    Raises:
      RefusedError: the request is not this server's own page's, nor a program's.
    """
    host = request.headers.get("host", "")
    if token is None and not is_loopback(_name(host)):
        raise RefusedError(
            400, "without a token the server answers to localhost and 127.0.0.1 only"
        )
    origin = request.headers.get("origin")
    if origin is not None and urllib.parse.urlsplit(origin).netloc != host:
        raise RefusedError(403, "pages of other sites may not use the server")


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def check_token(request: Request, token: str) -> None:
    """Refuses what does not bear the token; how long that takes says nothing of it.

    Raises:
      RefusedError: it bears none or another.
    """
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    same = hmac.compare_digest(given.strip().encode(), token.encode())
    if scheme.lower() != "bearer" or not same:
        raise RefusedError(
            401,
            "give the server's token in the header 'Authorization: Bearer ...'",
            **{"WWW-Authenticate": "Bearer"},
        )


class Bodies:
    """Receives bodies, within bounds for each and for all together."""

    def __init__(self, limits: Limits):
        """Holds nothing yet."""
        self._limits = limits
        self._held = 0

    @contextlib.asynccontextmanager
    async def read(
        self, request: Request, limit: int, kind: str = "application/json"
    ) -> AsyncIterator[bytes]:
        """Yields a body, which is read no further than to ``limit`` bytes.

        Its type is asked for because a browser sends it across sites only if the server
        allows that, which this one does not.

        Raises:
          RefusedError: another type, too large, too slow, or too many at once.
        """
        if request.headers.get("content-type", "").partition(";")[0].strip() != kind:
            raise RefusedError(415, f"send 'Content-Type: {kind}'")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 20 or int(length) > limit:
            raise _too_large(limit)
        body, seconds = bytearray(), self._limits.body_seconds
        try:
            try:
                async with asyncio.timeout(seconds):
                    await self._receive(request, body, limit)
            except TimeoutError as late:
                raise RefusedError(
                    408,
                    f"the body was not sent within {seconds:g} seconds",
                    Connection="close",
                ) from late
            yield bytes(body)
        finally:
            self._held -= len(body)

    async def _receive(self, request: Request, body: bytearray, limit: int) -> None:
        async for chunk in request.stream():
            body += chunk
            self._held += len(chunk)
            if len(body) > limit:
                raise _too_large(limit)
            if self._held > self._limits.bodies:
                raise RefusedError(
                    503,
                    "too much is being sent at once; try again",
                    **{"Retry-After": "1", "Connection": "close"},
                )


def _too_large(limit: int) -> RefusedError:
    return RefusedError(
        413, f"the body is larger than {limit} bytes", Connection="close"
    )


def parse(body: bytes) -> dict[str, Any]:
    """The object that a body holds in JSON, as a row's of a file is read.

    Raises:
      RefusedError: it is not UTF-8.
      UserError: it holds something else.
    """
    try:
        return parse_object(body.decode("utf-8"), "the body")
    except UnicodeDecodeError as wrong:
        raise RefusedError(
            400, f"the body is not UTF-8 (byte {wrong.start})"
        ) from wrong
