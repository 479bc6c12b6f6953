"""A Hugging Face Hub on localhost that serves folders and takes uploads, for processes with HF_ENDPOINT set to it."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class FakeHub:
    """Serves model repositories while its `with` block runs.

    Args:
        repos: folder by repository name, such as {"someone/tiny-vit": Path("out")}.
        uploads: folder for repositories that are created; without it the Hub is read-only.

    `requests` lists what was asked as "METHOD path", in order.
    """

    def __init__(self, repos, uploads=None):
        self.uploads = uploads
        self.repos = {name: Path(folder) for name, folder in repos.items()}
        self.requests = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def commit(self, repo):
        """The commit that "main" stands at: 40 digits that change with the files' content."""
        digest = hashlib.sha1(repo.encode())
        for path in self.files(repo):
            digest.update(path.encode() + (self.repos[repo] / path).read_bytes())
        return digest.hexdigest()

    def files(self, repo):
        folder = self.repos[repo]
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format, *args):
        """Keep the test's output clean."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append(f"{self.command} /{path}")
        if path.startswith("api/models/"):
            return self._answer_api(path.removeprefix("api/models/"))
        repo, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        if self._known(repo, revision):
            self._answer_file(repo, name)

    def do_POST(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append(f"POST /{path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = path.split("/")
        if path == "api/validate-yaml":
            return self._answer_json({"errors": [], "warnings": []})
        if self.hub.uploads is None or "Bearer" not in self.headers.get("Authorization", ""):
            return self._answer(403, b"", {})
        if path == "api/repos/create":
            return self._create(json.loads(body))
        repo, action = "/".join(parts[2:4]), parts[4]
        if action == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self._answer_json({"files": [{**f, "shouldIgnore": False} for f in files]})
        return self._commit(repo, [json.loads(line) for line in body.splitlines()])

    def _create(self, request):
        repo = f"{request.get('organization') or 'someone'}/{request['name']}"
        self.hub.repos[repo] = Path(self.hub.uploads) / repo
        self.hub.repos[repo].mkdir(parents=True, exist_ok=True)
        self._answer_json({"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": repo})

    def _commit(self, repo, operations):
        for operation in operations:
            if operation["key"] == "file":
                file = operation["value"]
                (self.hub.repos[repo] / file["path"]).write_bytes(base64.b64decode(file["content"]))
        oid = self.hub.commit(repo)
        self._answer_json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}"})

    def _known(self, repo, revision):
        if repo not in self.hub.repos:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", self.hub.commit(repo)):
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return True
        return False

    def _answer_api(self, path):
        repo = "/".join(path.split("/")[:2])
        action, _, revision = "/".join(path.split("/")[2:]).partition("/")
        if not self._known(repo, revision or "main"):
            return
        if action not in ("", "revision"):
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        info = {
            "id": repo,
            "modelId": repo,
            "sha": self.hub.commit(repo),
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": name} for name in self.hub.files(repo)],
        }
        self._answer_json(info)

    def _answer_file(self, repo, name):
        commit = {"X-Repo-Commit": self.hub.commit(repo)}
        if name not in self.hub.files(repo):
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", **commit})
        body = (self.hub.repos[repo] / name).read_bytes()
        self._answer(200, body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', **commit})

    def _answer_json(self, values):
        self._answer(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _answer(self, status, body, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
