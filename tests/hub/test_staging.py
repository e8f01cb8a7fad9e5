"""gptx.hub.staging: several processes at once, a killed one, locks."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptx import file_lock as module
from gptx.errors import IntegrityError, StorageError
from gptx.hub.staging import staging
from tests.support.hub import Client, check, check_files, model
from tests.support.hub_server import HubServer

posix = pytest.mark.skipif(sys.platform == "win32", reason="flock of POSIX")


def wrong_files(client: Client) -> Iterator[str]:
    """List blobs and links of snapshots with wrong content."""
    yield from client.wrong()
    for path in client.cache.glob("models--*/snapshots/*/*"):
        if path.name not in model() or path.read_bytes() != model()[path.name]:
            yield str(path.resolve())


def test_two_processes_at_once(server: HubServer, client: Client) -> None:
    """One downloads, the other waits; a third one sees no wrong file at any time."""
    server.repos["org/corrupt"] = {"main": model()}
    server.faults.corrupt.add("org/corrupt/model.safetensors")
    server.faults.delay = 0.02  # s: 0.26 s for the weights
    jobs = [{"model": "org/model"}, {"model": "org/corrupt"}]
    processes = [client.start(*jobs) for _ in range(2)]
    seen: set[str] = set()
    polls = 0
    while any(process.poll() is None for process in processes):
        seen.update(wrong_files(client))
        polls += 1
        time.sleep(0.03)
    assert polls > 10
    assert seen == set(wrong_files(client)) == set()
    assert client.partial() == []
    for process in processes:
        good, corrupt = client.finish(process)
        check_files(good, model())
        check(corrupt, IntegrityError)
    assert len(server.log("GET", "/cdn/org/model")) == 1
    blob = next(client.cache.glob("models--*/blobs/*"))
    blob.write_bytes(b"wrong")
    assert str(blob) in set(wrong_files(client))


def kill_during_a_download(server: HubServer, client: Client, size: int) -> None:
    """Kill a process when its partial file has `size` bytes; resume in this one."""
    server.faults.delay = 0.02
    process = client.start({"model": "org/model"})
    while process.poll() is None and not any(
        path.stat().st_size >= size for path in client.partial() if path.exists()
    ):
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert set(wrong_files(client)) == set()
    server.faults.delay = 0
    server.requests.clear()
    check_files(client.one("org/model"), model())
    assert client.partial() == []
    if size:
        assert any("range" in request.headers for request in server.requests)


def test_process_killed_during_a_download(server: HubServer, client: Client) -> None:
    kill_during_a_download(server, client, 100_000)


@pytest.mark.kill
@pytest.mark.parametrize("size", range(0, 200_000, 20_000))
def test_process_killed_at_each_chunk(server: HubServer, client: Client, size: int) -> None:
    kill_during_a_download(server, client, size)


class TestLocks:
    def test_threads_hold_the_lock_one_at_a_time(self, tmp_path: Path) -> None:
        inside: list[int] = []
        overlaps: list[int] = []

        def work(number: int) -> None:
            with staging(tmp_path / "file", tmp_path / "lock"):
                overlaps.extend(inside)
                inside.append(number)
                time.sleep(0.01)
                inside.remove(number)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert overlaps == []

    def test_huggingface_hub_waits_for_it(self, tmp_path: Path) -> None:
        filelock = pytest.importorskip("filelock")
        lock = filelock.FileLock(tmp_path / "lock", timeout=0)
        with staging(tmp_path / "file", tmp_path / "lock"), pytest.raises(filelock.Timeout):
            lock.acquire()
        with lock:
            pass

    @posix
    def test_lock_file_that_another_process_deletes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "lock"
        acquire = module._acquire

        def acquire_and_delete(descriptor: int) -> bool:
            monkeypatch.setattr(module, "_acquire", acquire)
            path.unlink()
            return acquire(descriptor)

        monkeypatch.setattr(module, "_acquire", acquire_and_delete)
        with staging(tmp_path / "file", path):
            assert path.exists()

    @posix
    def test_file_system_without_locks(
        self,
        server: HubServer,
        client: Client,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def refuse(*_: object) -> None:
            raise OSError(errno.ENOSYS, "not supported")

        monkeypatch.setattr("fcntl.flock", refuse)
        with (
            staging(tmp_path / "a", tmp_path / "lock") as first,
            staging(tmp_path / "a", tmp_path / "lock") as second,
        ):
            assert first != second
            first.mkdir()
            second.touch()
        assert not first.exists()
        assert not second.exists()
        check_files(client.one("org/model"), model())
        assert client.partial() == []

    @posix
    def test_other_errors_of_a_lock(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr("fcntl.flock", fail)
        with pytest.raises(OSError, match="Input/output error"):
            staging(tmp_path / "a", tmp_path / "lock").__enter__()


@posix
@pytest.mark.parametrize("name", ["blob", "blob.incomplete", "blob.lock"])
def test_a_fifo_in_the_cache_is_neither_replaced_nor_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    context = staging(tmp_path / "blob", tmp_path / "blob.lock")
    with pytest.raises(StorageError, match="is a FIFO, expected a regular file"):
        context.__enter__()
    assert (tmp_path / name).is_fifo()
