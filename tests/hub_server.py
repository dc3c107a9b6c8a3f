# SPDX-License-Identifier: Apache-2.0
"""A small Hugging Face Hub on the loopback interface, for pushes and downloads over real HTTP.

It keeps repositories in memory and speaks the routes that huggingface_hub uses for models; it knows nothing of hfkdq.
Importing `loopback_hub` into a test module or conftest.py makes the fixture `hub_server` known there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import validate_repo_id

BREAK = 0  # in place of a status: hang up without an answer
LARGE_SUFFIXES = (".safetensors", ".onnx", ".onnx_data", ".png")
LARGE_SIZE = 10_000_000


class Refused(Exception):
    """An answer of 4xx: status, message, and the code that huggingface_hub tells errors apart by."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any):
        super().__init__(message)
        self.status, self.code, self.body = status, code, body or {"error": message}


@dataclass
class Repository:
    """Trees of files by commit, and the commit that each branch points to."""

    private: bool = False
    trees: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    refs: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    messages: list[str] = field(default_factory=list)

    def commit_of(self, revision: str) -> str:
        sha = self.refs.get(revision, revision)
        if sha not in self.trees:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.trees[self.commit_of(revision)]


def is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE_SUFFIXES) or size > LARGE_SIZE


def object_id(path: str, data: bytes) -> str:
    """SHA-256 for large files, git's blob hash for the others: what the Hub gives as ETag."""
    if is_large(path, len(data)):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _pointer(path: str, data: bytes) -> dict[str, Any]:
    """What the Hub says besides of a large file, which lies elsewhere."""
    oid = object_id(path, data)
    return {"lfs": {"oid": oid, "size": len(data), "pointerSize": 130}} if is_large(path, len(data)) else {}


class HubServer:
    """The server and what it saw.

    Attributes:
        url: its endpoint, for `HF_ENDPOINT`.
        token: the only access token it accepts; its owner is `"me"`.
        role: what the token may do.
        repositories: by id, such as `"me/tiny"`.
        requests: `(route, authorization)` of every request, in order.
    """

    def __init__(self) -> None:
        self.token = "hf_" + "LoopbackTestToken" * 2
        self.role = "write"
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self._failures: dict[str, deque[tuple[int, str, dict[str, str]]]] = {}
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def commits(self) -> int:
        """How many commits were made in all repositories."""
        return sum(len(repository.messages) for repository in self.repositories.values())

    def routes(self) -> list[str]:
        return [route for route, _ in self.requests]

    def fail_next(
        self,
        route: str,
        status: int,
        times: int = 1,
        message: str = "told to fail",
        headers: dict[str, str] | None = None,
    ) -> None:
        """Answers the next requests to `route` with `status`, or hangs up for `BREAK`; see `ROUTES` for the names."""
        if route not in ROUTES.values():
            raise ValueError(f"no route {route!r}; there are {', '.join(ROUTES.values())}")
        self._failures.setdefault(route, deque()).extend([(status, message, headers or {})] * times)

    def stop_failing(self) -> None:
        """Forgets what `fail_next` still has in store."""
        self._failures.clear()

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process that takes this server for the Hub, with its caches in `home`."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        return {
            **inherited,
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def answer(self, handler: _Handler, method: str) -> None:
        url = urlsplit(handler.path)
        body = handler.read_body()
        route, match = find_route(method, url.path)
        if match is None:
            return handler.send_json(404, {"error": f"no route for {method} {url.path}"})
        authorization = handler.headers.get("Authorization")
        parts = {key: unquote(value) for key, value in match.groupdict(default="").items()}
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        with self._lock:
            self.requests.append((route, authorization))
            failures = self._failures.get(route)
            if failures:
                status, message, headers = failures.popleft()
                return handler.hang_up() if status == BREAK else handler.send_json(status, {"error": message}, headers)
            try:
                self._authorize(route, authorization, parts.get("repo"))
                answer = getattr(self, f"_{route}")(body, query=query, **parts)
            except Refused as refused:
                headers = {"X-Error-Code": refused.code, "X-Error-Message": str(refused)}
                return handler.send_json(refused.status, refused.body, {k: v for k, v in headers.items() if v})
        if isinstance(answer, tuple):
            handler.send_bytes(200, *answer)
        else:
            handler.send_json(200, answer)

    def _authorize(self, route: str, authorization: str | None, repo: str | None) -> None:
        if authorization == f"Bearer {self.token}" or route in ("lfs_upload", "validate_yaml"):
            return
        if authorization is not None:
            raise Refused(401, "Invalid credentials in Authorization header")
        known = self.repositories.get(repo or "")
        if route not in ("info", "tree", "resolve") or (known is not None and known.private):
            raise Refused(401, "Invalid username or password.")

    def _repository(self, repo: str) -> Repository:
        if repo not in self.repositories:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return self.repositories[repo]

    def _whoami(self, body: bytes, query: dict[str, str]) -> Any:
        return {"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": self.role}}}

    def _create(self, body: bytes, query: dict[str, str]) -> Any:
        request = json.loads(body)
        owner = request.get("organization") or "me"
        if owner != "me":
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        repo = f"{owner}/{request['name']}"
        url = f"{self.url}/{repo}"
        if repo in self.repositories:
            raise Refused(409, "", error="You already created this model repo", url=url)
        # 0.36 sends a flag, 2.4 a visibility.
        private = request.get("private") or request.get("visibility") == "private"
        self.repositories[repo] = Repository(private=bool(private))
        return {"url": url, "name": repo}

    def _validate_yaml(self, body: bytes, query: dict[str, str]) -> Any:
        errors, warnings = check_card(json.loads(body)["content"])
        if errors:
            raise Refused(400, "", errors=[{"message": error} for error in errors], warnings=[])
        return {"errors": [], "warnings": [{"message": warning} for warning in warnings]}

    def _branch(self, body: bytes, query: dict[str, str], repo: str, revision: str) -> Any:
        repository = self._repository(repo)
        if revision.startswith("refs/"):
            raise Refused(400, f"Invalid branch name: {revision}")
        if revision in repository.refs:
            raise Refused(409, "Reference already exists")
        repository.refs[revision] = repository.refs["main"]
        return {}

    def _preupload(self, body: bytes, query: dict[str, str], repo: str, revision: str) -> Any:
        files = self._repository(repo).files(revision)

        def describe(path: str, size: int) -> dict[str, Any]:
            known = {"oid": object_id(path, files[path])} if path in files else {}
            mode = "lfs" if is_large(path, size) else "regular"
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, **known}

        return {"files": [describe(item["path"], item["size"]) for item in json.loads(body)["files"]]}

    def _lfs_batch(self, body: bytes, query: dict[str, str], repo: str) -> Any:
        self._repository(repo)
        objects = []
        for item in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.url}/lfs/{item['oid']}"},
                "verify": {"href": f"{self.url}/lfs/verify"},
            }
            new = item["oid"] not in self.large_files
            objects.append({"oid": item["oid"], "size": item["size"], **({"actions": actions} if new else {})})
        return {"transfer": "basic", "objects": objects}

    def _lfs_upload(self, body: bytes, query: dict[str, str], oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "the content is not what its hash says")
        self.large_files[oid] = body
        return {}

    def _lfs_verify(self, body: bytes, query: dict[str, str]) -> Any:
        request = json.loads(body)
        if len(self.large_files.get(request["oid"], b"")) != request["size"]:
            raise Refused(404, "no such large file")
        return {}

    def _commit(self, body: bytes, query: dict[str, str], repo: str, revision: str) -> Any:
        repository = self._repository(repo)
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(repository.files(revision))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.large_files:
                files[value["path"]] = self.large_files[value["oid"]]
            elif line["key"] == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise Refused(400, f"cannot commit {line['key']} {value['path']}")
        repository.messages.append(lines[0]["value"]["summary"])
        # Other files have another commit, as caches take a commit for its files, whatever server it is of.
        content = [(path, object_id(path, data)) for path, data in sorted(files.items())]
        sha = hashlib.sha1(f"{repo} {len(repository.messages)} {content}".encode()).hexdigest()
        repository.trees[sha] = files
        answer = {"commitUrl": f"{self.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True}
        if query.get("create_pr") != "1":
            repository.refs[revision] = sha
            return answer
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
        repository.refs[f"refs/pr/{number}"] = sha
        return {**answer, "pullRequestUrl": f"{self.url}/{repo}/discussions/{number}"}

    def _info(self, body: bytes, query: dict[str, str], repo: str, revision: str) -> Any:
        repository = self._repository(repo)
        sha = repository.commit_of(revision or "main")
        siblings = [{"rfilename": path} for path in repository.trees[sha]]
        return {"id": repo, "sha": sha, "private": repository.private, "tags": [], "siblings": siblings}

    def _tree(self, body: bytes, query: dict[str, str], repo: str, revision: str, path: str) -> Any:
        files = self._repository(repo).files(revision)
        inside = {name: data for name, data in files.items() if not path or name.startswith(f"{path}/")}
        if path and not inside:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        return [
            {"type": "file", "path": name, "size": len(data), "oid": object_id(name, data), **_pointer(name, data)}
            for name, data in inside.items()
        ]

    def _resolve(self, body: bytes, query: dict[str, str], repo: str, revision: str, path: str) -> Any:
        repository = self._repository(repo)
        sha = repository.commit_of(revision)
        if path not in repository.trees[sha]:
            raise Refused(404, "Entry not found", "EntryNotFound")
        data = repository.trees[sha][path]
        return data, {"ETag": f'"{object_id(path, data)}"', "X-Repo-Commit": sha}


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES = {
    ("GET", "/api/whoami-v2"): "whoami",
    ("POST", "/api/repos/create"): "create",
    ("POST", "/api/validate-yaml"): "validate_yaml",
    ("POST", f"/api/models/{_REPO}/branch/{_REVISION}"): "branch",
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}"): "preupload",
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch"): "lfs_batch",
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})"): "lfs_upload",
    ("POST", "/lfs/verify"): "lfs_verify",
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}"): "commit",
    ("GET", f"/api/models/{_REPO}(?:/revision/{_REVISION})?"): "info",
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}(?:/(?P<path>.+))?"): "tree",
    ("GET|HEAD", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)"): "resolve",
}


