"""
A Hub on loopback, in memory: what huggingface_hub, transformers, datasets, peft and trl ask of the real one when they
push and pull. Clients need `HF_ENDPOINT` set to `Hub.endpoint` and `HF_HUB_DISABLE_XET=1`, before they are imported.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_token_of_the_tests"
USER = "tester"
LARGE_FILES = (".safetensors", ".parquet", ".gz", ".bin", ".npy")
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class File:
    """One version of a file; large files are named by their SHA-256, others as git names them."""

    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """Commits hold all their files by path; branches name commits."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, File]) -> str:
        names = "".join(f"{path} {file.oid}\n" for path, file in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)} {title}\n{names}".encode()).hexdigest()
        self.commits[sha], self.titles[sha], self.branches[branch] = files, title, sha
        return sha


class Refused(Exception):
    """An answer that is an error: HTTP status, the Hub's error code and its message."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


def card_data(card: str) -> dict:
    header = re.match(r"---\n(.*?)\n---", card, flags=re.DOTALL)
    try:
        return dict(yaml.safe_load(header[1])) if header else {}
    except (yaml.YAMLError, TypeError) as error:
        raise Refused(400, "", "invalid YAML") from error


class Hub(ThreadingHTTPServer):
    """repositories: by ("models" or "datasets", id). objects: large files by SHA-256."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}

    def files(self, repo: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """Contents by path."""
        found = self.repositories[kind, repo]
        return {path: file.content for path, file in found.commits[found.branches.get(revision, revision)].items()}

    def handle_error(self, request, client_address) -> None:
        """Clients that hang up are part of the tests."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


ID = r"(?P<repo>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>models|datasets)/{ID}"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    (method, re.compile(pattern), name)
    for method, pattern, name in (
        ("POST", "/api/validate-yaml", "validate_card"),
        ("POST", "/api/repos/create", "create"),
        ("GET", API, "info"),
        ("GET", f"{API}/revision/{REVISION}", "info"),
        ("GET", f"{API}/tree/{REVISION}(?:/(?P<path>.+))?", "tree"),
        ("POST", f"{API}/branch/{REVISION}", "create_branch"),
        ("POST", f"{API}/preupload/{REVISION}", "preupload"),
        ("POST", f"{API}/commit/{REVISION}", "commit"),
        ("POST", rf"/(?:(?P<kind>datasets)/)?{ID}\.git/info/lfs/objects/batch", "large_files"),
        ("PUT", "/objects/(?P<oid>[0-9a-f]{64})", "upload"),
        ("POST", "/objects/(?P<oid>[0-9a-f]{64})/verify", "verify"),
        ("GET", rf"/(?:(?P<kind>datasets)/)?{ID}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
    )
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def answer(self) -> None:
        path = urlsplit(self.path).path
        method = "GET" if self.command == "HEAD" else self.command
        self.unread = int(self.headers.get("Content-Length") or 0)
        try:
            for known, pattern, name in ROUTES:
                match = pattern.fullmatch(path)
                if match and known == method:
                    values = {key: unquote(text or "") for key, text in match.groupdict().items()}
                    getattr(self, f"on_{name}")(**values)
                    return
            raise Refused(404, "NotFound", f"no route {self.command} {path}")
        except Refused as error:
            self.body()
            self.send({"error": str(error)}, error.status, {"X-Error-Code": error.code, "X-Error-Message": str(error)})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *args) -> None:
        """No noise among the results of the tests."""

    def body(self) -> bytes:
        content = self.rfile.read(self.unread)
        self.unread = 0
        return content

    def json(self) -> dict:
        return json.loads(self.body())

    def send(self, content, status: int = 200, headers: dict[str, str] | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    @property
    def signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def sign_in(self) -> None:
        if not self.signed_in:
            raise Refused(401, "", "Invalid credentials in Authorization header")

    def repository(self, kind: str, repo: str) -> Repository:
        """Who may not see a repository learns no more than that of one that is not there."""
        found = self.server.repositories.get((kind or "models", repo))
        if found is None or found.private and not self.signed_in:
            raise Refused(404 if self.signed_in else 401, "RepoNotFound", "Repository not found")
        return found

    def at(self, found: Repository, revision: str) -> str:
        sha = found.branches.get(revision or "main", revision)
        if sha not in found.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def on_validate_card(self) -> None:
        card_data(self.json()["content"])
        self.send({"errors": [], "warnings": []})

    def on_create(self) -> None:
        self.sign_in()
        values = self.json()
        kind, repo = values.get("type", "model") + "s", f"{values.get('organization') or USER}/{values['name']}"
        url = f"{self.server.endpoint}/{'datasets/' if kind == 'datasets' else ''}{repo}"
        if (kind, repo) in self.server.repositories:
            self.send({"error": "You already created this repo", "url": url}, 409)
            return
        self.server.repositories[kind, repo] = created = Repository(values.get("visibility") == "private")
        created.commit("main", "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
        self.send({"url": url, "name": repo})

    def on_info(self, kind: str, repo: str, revision: str = "") -> None:
        found = self.repository(kind, repo)
        sha = self.at(found, revision)
        files = found.commits[sha]
        info = {
            "id": repo,
            "sha": sha,
            "private": found.private,
            "lastModified": DATE,
            "tags": [],
            "siblings": [{"rfilename": path} for path in files],
        }
        if "README.md" in files:
            info["cardData"] = card_data(files["README.md"].content.decode())
            info |= {key: info["cardData"].get(key) for key in ("pipeline_tag", "library_name")}
        self.send(info)

    def on_tree(self, kind: str, repo: str, revision: str, path: str) -> None:
        found = self.repository(kind, repo)
        files = found.commits[self.at(found, revision)]
        inside = {name: file for name, file in files.items() if not path or name.startswith(f"{path}/")}
        if path and not inside:
            raise Refused(404, "EntryNotFound", f"{path} does not exist")
        folders = {str(folder) for name in inside for folder in PurePosixPath(name).parents[:-1]}
        listed = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        self.send(listed + [self.entry(name, file) for name, file in sorted(inside.items())])

    @staticmethod
    def entry(path: str, file: File) -> dict:
        size = len(file.content)
        large = {"lfs": {"oid": file.oid, "size": size, "pointerSize": 130}} if file.large else {}
        return {"type": "file", "path": path, "oid": file.oid, "size": size, **large}

    def on_create_branch(self, kind: str, repo: str, revision: str) -> None:
        self.sign_in()
        found = self.repository(kind, repo)
        start = self.json().get("startingPoint", "main")
        if revision in found.branches:
            raise Refused(409, "", "Reference already exists")
        found.branches[revision] = self.at(found, start)
        self.send({})

    def on_preupload(self, kind: str, repo: str, revision: str) -> None:
        self.sign_in()
        found = self.repository(kind, repo)
        present = found.commits[self.at(found, revision)]
        answers = []
        for item in self.json()["files"]:
            path = item["path"]
            mode = "lfs" if path.endswith(LARGE_FILES) else "regular"
            known = {"oid": present[path].oid} if path in present else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        self.send({"files": answers})

    def on_large_files(self, kind: str, repo: str) -> None:
        self.sign_in()
        self.repository(kind, repo)
        objects = []
        for item in self.json()["objects"]:
            if item["oid"] not in self.server.objects:
                href = f"{self.server.endpoint}/objects/{item['oid']}"
                item["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(item)
        self.send({"transfer": "basic", "objects": objects})

    def on_upload(self, oid: str) -> None:
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "", f"expected SHA-256 {oid}")
        self.server.objects[oid] = content
        self.send(b"")

    def on_verify(self, oid: str) -> None:
        self.sign_in()
        if len(self.server.objects.get(oid, b"")) != self.json()["size"]:
            raise Refused(400, "", "size mismatch")
        self.send({})

    def on_commit(self, kind: str, repo: str, revision: str) -> None:
        self.sign_in()
        found = self.repository(kind, repo)
        files = dict(found.commits[self.at(found, revision)])
        title = ""
        for line in self.body().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    title = value["summary"]
                case "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), False)
                case "lfsFile":
                    if value["oid"] not in self.server.objects:
                        raise Refused(400, "", f"object {value['oid']} was never uploaded")
                    files[value["path"]] = File(self.server.objects[value["oid"]], True)
                case key:
                    raise Refused(400, "", f"unknown operation {key}")
        sha = found.commit(revision, title, files)
        self.send({"success": True, "commitOid": sha, "commitUrl": f"{self.server.endpoint}/{repo}/commit/{sha}"})

    def on_resolve(self, kind: str, repo: str, revision: str, path: str) -> None:
        found = self.repository(kind, repo)
        sha = self.at(found, revision)
        if path not in found.commits[sha]:
            self.send(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        file = found.commits[sha][path]
        self.send(file.content, headers={"ETag": f'"{file.oid}"', "X-Repo-Commit": sha})
