# SPDX-License-Identifier: Apache-2.0
"""Whoever may send a request may not harm the server, nor keep the others waiting."""

import dataclasses
import json
import math
import re
import resource
import shutil
import socket
import sys
import time
import urllib.parse

import numpy as np
import pytest

httpx = pytest.importorskip("httpx")

from prompt_tuning import cli, files
from prompt_tuning.checkpoints import cards
from prompt_tuning.data import vocabularies
from prompt_tuning.errors import UserError
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.serving import connections, limits

ROW = {"prompt": "first", "text": "a fine film"}
JSON = {"Content-Type": "application/json"}
BYTES = {"Content-Type": "application/octet-stream"}


def post(client, content):
    """Posts JSON, which may hold what is none."""
    body = json.dumps(content).encode()
    return client.post("/v1/predict", content=body, headers=JSON)


def put(client, name, data):
    return client.put(f"/v1/prompts/{name}", content=data, headers=BYTES)


def refused(response, part, status=400):
    assert response.status_code == status, response.text
    message = response.json()["error"]
    assert part in message and len(message) < 600
    return True


def unchecked(path, **card):
    """A prompt file whose card nobody has looked at."""
    array = np.zeros((3, 16), np.float32)
    card = {"length": 3, "width": 16, **card}
    files.write(path, {"prompt": array}, {cards.CARD: json.dumps(card)})
    return path.read_bytes()


@pytest.mark.parametrize(
    ("card", "part"),
    [
        ({"metric": {"accuracy": math.inf}}, "not finite"),
        ({"metric": {"accuracy": "x"}}, "metric.accuracy"),
        ({"task": "\ud800"}, "half a character"),
        ({"base_model": "x"}, "base_model"),
        ({"template": 3}, "template"),
        ({"template": "{prompt:0:3000000000} {text}"}, "beyond position"),
        ({"template": "{prompt:0:9} {text}"}, "names position"),
        ({"labels": ["good"]}, "labels"),
        ({"labels": [f"{i}" for i in range(1001)]}, "labels"),
        ({"labels": [f"film {i}" for i in range(1000)]}, "fewer or shorter"),
        ({"notes": "x" * 10}, "notes"),
    ],
)
def test_a_card_is_sound_before_it_is_kept(client, source, tmp_path, card, part):
    facts = {"base_model": source.identity, "vocabulary": "mini"}
    before = client.get("/v1/prompts").json()
    data = unchecked(tmp_path / "bad.safetensors", **{**facts, **card})
    assert refused(put(client, "bad", data), part)
    assert client.get("/v1/prompts").json() == before
    assert post(client, ROW).status_code == 200


def test_what_a_card_names_is_not_opened(client, save, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(vocabularies, "load", opened.append)
    copy = tmp_path / "copy.model"
    shutil.copy(vocabularies.path_of("mini"), copy)
    for name in ("gs://bucket/spiece.model", "http://host/x", str(copy), "t5"):
        data = save(
            tmp_path / "p.safetensors", vocabulary=name, vocabulary_fingerprint="0" * 64
        )
        assert refused(put(client, "named", data), "none of those that are in use")
    assert not opened
    # The same pieces under another name are known.
    own = vocabularies.SentencePieceVocabulary(copy.read_bytes(), "mini")
    data = save(
        tmp_path / "p.safetensors",
        vocabulary="/nowhere/spiece.model",
        vocabulary_fingerprint=own.fingerprint,
    )
    assert put(client, "named", data).status_code == 201
    assert client.delete("/v1/prompts/named").status_code == 204


def test_memory_for_prompts_is_bounded(serving, save, tmp_path):
    data = save(tmp_path / "p.safetensors")
    with serving(limits=limits.Limits(stored=20 * 16 * 4)) as client:
        assert put(client, "p0", data).status_code == 201
        assert refused(put(client, "p1", data), "remove some", 413)
        assert client.delete("/v1/prompts/p0").status_code == 204


def test_work_of_a_request_is_bounded(serving):
    at = time.monotonic()
    many = [f"word {i}" for i in range(5000)]
    with serving(limits=limits.Limits()) as roomy:
        assert refused(post(roomy, {**ROW, "labels": many}), "more than 1000")
        assert refused(post(roomy, {**ROW, "labels": many[:800]}), "fewer or shorter")
        long = ["word " * 3500, "x"]
        assert refused(post(roomy, {**ROW, "labels": long}), "500 characters")
        names = ["first", *(f"p{i}" for i in range(40))]
        assert refused(post(roomy, {**ROW, "prompt": names}), "at most 32 prompts")
        rows = [{**ROW, "prompt": ["first", "second"]}] * 129
        assert refused(post(roomy, {"rows": rows}), "at most 256 rows")
        wide = {**ROW, "labels": [f"film {i}" for i in range(200)]}
        assert refused(post(roomy, {"rows": [wide] * 100}), "fewer at a time", 413)
    assert time.monotonic() - at < 10


def test_a_template_repeats_no_text_without_end(client, save, tmp_path):
    data = save(tmp_path / "p.safetensors", template="{text} " * 1000)
    assert put(client, "echo", data).status_code == 201
    row = {"prompt": "echo", "text": "x" * 1500}
    assert refused(post(client, row), "1501000 characters")
    assert client.delete("/v1/prompts/echo").status_code == 204


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"prompt": "\ud800", "text": "x"}, "no prompt"),
        ({"prompt": "x" * 5000, "text": "x"}, "no prompt"),
        ({**ROW, "labels": ["\ud800", "x"]}, "texts"),
        ({**ROW, "labels": {"a": 1}}, "list"),
        ({**ROW, "combine": "vote"}, "several"),
        ({**ROW, "calibrate": "yes"}, "true or false"),
    ],
)
def test_odd_values_are_answered_with_errors(client, row, part):
    assert refused(post(client, row), part)


