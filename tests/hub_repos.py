"""Model repos as the Hub keeps them, with files, commits and branches, in memory."""

import fnmatch
import hashlib
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any


LFS_NAMES = ("*.safetensors", "*.png", "*.pt", "*.pth", "*.bin", "*.npz")
LFS_SIZE = 10 * 2**20


class HubError(Exception):
    """A refusal: its status, its reason, and the name that the Hub's client knows it by."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: str):
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass(frozen=True)
class File:
    """The content of a file, and whether git stores a pointer in its place."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        lines = (
            "version https://git-lfs.github.com/spec/v1",
            f"oid sha256:{self.sha256}",
            f"size {len(self.content)}",
        )
        return "".join(f"{line}\n" for line in lines).encode()

    @property
    def blob_id(self) -> str:
        """The id that git gives to the stored content or pointer."""
        blob = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        """The value that the client compares its own file with."""
        return self.sha256 if self.lfs else self.blob_id

    def about(self, id_name: str, digest_name: str) -> dict[str, Any]:
        """The file's sizes and ids. The Hub's answers differ in their names for git's id and a large file's digest."""
        size = {"size": len(self.content)}
        lfs = {"lfs": {digest_name: self.sha256, "pointerSize": len(self.pointer)} | size} if self.lfs else {}
        return {id_name: self.blob_id} | size | lfs


@dataclass(frozen=True, eq=False)
class Commit:
    """A commit. `changed` has the paths whose content it changed, added or deleted."""

    message: str
    files: dict[str, File]
    parent: "Commit | None" = None
    date: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}Z")

    @cached_property
    def sha(self) -> str:
        tree = sorted((path, file.blob_id) for path, file in self.files.items())
        parent = self.parent.sha if self.parent else None
        return hashlib.sha1(repr((self.message, tree, parent, self.date)).encode()).hexdigest()

    @property
    def changed(self) -> list[str]:
        before = self.parent.files if self.parent else {}
        return sorted(path for path in self.files.keys() | before.keys() if self.files.get(path) != before.get(path))

    def history(self) -> list["Commit"]:
        """This commit and those before it, newest first."""
        return [self, *(self.parent.history() if self.parent else [])]

    def inside(self, folder: str) -> list[str]:
        """The paths of the files in a folder and those below it."""
        return [path for path in self.files if not folder or path.startswith(f"{folder}/")]

    def paths(self, folder: str, recursive: bool) -> list[str]:
        """The files and folders in a folder; with `recursive`, also in the folders below."""
        depth = folder.count("/") + 1 if folder else 0
        found = set()
        for path in self.inside(folder):
            parts = path.split("/")
            last = len(parts) if recursive else depth + 1
            found |= {"/".join(parts[:end]) for end in range(depth + 1, last + 1)}
        return sorted(found)

    def entries(self, paths: Iterable[str], expand: bool) -> list[dict[str, Any]]:
        """The entries of a listing of files and folders; with `expand`, each has the commit that last changed it."""
        entries: list[dict[str, Any]] = []
        for path in paths:
            if path in self.files:
                entry = {"type": "file", "path": path} | self.files[path].about("oid", "oid")
            else:
                tree = repr([(name, self.files[name].blob_id) for name in self.inside(path)]).encode()
                entry = {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(tree).hexdigest()}
            if expand:
                last = self.last_change(path)
                entry["lastCommit"] = {"id": last.sha, "title": last.message, "date": last.date}
            entries.append(entry)
        return entries

    def last_change(self, path: str) -> "Commit":
        """The commit that last changed a file, or anything in a folder."""
        return next(
            commit
            for commit in self.history()
            if any(changed == path or changed.startswith(f"{path}/") for changed in commit.changed)
        )


class Repo:
    """The branches and commits of one repo, and its uploaded large files, which a later commit may name."""

    def __init__(self, name: str, files: dict[str, bytes], private: bool = False, gated: bool = False):
        self.name, self.private, self.gated = name, private, gated
        self.lock = threading.Lock()
        self.objects: dict[str, bytes] = {}
        first = Commit(
            "initial commit", {path: File(content, is_lfs(path, content)) for path, content in files.items()}
        )
        self.branches = {"main": first}
        self.known = {first.sha: first}
        for file in first.files.values():
            if file.lfs:
                self.objects[file.sha256] = file.content

    def at(self, revision: str) -> Commit:
        """The commit that a branch or the id of a commit names."""
        found = self.branches.get(revision) or self.known.get(revision)
        if found is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def file(self, revision: str, path: str) -> File:
        """A file at a revision."""
        files = self.at(revision).files
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        return files[path]

    def store(self, oid: str, content: bytes) -> None:
        """Stores a large file, or raises if it is not whole."""
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "The content does not have the digest that was promised")
        self.objects[oid] = content

    def branch(self, name: str, start: str) -> None:
        """Adds a branch."""
        with self.lock:
            if name in self.branches:
                raise HubError(409, "Reference already exists")
            self.branches[name] = self.at(start)

    def commit(
        self, revision: str, message: str, changes: dict[str, File], deleted: list[str], parent: str | None
    ) -> Commit:
        """Adds one commit to a branch, or raises and changes nothing. A path in `deleted` that ends in a slash is a
        folder. A commit without any change is a commit too, as on the Hub."""
        with self.lock:
            if revision not in self.branches:
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            head = self.branches[revision]
            if parent is not None and not head.sha.startswith(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for path in deleted:
                gone = [name for name in files if name == path or (path.endswith("/") and name.startswith(path))]
                if not gone:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                for name in gone:
                    del files[name]
            new = Commit(message, files | changes, head)
            self.known[new.sha] = self.branches[revision] = new
            return new


def is_lfs(path: str, content: bytes | int) -> bool:
    """Whether the Hub would store a file of this name and content (or size) as a large file."""
    size = content if isinstance(content, int) else len(content)
    return size > LFS_SIZE or any(fnmatch.fnmatch(path, pattern) for pattern in LFS_NAMES)


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files of a folder by their paths in it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
