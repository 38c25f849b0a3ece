"""A Hugging Face hub on this machine: what huggingface_hub asks of it to make, write and read a repository."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class LocalHub:
    """Repositories in memory.

    Attributes:
        commits: repository -> revision (a branch or a commit) -> file -> bytes.
        tokens: of the requests that wrote.
        private: repository -> whether it was made so.
    """

    def __init__(self):
        self.commits, self.tokens, self.private = {}, [], {}

    def put(self, repository, files, branch="main"):
        """A new commit; returns its name."""
        revisions = self.commits.setdefault(repository, {})
        files = {**revisions.get(branch, {}), **files}
        digest = hashlib.sha1(repr((branch, len(revisions), sorted(files.items()))).encode()).hexdigest()
        revisions[branch] = revisions[digest] = files
        return digest

    def commit_of(self, repository, revision):
        files = self.commits[repository][revision]
        return next(name for name, held in self.commits[repository].items() if held is files and len(name) == 40)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self):
        return self.server.hub

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.tokens.append(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if "organization" in asked else asked["name"]
            if name.startswith("forbidden/"):
                return self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
            if name in self.hub.commits:
                return self.answer(409, {"url": self.url(name), "error": "You already created this model repo"})
            self.hub.private[name] = asked.get("private", False) or asked.get("visibility") == "private"
            self.hub.put(name, {})
            return self.answer(200, {"url": self.url(name), "name": name})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"warnings": [], "errors": []})
        name, what, revision = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/([^?]+).*", self.path).groups()
        revisions = self.hub.commits[name]
        if what == "branch":
            if revision in revisions:
                return self.answer(409, {"error": "Reference already exists"})
            revisions[revision] = revisions["main"]
            return self.answer(200, {})
        if what == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        given = [line["value"] for line in lines if line["key"] == "file"]
        for line in lines:
            if line["key"] == "deletedFile":
                kept = {f: held for f, held in self.hub.commits[name][revision].items() if f != line["value"]["path"]}
                self.hub.commits[name][revision] = kept
        commit = self.hub.put(name, {f["path"]: base64.b64decode(f["content"]) for f in given}, revision)
        return self.answer(
            200, {"commitUrl": f"{self.url(name)}/commit/{commit}", "commitOid": commit, "success": True}
        )

    def do_GET(self):
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            name, revision = found[1], found[2] or "main"
            if revision not in self.hub.commits.get(name, {}):
                return self.missing()
            files = [{"rfilename": file} for file in self.hub.commits[name][revision]]
            sha = self.hub.commit_of(name, revision)
            return self.answer(200, {"id": name, "modelId": name, "sha": sha, "siblings": files, "private": False})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            files = self.hub.commits.get(found[1], {}).get(found[2])
            if files is None:
                return self.missing()
            return self.answer(
                200, [{"type": "file", "path": f, "size": len(held), "oid": "0" * 40} for f, held in files.items()]
            )
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if found is None:
            return self.missing()
        name, revision, file = found.groups()
        content = self.hub.commits.get(name, {}).get(revision, {}).get(file)
        if content is None:
            return self.missing()
        headers = {
            "X-Repo-Commit": self.hub.commit_of(name, revision),
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        return self.answer(200, content, headers)

    do_HEAD = do_GET

    def url(self, name):
        return f"http://127.0.0.1:{self.server.server_port}/{name}"

    def missing(self):
        self.answer(404, {"error": "Not found"}, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not there"})

    def answer(self, status, value, headers=None):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def local_hub(monkeypatch, cache):
    """huggingface_hub speaks to this hub, and keeps its files in `cache`."""
    import huggingface_hub.constants as constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub, server.daemon_threads = LocalHub(), True
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