def test_nested_values_are_answered(client):
    body = b'{"prompt": "first", "text": ' + b"[" * 900 + b"]" * 900 + b"}"
    response = client.post("/v1/predict", content=body, headers=JSON)
    assert response.status_code in (200, 400)


def test_calibration_needs_room_for_what_says_nothing(client, save, tmp_path):
    text = "good " * 57
    data = save(tmp_path / "p.safetensors", template=text + "{text}", labels=["a", "b"])
    assert put(client, "tight", data).status_code == 201
    row = {"prompt": "tight", "text": "a", "calibrate": True}
    response = post(client, row)
    assert refused(response, "no room to calibrate")
    assert client.delete("/v1/prompts/tight").status_code == 204


def test_unusual_labels_are_compiled_beside_what_runs(client, engine):
    """Nothing is left for the thread that answers everyone."""
    compiled = []
    programs = engine._programs
    own = programs._given

    def watched(*key):
        import threading

        compiled.append(threading.current_thread().name)
        return own(*key)

    programs._given = watched
    try:
        labels = ["one", "two", "three", "four", "five"]
        assert post(client, {**ROW, "labels": labels}).status_code == 200
    finally:
        programs._given = own
    assert compiled and all(name.startswith("compiler") for name in compiled)


@pytest.mark.parametrize("token", [None, "secret"])
def test_other_sites_and_names_are_refused(serving, token):
    bearer = {"Authorization": f"Bearer {token}"} if token else {}
    with serving(token=token) as client:

        def status(method, **headers):
            path = "/v1/prompts/nobody" if method != "GET" else "/v1/prompts"
            return client.request(method, path, headers={**bearer, **headers})

        for origin in ("http://evil.example", "null", "http://localhost:81"):
            for method in ("GET", "PUT", "DELETE", "POST"):
                assert refused(status(method, Origin=origin), "other sites", 403)
        same = {"Origin": "http://localhost"}
        assert status("GET", **same).status_code == 200
        assert status("DELETE", **same).status_code == 404
        rebound = 400 if token is None else 200
        for host in ("evil.example", "localhost.evil.example:80", "127.0.0.1.nip.io"):
            assert status("GET", Host=host).status_code == rebound
        for host in ("localhost:8000", "127.0.0.1:80", "[::1]:8000", "127.0.0.2"):
            assert status("GET", Host=host).status_code == 200


def test_the_model_is_named_without_its_path(client, tiny_checkpoint):
    found = client.get("/v1/prompts").json()["base_model"]
    assert found and "/" not in found and found in str(tiny_checkpoint)


