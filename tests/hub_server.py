"""A server on loopback that speaks the part of the Hub's protocol that reading a repo needs, over the files of a
folder."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves `<root>/<user>/<repo>` as model repos. `requests` lists what was asked for."""

    def __init__(self, root: Path, private: tuple[str, ...] = ()):
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"root": root, "private": private, "requests": self.requests})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    root: Path
    private: tuple[str, ...]
    requests: list[str]

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.requests.append(f"{self.command} {path}")
        if path.startswith("/api/models/"):
            self._model_info("/".join(path.split("/")[3:5]), path)
        elif path.count("/") < 5:
            self._answer(404, b"")
        else:
            _, user, repo, verb, _, *file = path.split("/")
            self._file(f"{user}/{repo}", self.root / user / repo / "/".join(file), verb == "resolve")

    do_HEAD = do_GET

    def _model_info(self, repo: str, path: str) -> None:
        if self._refused(repo):
            return
        files = sorted(file for file in (self.root / repo).rglob("*") if file.is_file())
        names = [str(file.relative_to(self.root / repo)) for file in files]
        if "/tree/" in path:
            sizes = (file.stat().st_size for file in files)
            tree = [
                {"type": "file", "path": name, "size": size, "oid": "0" * 40}
                for name, size in zip(names, sizes, strict=True)
            ]
            return self._answer(200, json.dumps(tree).encode())
        info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        self._answer(200, json.dumps(info).encode())

    def _file(self, repo: str, file: Path, known_verb: bool) -> None:
        if self._refused(repo):
            return
        if not known_verb or not file.is_file():
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        content = file.read_bytes()
        self._answer(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def _refused(self, repo: str) -> bool:
        if repo in self.private and self.headers.get("Authorization") != "Bearer secret":
            message = f"Access to model {repo} is restricted."
            self._answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": message})
            return True
        if not (self.root / repo).is_dir():
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return True
        return False

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass
