"""A server on loopback that speaks the part of the Hub's protocol for reading and writing model repos.

It has no Xet storage, so a client that uploads has to run with HF_HUB_DISABLE_XET=1: with Xet's package installed, the
client uses it for all large files without asking the server.
"""

import base64
import json
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_repos import File, HubError, Repo, is_lfs, read_folder


@dataclass
class Fault:
    """A fault of the next `times` requests that fit: a false answer, or a cut connection."""

    method: str | None
    path: str
    times: int
    status: int | None = None
    headers: dict[str, str] | None = None
    after: int = 0
    answer: bool | None = None
    # The body of the answer; a line of JSON if not given.
    body: bytes | None = None
    stalls: bool = False
    closes: bool = False
    resets: bool = False
    # The number of the only request that has this fault.
    at: int | None = None


class HubServer:
    """Serves `<root>/<user>/<repo>` as model repos, each with one commit, and the repos that clients create.

    A folder is read at the first request for it, and never written. `users` names the user of each token. Repos in
    `private` and `gated` open only to their owner's token (to any token, if the owner is not in `users`), and refuse
    others as the Hub does. A user may write in the namespace of that name. `requests` lists all requests as
    "METHOD path", and `headers` the headers of each.
    """

    def __init__(
        self,
        root: Path,
        private: tuple[str, ...] = (),
        gated: tuple[str, ...] = (),
        users: dict[str, str] | None = None,
        page_size: int = 1000,
    ):
        self.root, self.private, self.gated = root, private, gated
        self.users = {"secret": "user"} if users is None else users
        self.page_size = page_size
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self._repos: dict[str, Repo] = {}
        self._faults: list[Fault] = []
        self._mended = threading.Event()
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        # The server checks often whether to stop, since a test waits for its end.
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._mended.set()
        self.server.shutdown()
        self.server.server_close()

    def settings(self, cache: Path) -> dict[str, Any]:
        """Constants for the Hub's client in this process: online with this server, with a cache of its own."""
        return {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The content of each file at a branch or commit."""
        return {path: file.content for path, file in self.repo(repo).at(revision).files.items()}

    def commits(self, repo: str, revision: str = "main") -> list[tuple[str, str, list[str]]]:
        """The id, message and changed paths of each commit, oldest first."""
        history = self.repo(repo).at(revision).history()
        return [(commit.sha, commit.message, commit.changed) for commit in reversed(history)]

    def fail(
        self,
        method: str | None,
        path: str,
        status: int = 503,
        times: int = 1,
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
    ) -> None:
        """Answers the next requests of the method (any, if None) whose path holds `path` with this status."""
        self._faults.append(Fault(method, path, times, status, headers, body=body))

    def fail_at(self, at: int, status: int, headers: dict[str, str] | None = None) -> None:
        """Answers one request with this status: number `at`, from 0, among the requests to come."""
        self._faults.append(Fault(None, "", 1, status, headers, at=len(self.requests) + at))

    def cut_at(self, at: int) -> None:
        """Closes the connection of request number `at`, from 0, among the requests to come, without an answer."""
        self._faults.append(Fault(None, "", 1, 200, closes=True, at=len(self.requests) + at))

    def cut(
        self,
        path: str,
        after: int = 0,
        times: int = 1,
        method: str | None = None,
        answer: bool | None = None,
        resets: bool = False,
    ) -> None:
        """Closes the connection after `after` bytes of the next longer bodies: a request's body if there is one, or
        else the answer's. With `answer`, the request is received and done, and its answer is cut. With `resets`, the
        connection ends by a reset."""
        self._faults.append(Fault(method, path, times, after=after, answer=answer, resets=resets))

    def lie(self, path: str, body: bytes, times: int = 1, method: str | None = "GET") -> None:
        """Answers the next requests whose path holds `path` with a wrong body, as if all were well."""
        self._faults.append(Fault(method, path, times, 200, body=body))

    def stall(self, path: str, times: int = 1, method: str | None = None) -> None:
        """Accepts the next requests whose path holds `path`, and answers none of them before `mend` or the end."""
        self._mended.clear()
        self._faults.append(Fault(method, path, times, 200, stalls=True))

    def mend(self) -> None:
        """Removes the faults that no request has used."""
        with self.lock:
            self._faults.clear()
        self._mended.set()

    def repo(self, name: str) -> Repo:
        """A repo by its full name."""
        with self.lock:
            if name not in self._repos:
                if not (self.root / name).is_dir() or name.count("/") != 1 or ".." in name:
                    raise HubError(404, "Repository not found", "RepoNotFound")
                files = read_folder(self.root / name)
                self._repos[name] = Repo(name, files, name in self.private, name in self.gated)
            return self._repos[name]

    def create(self, name: str, private: bool = False) -> Repo:
        """Adds a repo with one file, as the Hub does."""
        try:
            self.repo(name)
        except HubError:
            repo = Repo(name, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, private)
            return self._repos.setdefault(name, repo)
        raise HubError(409, "You already created this model repo", url=f"{self.url}/{name}")

    def take_fault(self, method: str, path: str, fits: Callable[[Fault], bool]) -> Fault | None:
        """The first unused fault that fits a request. It has one use less afterwards."""
        with self.lock:
            for fault in self._faults:
                if fault.times > 0 and fault.method in (None, method) and fault.path in path and fits(fault):
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    def shutdown_request(self, request: Any) -> None:
        # A connection that is to be reset must not be closed in good order first.
        if request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER):
            return self.close_request(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that goes away is part of the tests.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


_ROUTES: list[tuple[str, re.Pattern, Callable]] = []
_NAME = "/([^/]+/[^/]+)"
_MODEL = f"/api/models{_NAME}"


def _route(method: str, pattern: str) -> Callable[[Callable], Callable]:
    """Makes a method answer requests whose path matches. The unquoted groups are its arguments."""

    def add(function: Callable) -> Callable:
        _ROUTES.append((method, re.compile(pattern), function))
        return function

    return add


class _Handler(BaseHTTPRequestHandler):
    # In HTTP/1.0 a connection serves one request, so the client has none open when the server ends.
    hub: HubServer

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        path = unquote(url.path)
        with self.hub.lock:
            number = len(self.hub.requests)
            self.hub.requests.append(f"{self.command} {path}")
            self.hub.headers.append({key.lower(): value for key, value in self.headers.items()})
        length = int(self.headers.get("Content-Length", 0))
        cut = self.hub.take_fault(
            self.command, path, lambda fault: fault.status is None and not fault.answer and length > fault.after
        )
        if cut is not None:
            self.rfile.read(cut.after)
            return
        # The body of a refused request is read too: closing with unread bytes can lose the answer.
        self.body = self.rfile.read(length)
        fault = self.hub.take_fault(
            self.command, path, lambda fault: fault.status is not None and fault.at in (None, number)
        )
        if fault is not None:
            assert fault.status is not None
            if fault.stalls:
                self.hub._mended.wait(120)
            if fault.stalls or fault.closes:
                return None
            if fault.body is not None:
                return self._answer(fault.status, fault.body, fault.headers)
            return self._json({"error": f"Fault {fault.status}"}, fault.status, fault.headers)
        try:
            for method, pattern, function in _ROUTES:
                match = pattern.fullmatch(url.path) if method == self.command else None
                if match:
                    return function(self, *(unquote(group or "") for group in match.groups()))
            raise HubError(404, "Sorry, we can't find the page you are looking for.")
        except HubError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            self._json({"error": error.message} | error.body, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    # Rights of users.

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def _readable(self, name: str) -> Repo:
        """A repo that the request may read. Without a login, a private repo is refused like a missing one."""
        user = self._user()
        try:
            repo = self.hub.repo(name)
        except HubError as error:
            raise error if user else HubError(401, "Invalid username or password.", "RepoNotFound") from error
        if repo.gated and not user:
            message = (
                f"Access to model {name} is restricted. You must have access to it and be authenticated to access"
            )
            raise HubError(401, f"{message} it. Please log in.", "GatedRepo")
        if repo.private and not user:
            # The Hub says only the first sentence; the second shows a test that the repo exists.
            raise HubError(401, f"Invalid username or password. Access to {name} is restricted.", "RepoNotFound")
        owner = name.split("/")[0]
        if owner != user and owner in self.hub.users.values():
            if repo.private:
                raise HubError(404, "Repository not found", "RepoNotFound")
            if repo.gated:
                message = f"Access to model {name} is restricted and you are not in the authorized list."
                raise HubError(403, message, "GatedRepo")
        return repo

    def _writable(self, name: str) -> Repo:
        repo = self._readable(name)
        if self._user() is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if name.split("/")[0] != self._user():
            raise HubError(403, "You don't have write access to this repo")
        return repo

    # Users and repos.

    @_route("GET", "/api/whoami-v2")
    def _whoami(self) -> None:
        user = self._user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self._json({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": token})

    @_route("POST", "/api/repos/create")
    def _create_repo(self) -> None:
        asked = json.loads(self.body)
        user = self._user()
        owner = asked.get("organization") or user
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if owner != user:
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo = self.hub.create(f"{owner}/{asked['name']}", private)
        self._json({"url": f"{self.hub.url}/{repo.name}", "name": repo.name, "id": repo.name})

    @_route("GET", f"{_MODEL}/auth-check/write")
    def _auth_check(self, name: str) -> None:
        self._writable(name)
        self._json({})

    @_route("POST", "/api/validate-yaml")
    def _validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    @_route("GET", _MODEL)
    @_route("GET", f"{_MODEL}/revision/([^/]+)")
    def _info(self, name: str, revision: str = "main") -> None:
        repo = self._readable(name)
        commit = repo.at(revision)
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        if self.query.get("blobs"):
            siblings = [sibling | commit.files[sibling["rfilename"]].about("blobId", "sha256") for sibling in siblings]
        about = {"private": repo.private, "gated": "auto" if repo.gated else False, "disabled": False, "tags": []}
        self._json({"id": name, "sha": commit.sha, "lastModified": commit.date, "siblings": siblings} | about)

    @_route("GET", f"{_MODEL}/refs")
    def _refs(self, name: str) -> None:
        branches = self._readable(name).branches.items()
        refs = [{"name": key, "ref": f"refs/heads/{key}", "targetCommit": commit.sha} for key, commit in branches]
        self._json({"branches": refs, "converts": [], "tags": [], "pullRequests": []})

    @_route("GET", f"{_MODEL}/commits/([^/]+)")
    def _commits(self, name: str, revision: str) -> None:
        self._page(
            [
                {"id": commit.sha, "title": commit.message, "message": "", "date": commit.date, "authors": []}
                for commit in self._readable(name).at(revision).history()
            ]
        )

    @_route("POST", f"{_MODEL}/branch/([^/]+)")
    def _branch(self, name: str, branch: str) -> None:
        self._writable(name).branch(branch, json.loads(self.body or "{}").get("startingPoint", "main"))
        self._json({})

    # The content of a revision.

    @_route("GET", f"{_MODEL}/tree/([^/]+)(?:/(.+))?")
    def _tree(self, name: str, revision: str, folder: str) -> None:
        commit = self._readable(name).at(revision)
        paths = commit.paths(folder, self.query.get("recursive") == "true")
        if folder and not paths:
            raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        expand = self.query.get("expand") == "true"
        self._page(commit.entries(paths, expand), 50 if expand else 1000)

    @_route("POST", f"{_MODEL}/paths-info/([^/]+)")
    def _paths_info(self, name: str, revision: str) -> None:
        commit = self._readable(name).at(revision)
        asked = parse_qs(self.body.decode())
        paths = [path for path in asked.get("paths", []) if path in commit.files or commit.inside(path)]
        self._json(commit.entries(paths, asked.get("expand") == ["true"]))

    @_route("GET", f"{_NAME}/resolve/([^/]+)/(.+)")
    @_route("HEAD", f"{_NAME}/resolve/([^/]+)/(.+)")
    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._readable(name)
        headers = {"X-Repo-Commit": repo.at(revision).sha, "Accept-Ranges": "bytes"}
        try:
            file = repo.file(revision, path)
        except HubError as error:
            headers |= {"X-Error-Code": error.code or "", "X-Error-Message": error.message}
            return self._answer(error.status, b"", headers)
        content, status = file.content, 200
        headers["ETag"] = f'"{file.etag}"'
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            if start >= len(content):
                return self._answer(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
            content, status = content[start : end + 1], 206
        self._answer(status, content, headers)

    # Writing: large files are uploaded first, and a commit names them.

    @_route("POST", f"{_MODEL}/preupload/([^/]+)")
    def _preupload(self, name: str, revision: str) -> None:
        present = self._writable(name).at(revision).files
        files = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if is_lfs(path, file["size"]) else "regular"
            oid = {"oid": present[path].etag} if path in present else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | oid)
        self._json({"files": files})

    @_route("POST", rf"{_NAME}\.git/info/lfs/objects/batch")
    def _batch(self, name: str) -> None:
        repo = self._writable(name)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in repo.objects:
                href = f"{self.hub.url}/lfs/{name}/{asked['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    @_route("PUT", f"/lfs{_NAME}/([0-9a-f]+)")
    def _upload(self, name: str, oid: str) -> None:
        # No token is checked: the client sends none to the storage.
        self.hub.repo(name).store(oid, self.body)
        self._answer(200, b"")

    @_route("POST", f"/lfs{_NAME}/([0-9a-f]+)/verify")
    def _verify(self, name: str, oid: str) -> None:
        if len(self._writable(name).objects.get(oid, b"")) != json.loads(self.body)["size"]:
            raise HubError(404, "The object is not there, or not whole")
        self._json({})

    @_route("POST", f"{_MODEL}/commit/([^/]+)")
    def _commit(self, name: str, revision: str) -> None:
        repo = self._writable(name)
        if "create_pr" in self.query:
            raise HubError(400, "Pull requests are not served here")
        header: dict[str, str] = {}
        changes: dict[str, File] = {}
        deleted: list[str] = []
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                changes[value["path"]] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in repo.objects:
                    raise HubError(400, "LFS pointer pointed to a file that does not exist")
                changes[value["path"]] = File(repo.objects[value["oid"]], lfs=True)
            else:
                deleted.append(value["path"].rstrip("/") + ("/" if key == "deletedFolder" else ""))
        if not header.get("summary"):
            raise HubError(400, "The commit has no summary")
        commit = repo.commit(revision, header["summary"], changes, deleted, header.get("parentCommit"))
        url = f"{self.hub.url}/{name}/commit/{commit.sha}"
        self._json({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    # Answers.

    def _page(self, items: list[dict[str, Any]], at_most: int = 1000) -> None:
        start, size = int(self.query.get("cursor", 0)), min(self.hub.page_size, at_most)
        query = "".join(f"{key}={quote(value)}&" for key, value in self.query.items() if key != "cursor")
        link = f'<{self.hub.url}{urlsplit(self.path).path}?{query}cursor={start + size}>; rel="next"'
        self._json(items[start : start + size], headers={"Link": link} if start + size < len(items) else None)

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        path = unquote(urlsplit(self.path).path)
        cut = self.hub.take_fault(
            self.command,
            path,
            lambda fault: fault.status is None and (fault.answer or not self.body) and len(content) > fault.after,
        )
        self.wfile.write(content[: cut.after] if cut else content)
        if cut and cut.resets:
            # The reset waits until the bytes have arrived, since it would drop them.
            time.sleep(0.2)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, *args) -> None:
        pass