def test_the_page_runs_its_own_script_alone(client):
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    assert response.text.count("<script") == 1 and "innerHTML" not in response.text
    assert response.headers["x-content-type-options"] == "nosniff"


def test_bad_prompts_of_a_folder_are_named_and_left_out(source, folder, tmp_path):
    for path in folder.iterdir():
        shutil.copy(path, tmp_path)
    unchecked(tmp_path / "bad1.safetensors", base_model="x", vocabulary="mini")
    unchecked(tmp_path / "bad2.safetensors", template=3, **_facts(source))
    unchecked(tmp_path / "bad3.safetensors", template="{prompt:0:99}", **_facts(source))
    (tmp_path / "bad4.safetensors").write_bytes(b"x" * 100)
    store = PromptStore(source, 64)
    found = store.load_folder(tmp_path)
    assert sorted(found) == ["bad1", "bad2", "bad3", "bad4"]
    assert sorted(store.names()) == ["first", "free", "pair", "second"]
    assert all(name in reason and "\n" not in reason for name, reason in found.items())


def test_the_prompts_of_the_faults(shared, source):
    store = PromptStore(source, 64)
    for path in sorted((shared / "faults").glob("prompt_*.safetensors")):
        with pytest.raises(UserError) as caught:
            store.load(path)
        assert "\n" not in str(caught.value)


def test_the_labels_of_the_faults(shared, serving):
    body = (shared / "faults" / "label_bomb.json").read_bytes()
    with serving(limits=limits.Limits()) as roomy:
        row = json.loads(body)
        row = {**row, "prompt": "first"}
        at = time.monotonic()
        assert refused(post(roomy, row), "500 characters")
        assert time.monotonic() - at < 5
        assert post(roomy, ROW).status_code == 200


def _facts(source):
    return {"base_model": source.identity, "vocabulary": "mini"}


@pytest.mark.parametrize(
    ("flag", "value"),
    [("timeout", "-1"), ("timeout", "nan"), ("max_batch", "0"), ("port", "70000")],
)
def test_values_out_of_range(flag, value, tiny_checkpoint, capsys):
    arguments = ["serve", "--model", str(tiny_checkpoint), f"--{flag}", value]
    assert cli.main(arguments) == 2
    assert re.search(rf"--{flag}=\S+ must be a .*number from", capsys.readouterr().err)


def connect(address):
    parts = urllib.parse.urlsplit(address)
    return socket.create_connection((parts.hostname, parts.port), timeout=15)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
from prompt_tuning.serving import connections, limits
connections.HEADER_SECONDS = 2.0
from prompt_tuning import cli
sys.exit(cli.main(sys.argv[4:]))
"""


@pytest.mark.slow
def test_half_sent_requests_keep_nobody_out(process, folder):
    assert connections.most() < resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    with process(folder, prefix=(sys.executable, "-c", LIMITED)) as (_, address):
        half = [connect(address) for _ in range(200)]
        for each in half:
            each.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\n")
        response = httpx.post(f"{address}/v1/predict", json=ROW, timeout=20)
        assert response.status_code == 200
        # The header was never whole, so that the server has closed them all by now.
        time.sleep(3)
        for each in half:
            each.settimeout(5)
            try:
                assert each.recv(1) == b""
            except ConnectionError:
                pass
            each.close()


def test_a_body_has_to_come(serving):
    slow = dataclasses.replace(limits.Limits(), body_seconds=0.3)

    def trickle():
        for _ in range(20):
            yield b" "
            time.sleep(0.1)

    # The client of tests sends a body only when it is complete; `Bodies` is asked.
    import asyncio

    from prompt_tuning.serving import requests

    class Request:
        headers = {"content-type": "application/json"}  # noqa: RUF012

        async def stream(self):
            for chunk in trickle():
                yield chunk
                await asyncio.sleep(0.05)

    async def read():
        bodies = requests.Bodies(slow)
        with pytest.raises(limits.RefusedError, match="not sent within") as caught:
            async with bodies.read(Request(), 1000):
                pass
        assert caught.value.status == 408 and bodies._held == 0
        tight = requests.Bodies(dataclasses.replace(slow, bodies=1, body_seconds=9))
        with pytest.raises(limits.RefusedError, match="at once"):
            async with tight.read(Request(), 1000):
                pass

    asyncio.run(read())
