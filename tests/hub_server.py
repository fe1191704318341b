"""
A Hub of models on loopback, in memory: what huggingface_hub, transformers and peft ask of the real one when they push
and pull. Clients need `HF_ENDPOINT` set to `Hub.endpoint` and `HF_HUB_DISABLE_XET=1`, before they are imported.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Annotated, Any
from urllib.parse import unquote

import uvicorn
import yaml
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse


TOKEN = "hf_token_of_the_tests"
USER = "tester"
LARGE_FILES = (".safetensors", ".parquet", ".gz", ".bin", ".npy")


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


@dataclass
class Hub:
    """repositories: by id. objects: large files by SHA-256."""

    endpoint: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def files(self, repo: str) -> dict[str, bytes]:
        """Contents by path."""
        found = self.repositories[repo]
        return {path: file.content for path, file in found.commits[found.branches["main"]].items()}


@contextmanager
def running_hub() -> Iterator[Hub]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        hub = Hub(f"http://127.0.0.1:{listening.getsockname()[1]}")
        server = uvicorn.Server(uvicorn.Config(application(hub), log_level="error"))
        thread = threading.Thread(target=server.run, args=[[listening]])
        thread.start()
        try:
            yield hub
        finally:
            server.should_exit = True
            thread.join()


def is_signed_in(request: Request) -> bool:
    return request.headers.get("Authorization") == f"Bearer {TOKEN}"


def sign_in(request: Request) -> None:
    if not is_signed_in(request):
        raise Refused(401, "", "Invalid credentials in Authorization header")


def commit_at(found: Repository, revision: str) -> str:
    sha = found.branches.get(unquote(revision), revision)
    if sha not in found.commits:
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return sha


def entry(path: str, file: File) -> dict[str, Any]:
    size = len(file.content)
    large = {"lfs": {"oid": file.oid, "size": size, "pointerSize": 130}} if file.large else {}
    return {"type": "file", "path": path, "oid": file.oid, "size": size, **large}


def application(hub: Hub) -> FastAPI:
    app = FastAPI()
    signed_in = [Depends(sign_in)]

    def repository(owner: str, name: str, request: Request) -> Repository:
        """Who may not see a repository learns no more than that of one that is not there."""
        found = hub.repositories.get(f"{owner}/{name}")
        if found is None or found.private and not is_signed_in(request):
            raise Refused(404 if is_signed_in(request) else 401, "RepoNotFound", "Repository not found")
        return found

    Found = Annotated[Repository, Depends(repository)]

    @app.exception_handler(Refused)
    def refuse(request: Request, error: Refused) -> Response:
        headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
        return JSONResponse({"error": str(error)}, error.status, headers)

    @app.middleware("http")
    async def keep_escaped_slashes(request: Request, call_next) -> Response:
        """A branch's name may hold one."""
        request.scope["path"] = request.scope["raw_path"].decode()
        return await call_next(request)

    @app.post("/api/validate-yaml")
    def validate_card(values: dict) -> dict:
        card_data(values["content"])
        return {"errors": [], "warnings": []}

    @app.post("/api/repos/create", dependencies=signed_in)
    def create(values: dict) -> Response:
        repo = f"{values.get('organization') or USER}/{values['name']}"
        url = f"{hub.endpoint}/{repo}"
        if repo in hub.repositories:
            return JSONResponse({"error": "You already created this repo", "url": url}, 409)
        hub.repositories[repo] = created = Repository(values.get("visibility") == "private")
        created.commit("main", "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
        return JSONResponse({"url": url, "name": repo})

    @app.get("/api/models/{owner}/{name}")
    @app.get("/api/models/{owner}/{name}/revision/{revision}")
    def info(found: Found, owner: str, name: str, revision: str = "main") -> dict:
        sha = commit_at(found, revision)
        files = found.commits[sha]
        card = card_data(files["README.md"].content.decode()) if "README.md" in files else {}
        return {
            "id": f"{owner}/{name}",
            "sha": sha,
            "private": found.private,
            "lastModified": "2026-01-01T00:00:00.000Z",
            "tags": [],
            "siblings": [{"rfilename": path} for path in files],
            "cardData": card,
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
        }

    @app.get("/api/models/{owner}/{name}/tree/{revision}")
    @app.get("/api/models/{owner}/{name}/tree/{revision}/{path:path}")
    def tree(found: Found, revision: str, path: str = "") -> list:
        files = found.commits[commit_at(found, revision)]
        inside = {name: file for name, file in files.items() if not path or name.startswith(f"{path}/")}
        if not inside:
            raise Refused(404, "EntryNotFound", f"{path} does not exist")
        folders = {str(folder) for name in inside for folder in PurePosixPath(name).parents[:-1]}
        listed = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        return listed + [entry(name, file) for name, file in sorted(inside.items())]

    @app.post("/api/models/{owner}/{name}/branch/{revision}", dependencies=signed_in)
    def create_branch(found: Found, revision: str, values: dict) -> dict:
        if unquote(revision) in found.branches:
            raise Refused(409, "", "Reference already exists")
        found.branches[unquote(revision)] = commit_at(found, values.get("startingPoint", "main"))
        return {}

    @app.post("/api/models/{owner}/{name}/preupload/{revision}", dependencies=signed_in)
    def preupload(found: Found, revision: str, values: dict) -> dict:
        present = found.commits[commit_at(found, revision)]
        answers = []
        for path in (item["path"] for item in values["files"]):
            mode = "lfs" if path.endswith(LARGE_FILES) else "regular"
            known = {"oid": present[path].oid} if path in present else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return {"files": answers}

    @app.post("/{owner}/{name}.git/info/lfs/objects/batch", dependencies=signed_in)
    def large_files(found: Found, values: dict) -> dict:
        for item in values["objects"]:
            if item["oid"] not in hub.objects:
                href = f"{hub.endpoint}/objects/{item['oid']}"
                item["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        return {"transfer": "basic", "objects": values["objects"]}

    @app.put("/objects/{oid}")
    async def upload(oid: str, request: Request) -> None:
        content = await request.body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "", f"expected SHA-256 {oid}")
        hub.objects[oid] = content

    @app.post("/objects/{oid}/verify", dependencies=signed_in)
    def verify(oid: str, values: dict) -> None:
        if len(hub.objects.get(oid, b"")) != values["size"]:
            raise Refused(400, "", "size mismatch")

    @app.post("/api/models/{owner}/{name}/commit/{revision}", dependencies=signed_in)
    async def commit(found: Found, owner: str, name: str, revision: str, request: Request) -> dict:
        files = dict(found.commits[commit_at(found, revision)])
        title = ""
        for operation in map(json.loads, (await request.body()).splitlines()):
            value = operation["value"]
            match operation["key"]:
                case "header":
                    title = value["summary"]
                case "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), False)
                case "lfsFile":
                    if value["oid"] not in hub.objects:
                        raise Refused(400, "", f"object {value['oid']} was never uploaded")
                    files[value["path"]] = File(hub.objects[value["oid"]], True)
                case key:
                    raise Refused(400, "", f"unknown operation {key}")
        sha = found.commit(unquote(revision), title, files)
        return {"success": True, "commitOid": sha, "commitUrl": f"{hub.endpoint}/{owner}/{name}/commit/{sha}"}

    @app.api_route("/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    def resolve(found: Found, revision: str, path: str) -> Response:
        sha = commit_at(found, revision)
        file = found.commits[sha].get(unquote(path))
        if file is None:
            return Response(status_code=404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        return Response(file.content, headers={"ETag": f'"{file.oid}"', "X-Repo-Commit": sha})

    return app
