"""A local stand-in for the Hugging Face hub: as much of its HTTP API as an upload asks for, and what it was told.

Large files come by the LFS protocol; the newer one (xet) has a store of its own, so who uploads here turns that off.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_LARGE = (".safetensors", ".onnx")


@dataclass
class Hub:
    """What was asked of it.

    Parameters
    ----------
    made
        Bodies of the calls that made a repository.
    files
        What was uploaded, by path.
    tokens
        Who asked.
    refuses
        Whether nobody may make a repository.
    """

    address: str = ""
    made: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    refuses: bool = False
    stored: dict[str, bytes] = field(default_factory=dict)

    def create(self, given: bytes) -> Any:
        asked = json.loads(given)
        self.made.append(asked)
        return None if self.refuses else {"url": f"{self.address}/{asked['organization']}/{asked['name']}"}

    def preupload(self, given: bytes) -> Any:
        modes = {path: "lfs" if path.endswith(_LARGE) else "regular" for path in _listed(given, "files", "path")}
        return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}

    def batch(self, given: bytes) -> Any:
        upload = {oid: {"upload": {"href": f"{self.address}/put/{oid}"}} for oid in _listed(given, "objects", "oid")}
        return {"transfer": "basic", "objects": [{"oid": oid, "size": 1, "actions": do} for oid, do in upload.items()]}

    def commit(self, given: bytes) -> Any:
        for line in given.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            if entry["key"] == "lfsFile":
                self.files[value["path"]] = self.stored[value["oid"]]
        return {"commitUrl": f"{self.address}/lab/x/commit/{'f' * 40}", "commitOid": "f" * 40, "pullRequestUrl": None}


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (_Answers,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Answers(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        listed = [{"type": "file", "path": path, "oid": "0" * 40, "size": 1} for path in self.hub.files]
        self.answer(listed if "/tree/main" in self.path else None)

    def do_PUT(self) -> None:
        self.hub.stored[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        calls = {
            "/repos/create": self.hub.create,
            "/validate-yaml": lambda _: {"errors": [], "warnings": []},
            "/preupload/main": self.hub.preupload,
            "/objects/batch": self.hub.batch,
            "/commit/main": self.hub.commit,
        }
        given, path = self.body(), self.path.partition("?")[0]
        self.answer(next((call(given) for end, call in calls.items() if path.endswith(end)), None))

    def body(self) -> bytes:
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, body: Any) -> None:
        data = json.dumps({"error": "not for you"} if body is None else body).encode()
        self.send_response(403 if body is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _listed(given: bytes, key: str, name: str) -> list[str]:
    return [one[name] for one in json.loads(given)[key]]