def find_route(method: str, path: str) -> tuple[str, re.Match[str] | None]:
    for (methods, pattern), route in ROUTES.items():
        match = re.fullmatch(pattern, path)
        if match and method in methods.split("|"):
            return route, match
    return "", None


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card's metadata: the part of the Hub's rules that can be known offline."""
    try:
        ModelCard(content)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        return [str(error)], []
    metadata = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    data = metadata and yaml.safe_load(metadata[1])
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = []
    for key in ("base_model", "datasets"):
        values = data.get(key) or []
        for value in [values] if isinstance(values, str) else values:
            try:
                validate_repo_id(value)
            except ValueError as error:
                errors.append(f'"{key}" {error}')
    tags = data.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append('"tags" must be an array of strings')
    for key in ("license", "library_name", "pipeline_tag"):
        if key in data and not re.fullmatch(r"[a-z0-9._-]+", str(data[key])):
            errors.append(f'"{key}" {data[key]!r} is not an identifier')
    return errors, []


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with connections that stay open, as the real Hub's do."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; a delayed answer costs 40 ms each

    def do_GET(self) -> None:
        self.hub.answer(self, "GET")

    def do_HEAD(self) -> None:
        self.hub.answer(self, "HEAD")

    def do_POST(self) -> None:
        self.hub.answer(self, "POST")

    def do_PUT(self) -> None:
        self.hub.answer(self, "PUT")

    def log_message(self, format: str, *args: Any) -> None:
        """Tests want no access log."""

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send_json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self.send_bytes(status, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send_bytes(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _forget_connections() -> None:
    # huggingface_hub below 1.0 keeps requests sessions, later versions one httpx client.
    reset: Callable[[], None] = getattr(huggingface_hub.utils, "reset_sessions", None) or huggingface_hub.close_session
    reset()


@pytest.fixture(name="hub_server")
def loopback_hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A fresh server that this process takes for the Hub, logged in with its token; the only network that tests use.

    For `from_pretrained` start a process with `hub_server.environment(...)`: transformers reads HF_HUB_OFFLINE once.
    """
    server = HubServer()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    for module in (constants, huggingface_hub.file_download):  # below 1.0 the latter has a copy
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)  # of functions such as create_repo
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache of the Hub")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    _forget_connections()
    yield server
    _forget_connections()
    server.close()
