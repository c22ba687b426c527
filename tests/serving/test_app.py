# SPDX-License-Identifier: Apache-2.0
"""The HTTP interface: right answers, clear errors, nothing lost at the end."""

import asyncio
import http.client
import json
import os
import signal
import time

import pytest

httpx = pytest.importorskip("httpx")

from prompt_tuning import cli
from prompt_tuning.serving import server
from prompt_tuning.serving.limits import Limits

JSON = {"Content-Type": "application/json"}
BYTES = {"Content-Type": "application/octet-stream"}


def post(client, content, **kwargs):
    return client.post("/v1/predict", json=content, **kwargs)


def test_answers_a_row_as_the_engine_does(client, engine):
    row = {"prompt": "first", "text": "a fine film"}
    response = post(client, row)
    assert response.status_code == 200
    found, (expected,) = response.json(), engine.answer([row])
    assert found["answer"] == expected["answer"] and found["prompt"] == "first"
    assert found["scores"] == pytest.approx(expected["scores"], abs=1e-6)


def test_rows_of_many_prompts_share_a_request(client, engine):
    rows = [
        {"prompt": "free", "text": "what is this"},
        {"prompt": "pair", "premise": "a film", "hypothesis": "a story"},
        {"prompt": ["first", "second"], "text": "a dull film", "combine": "mean"},
    ]
    results = post(client, {"rows": rows}).json()["results"]
    expected = engine.answer(rows)
    assert [r["answer"] for r in results] == [e["answer"] for e in expected]
    assert [a["prompt"] for a in results[2]["answers"]] == ["first", "second"]


def test_a_bad_row_is_its_own_error(client):
    rows = [
        {"prompt": "frist", "text": "x"},
        {"prompt": "first", "text": "a fine film"},
        {"prompt": "first", "text": "  "},
        {"prompt": "pair", "text": "x"},
        {"prompt": "first", "text": "word " * 100},
        {"prompt": "first", "text": "\ud800"},
        "first",
    ]
    body = json.dumps({"rows": rows}).encode()
    response = client.post("/v1/predict", content=body, headers=JSON)
    assert response.status_code == 200
    results = response.json()["results"]
    assert "answer" in results[1]
    messages = [result.get("error", "") for result in results]
    for message, part in zip(
        messages,
        (
            "did you mean first",
            "",
            "empty",
            "premise",
            "more than 64",
            "half",
            "object",
        ),
        strict=True,
    ):
        assert part in message
    assert post(client, rows[0]).status_code == 400


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        (b'{"prompt": "first", ', 400, "(character 20)"),
        (b'{"prompt": "\xff"}', 400, "not UTF-8 (byte 12)"),
        (b"[1, 2]", 400, "the body is no JSON object"),
        (b'{"text": NaN}', 400, "NaN is no value of JSON"),
        (b'{"text": 1e999}', 400, "too large"),
        (b'{"text": "a", "text": "b"}', 400, "two values called 'text'"),
        (b"[" * 10_000, 400, "not JSON"),
        (b'{"rows": 3}', 400, "must be a list"),
        (b'{"rows": [1,2,3,4,5,6,7,8,9]}', 400, "at most 8"),
        (b'{"text": "' + b"x" * 20_000 + b'"}', 413, "larger than 20000 bytes"),
    ],
)
def test_a_bad_body_is_refused(client, body, status, part):
    response = client.post("/v1/predict", content=body, headers=JSON)
    assert response.status_code == status
    assert part in response.json()["error"]
    assert post(client, {"prompt": "first", "text": "x"}).status_code == 200


def test_a_body_without_a_length_is_not_read_beyond_its_limit(client):
    read = []

    def endless():
        for i in range(1000):
            read.append(i)
            yield b"x" * 1000

    response = client.post("/v1/predict", content=endless(), headers=JSON)
    assert response.status_code == 413


def test_other_sites_cannot_use_the_server(client):
    body = b'{"prompt": "first", "text": "x"}'
    plain = {"Content-Type": "text/plain"}
    assert client.post("/v1/predict", content=body, headers=plain).status_code == 415
    elsewhere = {"Host": "evil.example"}
    assert client.get("/v1/prompts", headers=elsewhere).status_code == 400


