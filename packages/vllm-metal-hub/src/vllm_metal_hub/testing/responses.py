"""How the fault server answers one request of either hub."""

import contextlib
import json
import re
import socket
import struct
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from vllm_metal_hub.testing.faults import Fault
from vllm_metal_hub.testing.processes import command_of, process_of_port
from vllm_metal_hub.testing.repository import LARGE, Repository, commit_of, git_sha1, sha256

_BODY_KINDS = ("drop", "reset", "corrupt", "truncate", "stall", "ignore_range", "slow")
_HF_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?$")
_HF_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")
_MS = re.compile(r"/(?:api|openapi)/v1/models/([^/]+/[^/]+?)(?:/(repo/files|repo|revisions))?$")


@dataclass
class LoggedRequest:
    """One request; ``sent`` counts the bytes of the body that left.

    ``pid`` and ``command`` are of the process that asked: None and empty where that cannot be known.
    """

    method: str
    path: str
    range: str | None
    authorized: bool
    pid: int | None
    command: str
    on_storage: bool
    sent: int = 0


class HubRequest(BaseHTTPRequestHandler):
    """Routes one connection's requests; the server's ``state`` is the FaultServer."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        state: Any = self.server.state  # type: ignore[attr-defined]
        self._state = state
        token = self.headers.get("Authorization") or "m_session_id=" in (self.headers.get("Cookie") or "")
        port: int = self.server.server_port  # type: ignore[attr-defined]
        pid = process_of_port(self.client_address[1])
        self._log = LoggedRequest(
            self.command, self.path, self.headers.get("Range"), bool(token), pid, command_of(pid),
            state.storage_url.endswith(f":{port}"),
        )  # fmt: skip
        state.requests.append(self._log)
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if fault := self._fault("hang"):
                time.sleep(fault.seconds)
            if fault := self._fault("status"):
                self._json(
                    fault.status, {"error": "injected", "Code": fault.status, "Message": "injected"}, fault.headers
                )
            else:
                self._route()

    do_GET = do_HEAD = do_POST = _serve

    def _fault(self, *kinds: Any) -> Fault | None:
        found: Fault | None = self._state.faults.take(f"{self.command} {self.path}", kinds)
        return found

    def _json(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _route(self) -> None:
        address = urlsplit(self.path)
        path, query = unquote(address.path), {k: v[0] for k, v in parse_qs(address.query).items()}
        if path.startswith("/storage/"):
            _, _, owner, name, digest, file = path.split("/", 5)
            files = _all_files(self._repository(f"{owner}/{name}"), file)
            content = next((c for c in files if sha256(c) == digest), None)
            return self._json(404, {}) if content is None else self._file(content, {"ETag": f'"{digest}"'})
        if path.startswith("/api/v1/") or path.startswith("/openapi/"):
            return self._modelscope(path, query)
        if found := _HF_API.match(path):
            return self._huggingface_api(*found.groups())
        if found := _HF_FILE.match(path):
            return self._huggingface_file(*found.groups())
        return self._json(404, {"error": f"no route for {path}"})

    def _repository(self, repo: str) -> Repository | None:
        found: Repository | None = self._state.repositories.get(repo)
        return found

    def _refused(self, repository: Repository) -> int:
        """The status for a request without the right token; 0 to let it in."""
        if repository.gate is None:
            return 0
        sent = f"{self.headers.get('Authorization')} {self.headers.get('Cookie')}"
        if repository.gate in sent:
            return 0
        return 403 if self._log.authorized else 401

    # Hugging Face

    def _hf_error(self, status: int, code: str, text: str) -> None:
        self._json(status, {"error": text}, {"X-Error-Code": code, "X-Error-Message": text})

    def _huggingface(self, repo: str, revision: str) -> dict[str, bytes] | None:
        repository = self._repository(repo)
        if repository is None:
            self._hf_error(404 if self._log.authorized else 401, "RepoNotFound", "Repository not found")
            return None
        if status := self._refused(repository):
            self._hf_error(status, "GatedRepo", "Access to this model is restricted.")
            return None
        files = None if revision == "master" else repository.at(revision)
        if files is None:
            self._hf_error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return files

    def _huggingface_api(self, repo: str, kind: str | None, revision: str | None) -> None:
        files = self._huggingface(repo, revision or "main")
        if files is None:
            return
        if kind == "tree":
            self._json(200, [_tree_item(path, content) for path, content in sorted(files.items())])
            return
        self._json(
            200,
            {
                "_id": "0", "id": repo, "modelId": repo, "sha": commit_of(files), "private": False, "gated": False,
                "disabled": False, "tags": [], "downloads": 0, "likes": 0,
                "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": path} for path in files],
            },
        )  # fmt: skip

    def _huggingface_file(self, repo: str, revision: str, path: str) -> None:
        files = self._huggingface(repo, revision)
        if files is None:
            return
        if path not in files:
            self._hf_error(404, "EntryNotFound", "Entry not found")
            return
        content = files[path]
        headers = {"X-Repo-Commit": commit_of(files), "ETag": f'"{git_sha1(content)}"'}
        if path.endswith(LARGE):
            headers |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
            self._redirect(repo, path, content, headers)
        else:
            self._file(content, headers)

    def _redirect(self, repo: str, path: str, content: bytes, headers: dict[str, str]) -> None:
        location = f"{self._state.storage_url}/storage/{repo}/{sha256(content)}/{quote(path)}"
        self._json(302, {}, {**headers, "Location": location})

    # ModelScope

    def _ms_error(self, status: int, code: int, text: str) -> None:
        self._json(status, {"Code": code, "Data": None, "Message": text, "RequestId": "0", "Success": False})

    def _ms_ok(self, content: Any) -> None:
        self._json(200, {"Code": 200, "Data": content, "Message": "success", "RequestId": "0", "Success": True})

    def _modelscope(self, path: str, query: dict[str, str]) -> None:
        if path.endswith("/internalAccelerationInfo"):
            return self._ms_ok({"InternalRegionQueryAddress": ""})
        found = _MS.match(path)
        repository = self._repository(found[1]) if found else None
        if found is None or repository is None:
            return self._ms_error(404, 10010205001, "model not found")
        if status := self._refused(repository):
            return self._ms_error(status, 10010101007, "no permission to access the model")
        revision = query.get("Revision", "master")
        files = None if revision == "main" else repository.at(revision)
        if files is None:
            return self._ms_error(404, 10010205003, f"revision {revision} not found")
        if found[2] == "repo/files":
            return self._ms_ok({"Files": _ms_listing(files)})
        if found[2] == "repo":
            return self._modelscope_file(found[1], query.get("FilePath", ""), files)
        if found[2] == "revisions":
            return self._ms_ok({"RevisionMap": {"Branches": [{"Revision": "master"}], "Tags": []}})
        return self._ms_ok({"Id": 1, "Name": found[1].split("/")[1], "Path": found[1].split("/")[0]})

    def _modelscope_file(self, repo: str, path: str, files: dict[str, bytes]) -> None:
        if path not in files:
            self._ms_error(404, 10010205004, f"file {path} not found")
        elif path.endswith(LARGE):
            self._redirect(repo, path, files[path], {})
        else:
            self._file(files[path], {})

    # Bytes

    def _file(self, content: bytes, headers: dict[str, str]) -> None:
        fault = self._fault(*_BODY_KINDS)
        kind = fault.kind if fault else ""
        if fault and kind == "truncate":
            content = content[: fault.after]
        start, partial = 0, False
        if self.headers.get("Range") and kind != "ignore_range":
            start, partial = int(self.headers["Range"].removeprefix("bytes=").split("-")[0]), True
            if start >= len(content):
                return self._json(416, {}, {"Content-Range": f"bytes */{len(content)}"})
        body = content[start:] if start else content
        if kind == "corrupt" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 0xFF]) + body[middle + 1 :]
        self.send_response(206 if partial else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command != "HEAD":
            self._send(body, fault)
        return None

    def _send(self, body: bytes, fault: Fault | None) -> None:
        if fault and fault.kind in ("drop", "reset"):
            self._write(body[: fault.after])
            self._break_off(impolitely=fault.kind == "reset")
        elif fault and fault.kind == "stall":
            self._write(body[: fault.after])
            time.sleep(fault.seconds)
            self._write(body[fault.after :])
        elif fault and fault.kind == "slow":
            step = max(1, fault.after // 20)
            for at in range(0, len(body), step):
                self._write(body[at : at + step])
                time.sleep(0.05)
        else:
            self._write(body)

    def _write(self, block: bytes) -> None:
        view = memoryview(block)
        for at in range(0, len(view), 1 << 20):
            self._log.sent += self.wfile.write(view[at : at + (1 << 20)])

    def _break_off(self, impolitely: bool) -> None:
        self.wfile.flush()
        if impolitely:
            time.sleep(0.2)  # let what was sent arrive: a reset throws away what is under way
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True
        self.connection.close()


def _all_files(repository: Repository | None, path: str) -> list[bytes]:
    if repository is None:
        return []
    trees = [repository.files, *repository.tags.values()]
    return [tree[path] for tree in trees if path in tree]


def _tree_item(path: str, content: bytes) -> dict[str, Any]:
    item: dict[str, Any] = {"type": "file", "oid": git_sha1(content), "size": len(content), "path": path}
    if path.endswith(LARGE):
        item["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
    return item


def _ms_listing(files: dict[str, bytes]) -> list[dict[str, Any]]:
    folders = sorted({str(PurePosixPath(path).parent) for path in files if "/" in path})
    blobs = [
        {"Name": path, "Path": path, "Type": "blob", "Size": len(content), "Sha256": sha256(content)}
        for path, content in sorted(files.items())
    ]
    return blobs + [{"Name": path, "Path": path, "Type": "tree", "Size": 0, "Sha256": ""} for path in folders]
