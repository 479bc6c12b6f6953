"""A Hugging Face Hub on localhost that serves folders and takes uploads, for processes with HF_ENDPOINT set to it."""

import base64
import hashlib
import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.forking import Forks


class FakeHub:
    """Serves model repositories while its `with` block runs.

    Args:
        repos: folder by repository name, such as {"someone/tiny-vit": Path("out")}.
        uploads: folder for repositories that are created; without it the Hub is read-only.

    `requests` lists what was asked as "METHOD path", in order; `private` the repositories created so; `refuse` is a
    status that every upload is answered with.
    """

    def __init__(self, repos, uploads=None, refuse=None):
        self.uploads, self.refuse = uploads, refuse
        self.repos = {}
        for repo, folder in repos.items():
            self.add(repo, folder)
        self.private = []
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

    def add(self, repo, folder):
        """A repository that holds a folder."""
        self.repos[repo] = {"main": Path(folder)}

    def commit(self, repo, revision="main"):
        """The commit that a branch stands at: 40 digits that change with the files' content."""
        digest = hashlib.sha1(repo.encode())
        for path in self.files(repo, revision):
            digest.update(path.encode() + (self.repos[repo][revision] / path).read_bytes())
        return digest.hexdigest()

    def branch(self, repo, revision):
        """The branch that a revision names, or that stands at it; None where there is none."""
        branches = self.repos[repo]
        return (
            revision if revision in branches else next((b for b in branches if self.commit(repo, b) == revision), None)
        )

    def add_branch(self, repo, name):
        """A branch that starts as main is."""
        folder = Path(self.uploads) / f"{repo}@{name.replace('/', '-')}"
        shutil.copytree(self.repos[repo]["main"], folder)
        self.repos[repo][name] = folder

    def files(self, repo, revision="main"):
        folder = self.repos[repo][revision]
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class Client:
    """Runs Python against a Hub, while its `with` block runs."""

    def __init__(self, folder, endpoint):
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        self.home = folder / "home"
        own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(self.home), "HF_TOKEN": "hf_test"}
        self.forks = Forks(env={**kept, **own, "NO_PROXY": "127.0.0.1"})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.forks.close()

    def start(self, script, *arguments):
        return self.forks.run("-c", script, *arguments)

    def run(self, script, *arguments):
        done = self.start(script, *arguments)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout


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
        repo, _, rest = urlsplit(self.path).path.strip("/").partition("/resolve/")
        revision, _, name = (unquote(part) for part in rest.partition("/"))
        if branch := self._known(repo, revision):
            self._answer_file(repo, branch, name)

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
        if self.hub.refuse is not None:
            return self._answer(self.hub.refuse, json.dumps({"error": "not today"}).encode(), {})
        repo, action = "/".join(parts[2:4]), parts[4]
        if action == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self._answer_json({"files": [{**f, "shouldIgnore": False} for f in files]})
        if action == "branch":
            if "/".join(parts[5:]) in self.hub.repos[repo]:
                return self._answer(409, json.dumps({"error": "there is one"}).encode(), {})
            self.hub.add_branch(repo, "/".join(parts[5:]))
            return self._answer_json({})
        pull_request = "create_pr=1" in urlsplit(self.path).query
        self._commit(repo, "/".join(parts[5:]), pull_request, [json.loads(line) for line in body.splitlines()])

    def _create(self, request):
        repo = f"{request.get('organization') or 'someone'}/{request['name']}"
        if repo in self.hub.repos:
            return self._answer(409, json.dumps({"url": f"{self.hub.endpoint}/{repo}"}).encode(), {})
        self.hub.repos[repo] = {"main": Path(self.hub.uploads) / repo}
        self.hub.repos[repo]["main"].mkdir(parents=True, exist_ok=True)
        hidden = request.get("private") or request.get("visibility") == "private"
        self.hub.private += [repo] if hidden else []
        self._answer_json({"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": repo})

    def _commit(self, repo, revision, pull_request, operations):
        answer = {"success": True}
        if pull_request:
            revision = f"refs/pr/{sum(name.startswith('refs/pr/') for name in self.hub.repos[repo]) + 1}"
            self.hub.add_branch(repo, revision)
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{revision.rpartition('/')[2]}"
        for operation in operations:
            if operation["key"] == "file":
                file = operation["value"]
                (self.hub.repos[repo][revision] / file["path"]).write_bytes(base64.b64decode(file["content"]))
        oid = self.hub.commit(repo, revision)
        self._answer_json({**answer, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}"})

    def _known(self, repo, revision):
        """The branch that was asked for, or None once an error was answered."""
        if repo not in self.hub.repos:
            return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        branch = self.hub.branch(repo, revision)
        return branch or self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})

    def _answer_api(self, path):
        repo = "/".join(path.split("/")[:2])
        action, _, revision = "/".join(path.split("/")[2:]).partition("/")
        branch = self._known(repo, revision or "main")
        if branch is None:
            return
        if action == "tree":
            files = [
                {"type": "file", "path": name, **self._size(repo, branch, name)}
                for name in self.hub.files(repo, branch)
            ]
            return self._answer_json(files)
        if action not in ("", "revision"):
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        info = {
            "id": repo,
            "modelId": repo,
            "sha": self.hub.commit(repo, branch),
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": name} for name in self.hub.files(repo, branch)],
        }
        self._answer_json(info)

    def _size(self, repo, branch, name):
        body = (self.hub.repos[repo][branch] / name).read_bytes()
        return {"size": len(body), "oid": hashlib.sha1(body).hexdigest()}

    def _answer_file(self, repo, branch, name):
        commit = {"X-Repo-Commit": self.hub.commit(repo, branch)}
        if name not in self.hub.files(repo, branch):
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", **commit})
        body = (self.hub.repos[repo][branch] / name).read_bytes()
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
