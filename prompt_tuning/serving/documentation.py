# SPDX-License-Identifier: Apache-2.0
"""What the server says of its interface: OpenAPI, and the page made of it.

FastAPI's own pages fetch scripts from elsewhere; this one has none.
"""

import html
import json
from collections.abc import Iterator, Mapping
from typing import Any

_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>prompt_tuning</title>
<style>
  :root { color-scheme: light dark; }
  body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 50rem; padding: 0 1rem; }
  pre { overflow: auto; padding: .6rem; border: 1px solid #8886; }
</style>
<h1>prompt_tuning</h1>
<p><a href="/openapi.json">OpenAPI</a>, <a href="/">page</a></p>
"""
_ROW = {"prompt": "reviews", "text": "a fine film"}
_SCORES = {"good": 0.9, "bad": 0.1}
_ANSWER = {"prompt": "reviews", "answer": "good", "scores": _SCORES}
_PROMPT = {
    "name": "reviews",
    "length": 20,
    "columns": ["text"],
    "labels": ["good", "bad"],
    "task": "reviews",
    "metric": {"accuracy": 90.1},
}
_ERROR = {"error": "no prompt is called 'review': did you mean reviews"}
_OBJECT = {"type": "object"}


def _content(kind: str, schema: Mapping[str, Any], **examples: Any) -> dict[str, Any]:
    named = {name.replace("_", " "): {"value": each} for name, each in examples.items()}
    return {kind: {"schema": schema, **({"examples": named} if named else {})}}


def _answers(description: str, **examples: Any) -> dict[str, Any]:
    content = _content("application/json", _OBJECT, **examples)
    return {"description": description, "content": content}


def _errors(*statuses: int) -> dict[int, dict[str, Any]]:
    said = {
        400: "A mistake in the request; the message says which.",
        401: "The server's token is missing or another.",
        404: "There is no such prompt.",
        408: "The body did not come in time.",
        409: "There is a prompt of that name.",
        413: "More than the server takes.",
        415: "Another Content-Type is wanted.",
        429: "Too many rows wait; try again after Retry-After.",
        503: "The server is ending, or too much is being sent; try again.",
        504: "No answer in time.",
    }
    return {status: _answers(said[status], an_error=_ERROR) for status in statuses}


# What FastAPI is told of each route, by the name of its function.
ROUTES: Mapping[str, Mapping[str, Any]] = {
    "predict": {
        "summary": "Answer a row, or a list of rows.",
        "description": "A row is `prompt`, the name of a prompt or a list of names, and "
        "the prompt's columns, or `text`. It may have `labels` to rank in place of the "
        "prompt's own, `calibrate`, and `combine` where it names several prompts: vote, "
        "mean or best. A row of a list that cannot be answered has an `error` there.",
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "content": _content(
                    "application/json",
                    _OBJECT,
                    a_row=_ROW,
                    several_rows={
                        "rows": [
                            {**_ROW, "labels": ["funny", "sad"], "calibrate": True},
                            {
                                "prompt": ["rte_0", "rte_1"],
                                "combine": "vote",
                                "premise": "It rains.",
                                "hypothesis": "It is wet.",
                            },
                        ]
                    },
                ),
            }
        },
        "responses": {
            200: _answers(
                "The answers.", of_a_row=_ANSWER, of_rows={"results": [_ANSWER]}
            ),
            **_errors(400, 401, 408, 413, 415, 429, 503, 504),
        },
    },
    "prompts": {
        "summary": "The base model and its prompts.",
        "responses": {
            200: _answers(
                "What is served.",
                prompts={"base_model": "t5_1_1_mini", "prompts": [_PROMPT]},
            ),
            **_errors(401),
        },
    },
    "add": {
        "summary": "Add a prompt: the bytes of its file.",
        "description": "It lives in the server's memory. Names have letters, digits, "
        "'.', '_' and '-' only.",
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "content": _content(
                    "application/octet-stream", {"type": "string", "format": "binary"}
                ),
            }
        },
        "responses": {
            201: _answers("The prompt.", prompt=_PROMPT),
            **_errors(400, 401, 408, 409, 413, 415, 503),
        },
    },
    "remove": {
        "summary": "Remove a prompt; rows that are under way are still answered.",
        "responses": {204: {"description": "It is gone."}, **_errors(401, 404)},
    },
    "healthz": {
        "summary": "Whether rows are taken.",
        "responses": {200: _answers("They are.", ok={"status": "ok"}), **_errors(503)},
    },
    "prometheus": {
        "summary": "Figures for Prometheus.",
        "responses": {200: {"description": "Text."}, **_errors(401)},
    },
}


def page(schema: Mapping[str, Any]) -> str:
    """The interface as a page of HTML, from what FastAPI's ``openapi()`` gives."""
    parts = [_HEAD]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            parts += _operation(f"{method.upper()} {path}", operation)
    return "".join(parts)


def _operation(title: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2><code>{html.escape(title)}</code></h2>"
    for key in ("summary", "description"):
        if text := operation.get(key):
            yield f"<p>{html.escape(text)}</p>"
    if body := operation.get("requestBody"):
        yield from _examples(body)
    for status, answer in operation["responses"].items():
        yield f"<h3>{status}: {html.escape(answer['description'])}</h3>"
        if int(status) < 300:
            yield from _examples(answer)


def _examples(described: Mapping[str, Any]) -> Iterator[str]:
    for kind, content in described.get("content", {}).items():
        for name, example in content.get("examples", {kind: {}}).items():
            text = json.dumps(example["value"], indent=2) if example else kind
            yield f"<p>{html.escape(name)}</p><pre>{html.escape(text)}</pre>"