def test_a_token_is_asked_for(serving):
    with serving(token="secret") as client:
        row = {"prompt": "first", "text": "x"}
        assert client.get("/healthz").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "é"}):
            response = post(client, row, headers=_latin(headers))
            assert response.status_code == 401
            assert "token" in response.json()["error"]
        bearer = {"Authorization": "Bearer secret", "Host": "any.example"}
        assert post(client, row, headers=bearer).status_code == 200
        for path in ("/v1/prompts", "/metrics"):
            assert client.get(path).status_code == 401


def _latin(headers):
    return {name: value.encode("latin-1") for name, value in headers.items()}


def test_prompts_come_and_go_without_compiling(client, engine, save, tmp_path):
    names = [each["name"] for each in client.get("/v1/prompts").json()["prompts"]]
    assert names == ["first", "free", "pair", "second"]
    row = {"text": "a fine film"}
    before = post(client, {"prompt": "first", **row}).json()
    programs = engine.num_programs
    data = save(tmp_path / "new.safetensors", labels=["good", "bad"])
    added = client.put("/v1/prompts/new", content=data, headers=BYTES)
    assert added.status_code == 201
    assert added.json()["labels"] == ["good", "bad"] and added.json()["length"] == 3
    again = client.put("/v1/prompts/new", content=data, headers=BYTES)
    assert again.status_code == 409
    # The numbers are those of "first".
    assert post(client, {"prompt": "new", **row}).json()["scores"] == before["scores"]
    assert client.delete("/v1/prompts/new").status_code == 204
    assert client.delete("/v1/prompts/new").status_code == 404
    assert post(client, {"prompt": "new", **row}).status_code == 400
    assert engine.num_programs == programs


def test_a_bad_prompt_is_refused(client, save, tmp_path):
    put = lambda name, data: client.put(
        f"/v1/prompts/{name}", content=data, headers=BYTES
    )
    response = put("broken", b"not a prompt")
    assert response.status_code == 400
    assert "broken.safetensors" in response.json()["error"]
    assert str(tmp_path.parent.parent) not in response.json()["error"]
    path = tmp_path / "p.safetensors"
    data = save(path, base_model={"name": "other", "fingerprint": "0" * 64})
    response = put("other", data)
    assert response.status_code == 400 and "other" in response.json()["error"]
    assert put("large", b"x" * 20_001).status_code == 413
    assert put("-dash", b"").status_code == 400
    assert put("%2e%2e", b"").status_code in (400, 404, 405)


def test_a_full_queue_is_said_at_once(serving):
    with serving(max_queue=2) as client:
        rows = {"rows": [{"prompt": "first", "text": "x"}] * 3}
        response = post(client, rows)
        assert response.status_code == 429 and response.headers["retry-after"] == "1"
        assert post(client, {"rows": rows["rows"][:2]}).status_code == 200


def test_a_late_answer_is_an_error(serving):
    late = Limits(seconds=0.0001)
    with serving(limits=late, max_delay=0.5) as client:
        response = post(client, {"prompt": "first", "text": "x"})
        assert response.status_code == 504


def test_the_end_is_announced(serving):
    with serving() as client:
        client.batcher.close()
        assert client.get("/healthz").status_code == 503
        assert post(client, {"prompt": "first", "text": "x"}).status_code == 503


def test_the_interface_describes_itself(serving, engine):
    """Every route, with examples that are answered, and a page that fetches nothing."""
    with serving(token="secret") as client:
        schema = client.get("/openapi.json").json()
        page = client.get("/docs")
        bearer = {"Authorization": "Bearer secret"}
        for prompt in client.get("/v1/prompts", headers=bearer).json()["prompts"]:
            assert set(prompt) == set(_example(schema, "/v1/prompts", "get", "200"))
    assert set(schema["paths"]) == {
        "/healthz",
        "/metrics",
        "/v1/predict",
        "/v1/prompts",
        "/v1/prompts/{name}",
    }
    assert set(schema["paths"]["/v1/prompts/{name}"]) == {"put", "delete"}
    body = schema["paths"]["/v1/predict"]["post"]["requestBody"]
    examples = body["content"]["application/json"]["examples"]
    row = {**examples["a row"]["value"], "prompt": "first"}
    assert set(engine.answer([row])[0]) == set(
        _example(schema, "/v1/predict", "post", "200")
    )
    assert (
        page.status_code == 200
        and "script-src" in page.headers["content-security-policy"]
    )
    assert "POST /v1/predict" in page.text and "a fine film" in page.text
    assert "<script" not in page.text and "http" not in page.text.partition("<h2>")[0]


