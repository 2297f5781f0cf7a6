"""A real S3 server, and in front of it a proxy that can be told to misbehave."""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}

_CODES = {"503": "SlowDown", "403": "AccessDenied", "501": "NotImplemented"}


@dataclass
class Trouble:
    """One kind of misbehaviour.

    Attributes:
        kind: ``503``, ``403``, ``cut`` (half of the body), ``stall`` (half of the body, then silence).
        times: how many requests it hits; the rest pass.
        match: requests whose path matches.
        method: which requests.
        after: requests of that kind that pass first.
    """

    kind: str
    times: int = 1
    match: str = r"\.tar$"
    method: str = "GET"
    after: int = 0
    hit: int = 0


@dataclass
class Proxy:
    """The misbehaving door to the server.

    Attributes:
        endpoint: its URL.
        upstream: host and port of the real server.
        troubles: what to do wrong; change it at any time.
        seen: requests by method and path, ``"GET /bucket/key"``.
        sent: bytes of bodies sent, by method and path.
        served: bytes of all bodies sent.
        conditions: whether it knows conditional writes; without them it answers 501, as some servers do.
        on_request: called with method and path before each request.
    """

    upstream: tuple[str, int]
    endpoint: str = ""
    troubles: list[Trouble] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    served: int = 0
    delay: float = 0.0
    conditions: bool = True
    on_request: Callable[[str, str], None] | None = None
    lock: Any = field(default_factory=threading.Lock)

    def trouble(self, method: str, path: str) -> str:
        with self.lock:
            self.seen[f"{method} {path}"] += 1
            for one in self.troubles:
                if one.method == method and re.search(one.match, path):
                    if one.after > 0:
                        one.after -= 1
                        continue
                    if one.hit < one.times:
                        one.hit += 1
                        return one.kind
        return ""

    def total(self, method: str) -> int:
        return sum(count for name, count in self.seen.items() if name.startswith(f"{method} "))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def server() -> Iterator[int]:
    """A moto server in a process of its own; yields its port."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **KEYS},
    )
    try:
        end = time.monotonic() + 900
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


@contextmanager
def proxy(port: int) -> Iterator[Proxy]:
    """The proxy before the server at ``port``."""
    door = Proxy(("127.0.0.1", port))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            path = self.path.partition("?")[0]
            if door.on_request is not None:
                door.on_request(self.command, path)
            length = int(self.headers.get("Content-Length") or 0)
            sent = self.rfile.read(length) if length else None  # in any case: the next request comes over the same connection
            kind = door.trouble(self.command, path)
            if door.delay:
                time.sleep(door.delay)
            if not door.conditions and self.command == "PUT" and (self.headers["If-Match"] or self.headers["If-None-Match"]):
                kind = "501"
            if kind in _CODES:
                body = f"<Error><Code>{_CODES[kind]}</Code></Error>".encode()
                self.send_response(int(kind))
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)
                return
            upstream = http.client.HTTPConnection(*door.upstream, timeout=600)
            upstream.request(self.command, self.path, sent, dict(self.headers))
            answer = upstream.getresponse()
            body = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(body)))
            self.end_headers()
            upstream.close()
            if self.command == "HEAD":
                return
            if kind in ("cut", "stall"):
                body = body[: len(body) // 2]
            with door.lock:
                door.served += len(body)
                door.sent[f"{self.command} {path}"] += len(body)
            self.wfile.write(body)
            if kind == "stall":
                self.wfile.flush()
                time.sleep(20)
            if kind:
                self.close_connection = True

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _do

        def handle(self) -> None:
            with suppress(ConnectionError):
                super().handle()

        def log_message(self, *_: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    door.endpoint = f"http://127.0.0.1:{httpd.server_address[1]}"
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield door
    finally:
        httpd.shutdown()
        httpd.server_close()


def upload(port: int, bucket: str, files: dict[str, Path], *, public: bool = False) -> None:
    """Puts files into a bucket of the server, which is made if it is not there."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    if bucket not in [found["Name"] for found in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=bucket)
    for key, path in files.items():
        client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes(), ACL="public-read" if public else "private")
