# SPDX-License-Identifier: Apache-2.0
"""The base model, and a stand-in for the hub: the part of its HTTP API that prompts need.

Repositories are made, committed to and read as on the real one; a token is needed to
write. What it does not know it answers with 404.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

import pytest

import prompt_tuning as pt


class Hub(http.server.ThreadingHTTPServer):
    """Serves on a free port of 127.0.0.1; a context manager.

    Attributes:
      repositories: commits of each repository, oldest first: (id, files by path).
      private: which of them are to be private.
    """

    daemon_threads = True
    token = "hf_right"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: dict[str, bool | None] = {}
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        """Says nothing."""

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = urllib.parse.urlparse(self.path).path
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self._json({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self._json({"files": [{"path": name, **answer} for name in names]})
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            return self._commit(match[1], [json.loads(x) for x in body.splitlines()])
        return self._unknown()

    def _create(self, wanted):
        name = f"{wanted['organization']}/{wanted['name']}"
        status = 409 if name in self.server.repositories else 200
        self.server.repositories.setdefault(name, [])
        private = wanted.get("visibility") == "private"
        self.server.private.setdefault(name, private)
        self._json({"url": f"{self.server.url}/{name}", "id": name}, status)

    def _commit(self, name, lines):
        commits = self.server.repositories[name]
        files = dict(commits[-1][1]) if commits else {}
        for line in lines:
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                content = base64.b64decode(line["value"]["content"])
                files[line["value"]["path"]] = content
        commit = hashlib.sha1(str((len(commits), sorted(files.items()))).encode())
        commits.append((commit.hexdigest(), files))
        url = f"{self.server.url}/{name}/commit/{commit.hexdigest()}"
        self._json({"commitUrl": url, "commitOid": commit.hexdigest()})

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        if match := re.fullmatch(r"/api/models/(.+)/revision/(.+)", path):
            if (found := self._find(match[1], match[2])) is None:
                return self._json({"error": "Repository not found"}, 404)
            siblings = [{"rfilename": name} for name in found[1]]
            return self._json({"id": match[1], "sha": found[0], "siblings": siblings})
        if match := re.fullmatch(r"/api/models/(.+)/tree/([^/]+)", path):
            if (found := self._find(match[1], match[2])) is None:
                return self._json({"error": "Repository not found"}, 404)
            blobs = {name: hashlib.sha1(data) for name, data in found[1].items()}
            return self._json(
                [
                    {
                        "type": "file",
                        "path": name,
                        "size": len(found[1][name]),
                        "oid": blob.hexdigest(),
                    }
                    for name, blob in blobs.items()
                ]
            )
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            found = self._find(match[1], match[2])
            if found is not None and match[3] in found[1]:
                return self._file(found[0], found[1][match[3]])
        return self._unknown()

    do_HEAD = do_GET

    def _find(self, name, revision):
        commits = self.server.repositories.get(name) or []
        named = [each for each in commits if revision in ("main", each[0])]
        return named[-1] if named else None

    def _file(self, commit, content):
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "Content-Type": "application/octet-stream",
        }
        self._send(200, content, headers)

    def _unknown(self):
        self._json({"error": "not known to the stand-in"}, 404)

    def _json(self, content, status=200):
        body = json.dumps(content).encode()
        self._send(status, body, {"Content-Type": "application/json"})

    def _send(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that the client asks in place of the real one, with a cache of its own."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        template = template.replace("https://huggingface.co", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    """The tiny base model."""
    return pt.load(tiny_checkpoint)
