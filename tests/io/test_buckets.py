"""Paths, files, locks and reads in buckets, against emulators."""

import json
import os
import socket
import threading
import time

import numpy as np
import pytest

from tttjax.cli import main
from tttjax.errors import UnreachableError, UserError
from tttjax.io import block_cache, buckets, locks
from tttjax.io.atomic import atomic_write, local_copy
from tttjax.io.block_cache import CachedObject
from tttjax.io.lock_holder import LockHolder
from tttjax.io.locks import LockHeldError, hold
from tttjax.io.paths import file_sizes, remove_tree, storage_path, walk
from tttjax.io.spool import Spool


@pytest.fixture(autouse=True)
def _nothing_here(tmp_path, monkeypatch):
    """No local folder called `gs:` may ever appear."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert not any(folder.iterdir())


def test_a_path_behaves_as_one_of_pathlib(bucket):
    folder = storage_path(bucket)
    assert storage_path(folder) == folder.absolute() == folder.resolve() == folder
    assert str(folder / "a" / "b.txt") == f"{bucket}/a/b.txt"
    assert not folder.exists()
    assert not any(folder.iterdir())
    folder.mkdir(parents=True)
    (folder / "a" / "b.txt").write_text("é\n")
    (folder / "c").write_bytes(b"123")
    assert folder.is_dir()
    assert (folder / "c").is_file()
    assert (folder / "c").stat().st_size == 3
    assert file_sizes(folder) == {"a/b.txt": 3, "c": 3}
    assert [path.name for path in folder.glob("*/*.txt")] == ["b.txt"]
    assert list(walk(folder)) == [(folder, ["a"], ["c"]), (folder / "a", [], ["b.txt"])]
    with (folder / "a" / "b.txt").open(encoding="utf-8", errors="replace") as file:
        assert file.read() == "é\n"
    (folder / "a").rename(folder / "moved")
    assert sorted(path.name for path in folder.iterdir()) == ["c", "moved"]
    with pytest.raises(FileExistsError):
        (folder / "c").rename(folder / "moved")
    (folder / "none").unlink(missing_ok=True)
    remove_tree(folder)
    remove_tree(folder)
    assert not folder.exists()


def test_a_write_appears_whole_or_not_at_all(bucket, tmp_path):
    path = storage_path(bucket) / "file"
    with pytest.raises(AttributeError), atomic_write(path) as temporary:
        temporary.write_text("half").fails()
    assert not path.exists()
    with atomic_write(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    with local_copy(path.parent, tmp_path) as copy:
        assert (copy / "file").read_text() == "whole"
    assert not copy.exists()


@pytest.mark.parametrize(
    ("url", "phrase"),
    [
        ("{}://no-such-bucket/x", "does not exist; check its name, or create it"),
        ("{}://user:word@bkt/x", "{}://bkt/x holds credentials"),
        ("{}://bkt/x?token=word", "{}://bkt/x holds credentials"),
        ("{}:///x", "names no bucket"),
        ("{}://bkt/run[1]", "choose one without * ? and ["),
        ("{}://bkt/run*", "choose one without * ? and ["),
    ],
)
def test_bad_bucket_paths_are_refused(url, phrase, buckets, capsys):
    for scheme in ("gs", "s3"):
        path = url.format(scheme)
        assert main.main(["evaluate", path]) == 2
        error = capsys.readouterr().err
        assert phrase.format(scheme) in error
        assert "word" not in error


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
    for scheme, package in (("gs", "gcsfs"), ("s3", "s3fs")):
        with pytest.raises(UserError, match=rf"needs {package}: .*\.\[(gcs|s3)\]"):
            storage_path(f"{scheme}://bkt/x")


@pytest.mark.exhaustive
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_an_unreachable_bucket_is_one_sentence(scheme, monkeypatch, buckets, capsys):
    from tttjax.io.buckets import _file_system, _reach

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        import fsspec

        for cache in (_file_system, _reach):
            cache.cache_clear()
        fsspec.get_filesystem_class(scheme).clear_instance_cache()
        try:
            assert main.main(["evaluate", f"{scheme}://bkt/x"]) == 2
        finally:
            for cache in (_file_system, _reach):
                cache.cache_clear()
            fsspec.get_filesystem_class(scheme).clear_instance_cache()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"error: {scheme}://bkt cannot be reached" in error
    assert "check the network and the credentials" in error


# Retries -----------------------------------------------------------------------------------------


def library_error(status=503):
    from gcsfs.retry import validate_response

    with pytest.raises(Exception) as raised:  # noqa: PT011 (of a class for each status)
        validate_response(status, b"planned", "bkt/x")
    return raised.value


def test_a_failed_request_is_repeated_and_then_given_up(monkeypatch, capsys):
    monkeypatch.setattr(buckets, "_DELAYS_S", (0.01, 0.01))
    failures = [library_error(), library_error(502)]

    def call():
        if failures:
            raise failures.pop()
        return "answer"

    assert buckets.retried("reading", "gs://bkt/x", call) == "answer"
    assert capsys.readouterr().err.count("note: reading gs://bkt/x failed") == 2
    failures += [library_error() for _ in range(3)]
    with pytest.raises(UnreachableError, match="gs://bkt/x cannot be reached"):
        buckets.retried("reading", "gs://bkt/x", call)
    failures += [library_error(403)]
    with pytest.raises(UserError, match="may read and write there") as refused:
        buckets.retried("reading", "gs://bkt/x", call)
    assert not isinstance(refused.value, UnreachableError)
    failures += [ValueError("a bug")]
    with pytest.raises(ValueError, match="a bug"):
        buckets.retried("reading", "gs://bkt/x", call)


# Locks -------------------------------------------------------------------------------------------


def test_two_processes_do_not_lock_one_folder(bucket):
    refused = pytest.raises(LockHeldError, match="process")
    with hold(bucket, exit_on_sigterm=False), refused, hold(bucket):
        pass
    assert not storage_path(bucket).exists()


def test_a_lock_of_another_host_is_watched(bucket, monkeypatch):
    """One with heartbeats is refused; a silent one is taken over, and its holder learns of it."""
    monkeypatch.setattr(locks, "SETTLE_SECONDS", 0.1)
    lines: list[str] = []
    options = {"log": lines.append, "heartbeat_s": 0.1, "exit_on_sigterm": False}
    with hold(bucket, **options) as first:
        path = storage_path(bucket) / ".lock"
        monkeypatch.setattr(LockHolder, "is_on_this_host", lambda holder: False)
        with pytest.raises(LockHeldError), hold(bucket, watch_s=2.0, **options):
            pass
        assert json.loads(path.read_text())["beats"] > 0
        silent = {**json.loads(path.read_text()), "token": "another", "host": "elsewhere"}
        end = time.monotonic() + 10
        while not first.lost.is_set() and time.monotonic() < end:
            path.write_text(json.dumps(silent))  # again, if a heartbeat came between
            time.sleep(0.2)
        with pytest.raises(UserError, match="took over"):
            first.check()
        with hold(bucket, watch_s=0.5, **options):
            assert json.loads(path.read_text())["token"] != "another"
    assert any("taking over" in line for line in lines)


def test_a_lock_whose_answer_was_lost_is_held(bucket, monkeypatch):
    create = buckets.create
    monkeypatch.setattr(buckets, "create", lambda *args: create(*args) and False)
    with hold(bucket, exit_on_sigterm=False):
        assert (storage_path(bucket) / ".lock").exists()
    assert not storage_path(bucket).exists()


def test_of_many_creators_one_succeeds(bucket):
    path, won = storage_path(bucket) / "object", []

    def create(number):
        if buckets.create(path, b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=create, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert path.read_bytes() == b"%d" % won[0]


# Reads by range ----------------------------------------------------------------------------------


BLOCK = 1 << 10


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(block_cache, "BLOCK", BLOCK)
    monkeypatch.setenv(block_cache.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


def raise_disk_full(*_):
    raise OSError(28, "No space left on device")


def count_requests(monkeypatch):
    requests, read = [], buckets.read_range

    def read_range(path, start, stop):
        requests.append((start, stop))
        return read(path, start, stop)

    monkeypatch.setattr(buckets, "read_range", read_range)
    return requests


def test_ranges_are_exact_and_cached(bucket, cache, monkeypatch):
    requests = count_requests(monkeypatch)
    content = np.random.default_rng(0).bytes(3 * BLOCK + 100)
    path = storage_path(bucket) / "object"
    path.write_bytes(content)
    source = CachedObject(path, len(content), "v1")
    for start, stop in [(5, 9), (BLOCK - 2, 3 * BLOCK + 50), (3 * BLOCK, len(content)), (7, 7)]:
        assert source.read(start, stop) == content[start:stop]
    assert requests == [(0, BLOCK), (BLOCK, len(content))]
    requests.clear()
    assert CachedObject(path, len(content), "v1").read(0, len(content)) == content
    assert not requests
    damaged = next(file for file in cache.rglob("*") if file.is_file() and file.name == "1")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    assert source.read(0, len(content)) == content
    assert requests == [(BLOCK, 2 * BLOCK)]
    path.write_bytes(content[:BLOCK])
    with pytest.raises(UserError, match="has changed"):
        CachedObject(path, len(content), "v2").read(BLOCK - 1, BLOCK + 1)


def test_the_cache_keeps_its_budget(bucket, cache, monkeypatch):
    monkeypatch.setenv(block_cache.BUDGET, str(8 * BLOCK / 1e9))
    content = np.random.default_rng(1).bytes(40 * BLOCK)
    path = storage_path(bucket) / "object"
    path.write_bytes(content)
    source = CachedObject(path, len(content), "v1")
    requests = count_requests(monkeypatch)
    for block in range(40):
        assert source.read(block * BLOCK, (block + 1) * BLOCK) == content[block * BLOCK :][:BLOCK]
        assert source.read(0, 1) == content[:1]  # in use, so it stays
        assert sum(file_sizes(cache).values()) <= 9 * BLOCK
    assert requests.count((0, BLOCK)) == 1
    monkeypatch.setattr(block_cache.os, "replace", raise_disk_full)
    before = file_sizes(cache)
    source.read(20 * BLOCK, 21 * BLOCK)
    assert file_sizes(cache) == before  # nothing half-written either
    for text in ("none", "0", "-1", "nan"):
        monkeypatch.setenv(block_cache.BUDGET, text)
        with pytest.raises(UserError, match=f"{block_cache.BUDGET}={text} must be"):
            block_cache.cache_budget()


# Files that grow ---------------------------------------------------------------------------------


def test_a_spool_uploads_what_has_changed(bucket):
    folder = storage_path(bucket)
    (folder / "log").write_text("1\n")
    spool = Spool(folder, ("log", "none"))
    with (spool.folder / "log").open("a") as file:
        file.write("2\n")
    (spool.folder / "sub").mkdir()
    (spool.folder / "sub" / "new").write_text("x")
    assert file_sizes(folder) == {"log": 2}
    (spool.folder / "broken link").symlink_to("none")  # wandb makes such
    spool.upload()
    assert (folder / "log").read_text() == "1\n2\n"
    (folder / "log").unlink()  # not written again without a change
    spool.close()
    assert file_sizes(folder) == {"sub/new": 1}
    assert not os.path.exists(spool.folder)


def test_a_bucket_that_is_slow_does_not_hold_up_a_run(bucket, monkeypatch):
    import tttjax.io.spool as spool_module

    answers, upload = threading.Event(), spool_module.upload

    def upload_late(source, path):
        answers.wait(30)
        upload(source, path)

    monkeypatch.setattr(spool_module, "upload", upload_late)
    monkeypatch.setattr(spool_module, "UPLOAD_SECONDS", 0.0)
    spool = Spool(storage_path(bucket))
    (spool.folder / "metrics").write_text("1")
    spool.upload_sometimes()  # returns although nothing answers
    (spool.folder / "metrics").write_text("12")
    spool.upload_sometimes()  # one at a time
    assert not (storage_path(bucket) / "metrics").exists()
    answers.set()
    spool.close()
    assert (storage_path(bucket) / "metrics").read_text() == "12"


def test_a_failed_request_is_not_a_missing_folder(bucket, monkeypatch):
    """fsspec says of a folder that it is none if the connection breaks."""
    folder = storage_path(bucket)
    (folder / "file").write_text("1")

    def fail(path):
        raise ConnectionResetError

    monkeypatch.setattr(buckets.file_system(folder), "info", fail)
    for question in (folder.is_dir, folder.exists, (folder / "file").is_file):
        with pytest.raises(ConnectionResetError):
            question()
