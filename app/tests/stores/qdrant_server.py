"""Stands in for a Qdrant server, of which there is no package: the engine is the local mode of Qdrant's own client, and
the interface, as far as a store of ours asks for it, that of Qdrant's REST API.

Run as a program it serves: PORT LOCATION; the key is the variable KEY.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from qdrant_client.http import models
from qdrant_client.local.qdrant_local import QdrantLocal

START_TIMEOUT_S = 60
MEMORY = ":memory:"


@dataclass
class QdrantServer:
    """A process; what it holds is gone with it, unless it has a directory (which takes its time)."""

    directory: Path | None = None
    key: str = field(default_factory=secrets.token_hex, repr=False)
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """On the port that it had before, if it had one."""
        if not self.port:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
        command = [sys.executable, __file__, str(self.port), str(self.directory or MEMORY)]
        self.process = subprocess.Popen(command, env={**os.environ, "KEY": self.key})
        until = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the server that stands in for Qdrant does not start")
            time.sleep(0.05)

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class _Api:
    def __init__(self, location: str) -> None:
        self._engine = QdrantLocal(location)
        self._lock = threading.Lock()
        self._routes: list[tuple[str, str, Callable[..., Any]]] = [
            ("GET", r"/collections", lambda _: self._engine.get_collections()),
            ("GET", r"/collections/([^/]+)/exists", self._exists),
            ("GET", r"/collections/([^/]+)", lambda _, name: self._engine.get_collection(name)),
            ("PUT", r"/collections/([^/]+)", self._create),
            ("DELETE", r"/collections/([^/]+)", lambda _, name: self._engine.delete_collection(name)),
            ("PUT", r"/collections/([^/]+)/index", lambda *_: _done()),
            ("PUT", r"/collections/([^/]+)/points", self._put),
            ("POST", r"/collections/([^/]+)/points/query", self._query),
            ("POST", r"/collections/([^/]+)/points/scroll", self._scroll),
            ("POST", r"/collections/([^/]+)/points/count", self._count),
        ]

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        for known, pattern, run in self._routes:
            match = re.fullmatch(pattern, path)
            if known == method and match:
                try:
                    with self._lock:
                        return 200, _plain(run(body, *match.groups()))
                except ValueError as error:
                    return (404 if "not found" in str(error) else 400), str(error)
        return 404, f"no such route: {method} {path}"

    def _exists(self, _: bytes, name: str) -> Any:
        return {"exists": self._engine.collection_exists(name)}

    def _create(self, body: bytes, name: str) -> Any:
        asked = models.CreateCollection.model_validate_json(body)
        return self._engine.create_collection(name, vectors_config=asked.vectors)

    def _put(self, body: bytes, name: str) -> Any:
        self._engine.upsert(name, models.PointsList.model_validate_json(body).points)
        return _done()

    def _query(self, body: bytes, name: str) -> Any:
        asked: Any = models.QueryRequest.model_validate_json(body)
        return self._engine.query_points(
            name, asked.query, using=asked.using or None, query_filter=asked.filter, limit=asked.limit or 10
        )

    def _scroll(self, body: bytes, name: str) -> Any:
        asked = models.ScrollRequest.model_validate_json(body)
        points, after = self._engine.scroll(
            name, asked.filter, limit=asked.limit or 10, with_vectors=bool(asked.with_vector)
        )
        return {"points": [_plain(point) for point in points], "next_page_offset": after}

    def _count(self, body: bytes, name: str) -> Any:
        return self._engine.count(name, models.CountRequest.model_validate_json(body).filter)


def _done() -> Any:
    return models.UpdateResult(operation_id=0, status=models.UpdateStatus.COMPLETED)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _serve(port: int, location: str, key: str) -> None:
    warnings.filterwarnings("ignore")  # of local mode, that it is none for so many points
    api = _Api(location)

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.headers.get("api-key") != key:
                status, result = 401, "Must provide an API key or an Authorization bearer token"
            else:
                status, result = api.answer(self.command, self.path.partition("?")[0], body)
            wrapped = {"result": result, "status": "ok"} if status == 200 else {"status": {"error": result}}
            answer = json.dumps(wrapped | {"time": 0.0}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_PUT = do_POST = do_DELETE = _any  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """Nobody reads it."""

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2], os.environ["KEY"])
