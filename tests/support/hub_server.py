"""A local stand-in for the Hugging Face hub: the endpoints a file download uses, and its failures."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves `files[repo][name]`; `gated` repositories need `token`.

    Attributes:
        url: What HF_ENDPOINT must be.
        drop_after: Bytes of a file after which the connection is cut, once per entry of `drops`.
        requests: (method, path) of every request, in order.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.token = "secret"
        self.status: dict[str, int] = {}
        self.drop_after = 1000
        self.drops = 0
        self.requests: list[tuple[str, str]] = []
        self.url = ""

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append((request.command, request.path))
        path, _, name = request.path.lstrip("/").partition("/resolve/main/")
        if not name:
            path, _, name = request.path.lstrip("/").partition(f"/resolve/{COMMIT}/")
        if path not in self.files:
            return _fail(request, 401, "RepoNotFound")
        if path in self.status:
            return _fail(request, self.status[path], "")
        allowed = request.headers.get("Authorization") == f"Bearer {self.token}"
        if path in self.gated and not allowed:
            return _fail(request, 403 if "Authorization" in request.headers else 401, "GatedRepo")
        if name not in self.files[path]:
            return _fail(request, 404, "EntryNotFound")
        body = self.files[path][name]
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.end_headers()
        if request.command == "HEAD":
            return None
        if self.drops and len(body) > self.drop_after:
            self.drops -= 1
            request.wfile.write(body[: self.drop_after])
            request.wfile.flush()
            request.close_connection = True
            request.connection.close()
            return None
        request.wfile.write(body)
        return None


def _fail(request: BaseHTTPRequestHandler, status: int, code: str) -> None:
    request.send_response(status)
    if code:
        request.send_header("X-Error-Code", code)
        request.send_header("X-Repo-Commit", COMMIT)
    request.send_header("Content-Length", "0")
    request.end_headers()


@contextmanager
def serve() -> Iterator[HubServer]:
    """Yields a running server on a free local port."""
    hub = HubServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.handle(self)

        def do_HEAD(self) -> None:
            hub.handle(self)

        def log_message(self, *args: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: object) -> None:  # a connection cut on purpose
            pass

    server = Quiet(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