def _example(schema, path, method, status):
    content = schema["paths"][path][method]["responses"][status]["content"]
    (first, *_) = content["application/json"]["examples"].values()
    value = first["value"]
    return value["prompts"][0] if "prompts" in value else value


def test_metrics_count(client):
    post(client, {"rows": [{"prompt": "first", "text": "x"}, {"prompt": "?"}]})
    text = client.get("/metrics").text
    for line in (
        'prompt_tuning_rows_total{outcome="answered"} 1.0',
        'prompt_tuning_rows_total{outcome="refused"} 1.0',
        'prompt_tuning_http_responses_total{route="/v1/predict",status="200"} 1.0',
        "prompt_tuning_batch_rows_count 1.0",
        "prompt_tuning_prompts 4.0",
        "prompt_tuning_queue_rows 0.0",
    ):
        assert line in text


def test_only_loopback_is_open_without_a_token(capsys, folder, tiny_checkpoint):
    assert server.is_loopback("127.0.0.1") and server.is_loopback("::1")
    assert not server.is_loopback("0.0.0.0")
    arguments = ["serve", "--model", str(tiny_checkpoint), "--prompts", str(folder)]
    assert cli.main([*arguments, "--host", "0.0.0.0"]) == 2
    assert "--token_file" in capsys.readouterr().err


def test_a_taken_port_is_said(capsys, tiny_checkpoint):
    with server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        arguments = ["serve", "--model", str(tiny_checkpoint), "--port", str(port)]
        assert cli.main(arguments) == 2
    assert "choose another --port" in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_loses_no_accepted_request(process, folder, engine):
    rows = [
        {"prompt": name, "text": "a fine film " * (i % 5 + 1)}
        for i in range(200)
        for name in ("first", "second")
    ]
    expected = [row["answer"] for row in engine.answer(rows)]

    async def load(address, running):
        limits = httpx.Limits(max_connections=16)
        async with httpx.AsyncClient(limits=limits, timeout=60) as http:

            async def ask(row):
                try:
                    return await http.post(f"{address}/v1/predict", json=row)
                except (httpx.ConnectError, httpx.RemoteProtocolError, OSError):
                    return None  # Never accepted.
                except httpx.ReadError:
                    return None

            asked = [asyncio.create_task(ask(row)) for row in rows]
            while sum(task.done() for task in asked) < 40:
                await asyncio.sleep(0.005)
            running.send_signal(signal.SIGTERM)
            return await asyncio.gather(*asked)

    with process(folder) as (running, address):
        responses = asyncio.run(load(address, running))
        assert running.wait(30) == 0
    answered = [i for i, r in enumerate(responses) if r is not None]
    assert 40 <= len(answered) < len(rows)
    for i in answered:
        assert responses[i].status_code == 200
        assert responses[i].json()["answer"] == expected[i]


@pytest.mark.slow
def test_an_idle_connection_outlives_what_clients_keep(process, folder):
    with process(folder) as (_, address):
        connection = http.client.HTTPConnection(address.removeprefix("http://"))
        connection.request("GET", "/healthz")
        assert connection.getresponse().read()
        connection.auto_open = 0
        time.sleep(6)
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200


@pytest.mark.slow
def test_the_page_shows_answers_side_by_side(process, folder, engine, browser):
    from selenium.webdriver.common.by import By

    with process(folder) as (_, address):
        browser.implicitly_wait(10)
        browser.get(address)
        boxes = browser.find_elements(By.CSS_SELECTOR, "#choices input")
        for box in boxes:
            if box.is_selected() != (box.get_attribute("value") in _ASKED):
                box.click()
        browser.find_element(By.CSS_SELECTOR, "textarea[name=text]").send_keys(
            "a fine film"
        )
        browser.find_element(By.ID, "send").click()
        shown = {
            name: browser.find_element(
                By.CSS_SELECTOR, f"article[data-prompt={name}] p"
            ).text
            for name in _ASKED
        }
        errors = [e for e in browser.get_log("browser") if e["level"] == "SEVERE"]
        if target := os.environ.get("PROMPT_TUNING_SCREENSHOT"):
            browser.save_screenshot(target)
    rows = [{"prompt": name, "text": "a fine film"} for name in _ASKED]
    assert shown == {row["prompt"]: row["answer"] for row in engine.answer(rows)}
    assert not [e for e in errors if "favicon" not in e["message"]]


_ASKED = ("first", "free", "second")
