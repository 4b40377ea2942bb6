"""`prepare` into a bucket: resumable, and nothing counts before the manifest."""

import json
import shutil

import numpy as np
import pytest
from gcsfs.retry import HttpError

from tttjax.data import encode, prepare_pass
from tttjax.data.pipeline import StreamOptions, make_train_stream
from tttjax.data.preparation import prepare
from tttjax.data.shards import open_prepared
from tttjax.errors import UnreachableError, UserError
from tttjax.io import block_cache
from tttjax.io.locks import Lock
from tttjax.io.paths import file_sizes, storage_path

OPTIONS = {"num_workers": 0, "shard_tokens": 900, "val_fraction": 0.3}  # needs no second pass


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in range(20):
        (folder / f"{name}.txt").write_text(f"text {name}: " + "é word " * (20 + name))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(block_cache.FOLDER, str(tmp_path / "cache" / "data"))
    monkeypatch.setattr(prepare_pass, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(encode, "_TASK_BYTES", 300)


def same_content(first, second):
    assert first.manifest["splits"] == second.manifest["splits"]
    for name in first.splits:
        one, other = first.split(name), second.split(name)
        np.testing.assert_array_equal(one.read(0, one.num_tokens), other.read(0, one.num_tokens))
        assert [*one.documents()] == [*other.documents()]


def test_data_in_a_bucket_equal_those_on_disk(texts, bucket, tmp_path):
    local, remote = (prepare([texts], out, **OPTIONS) for out in (tmp_path / "data", bucket))
    same_content(local, remote)
    open_prepared(bucket, verify=True)
    options = StreamOptions(seq_len=16, batch_size=4)
    streams = [make_train_stream([data.folder], options) for data in (local, remote)]
    assert streams[0].get_state() == streams[1].get_state()
    for _ in range(30):
        one, other = map(next, streams)
        np.testing.assert_array_equal(one.inputs, other.inputs)
    for stream in streams:
        stream.close()
    assert not (tmp_path / "cache" / "prepare").exists() or not any(
        (tmp_path / "cache" / "prepare").iterdir()
    )


def test_parts_are_joined_in_a_bucket(texts, bucket, tmp_path):
    local = prepare([texts], tmp_path / "data", **OPTIONS)
    for part in ("1/3", "2/3", "0/3"):
        assert not (storage_path(bucket) / "manifest.json").exists()
        remote = prepare([texts], bucket, part=part, **OPTIONS)
    for name in local.splits:
        one, other = local.split(name), remote.split(name)
        np.testing.assert_array_equal(one.read(0, one.num_tokens), other.read(0, one.num_tokens))
        assert [*one.documents()] == [*other.documents()]
    open_prepared(bucket, verify=True)
    with pytest.raises(UserError, match="was prepared with other seed"):
        prepare([texts], bucket, part="0/3", **OPTIONS, seed=1)
    replaced = prepare([texts], bucket, overwrite=True, **OPTIONS)
    assert len(file_sizes(storage_path(bucket))) == len(file_sizes(tmp_path / "data"))
    same_content(local, replaced)


@pytest.mark.parametrize("is_same_host", [True, False])
def test_an_interrupted_call_is_resumed(is_same_host, texts, bucket, tmp_path, monkeypatch):
    reference = prepare([texts], tmp_path / "data", **OPTIONS)
    upload, done = prepare_pass.upload, []

    def fail(source, path):
        if len(done) == 5:
            raise UnreachableError("planned")
        done.append(path.name)
        upload(source, path)

    monkeypatch.setattr(prepare_pass, "upload", fail)
    with pytest.raises(UnreachableError, match="planned"):
        prepare([texts], bucket, **OPTIONS)
    with pytest.raises(UserError, match="is half prepared"):
        open_prepared(bucket)
    if not is_same_host:
        shutil.rmtree(tmp_path / "cache")
    again = []
    monkeypatch.setattr(
        prepare_pass, "upload", lambda *args: (again.append(args[1].name), upload(*args))
    )
    same_content(reference, prepare([texts], bucket, **OPTIONS))
    is_kept = done[0] not in again  # the first shard was complete, and journalled
    assert is_kept == is_same_host


@pytest.mark.parametrize("cause", ["credentials", "lock"])
def test_what_is_no_fault_of_the_data_deletes_nothing(cause, texts, bucket, tmp_path, monkeypatch):
    """Expired credentials, and a lock that another process took over and writes below."""
    upload, done = prepare_pass.upload, []

    def fail(source, path):
        if len(done) == 5 and cause == "credentials":
            raise UserError("refused") from HttpError({"code": 401})
        done.append(path)
        upload(source, path)

    def check(lock):
        if len(done) >= 5:
            lock.lost.set()
            raise UserError("took over the lock")

    if cause == "lock":
        monkeypatch.setattr(Lock, "check", check)
    monkeypatch.setattr(prepare_pass, "upload", fail)
    with pytest.raises(UserError, match=r"refused|took over"):
        prepare([texts], bucket, **OPTIONS)
    assert all(path.exists() for path in done)
    assert [*(tmp_path / "cache" / "prepare").glob("*/prepare.journal")]


def test_other_data_are_replaced_only_on_request(texts, bucket):
    prepare([texts], bucket, **OPTIONS)
    before = file_sizes(storage_path(bucket))
    assert prepare([texts], bucket, **OPTIONS).manifest["settings"]["shard_tokens"] == 900
    with pytest.raises(UserError, match=r"other shard_tokens .*--overwrite"):
        prepare([texts], bucket, **{**OPTIONS, "shard_tokens": 1 << 20})
    assert file_sizes(storage_path(bucket)) == before
    prepare([texts], bucket, **{**OPTIONS, "shard_tokens": 1 << 20}, overwrite=True)
    assert len(file_sizes(storage_path(bucket))) < len(before)
    (storage_path(bucket) / "manifest.json").unlink()
    (storage_path(bucket) / "train-00000.names").unlink()
    (storage_path(bucket) / "other").write_text("mine")
    with pytest.raises(UserError, match="is not empty and has no prepared data"):
        prepare([texts], bucket, **OPTIONS)


def test_damaged_objects_are_named(texts, bucket):
    data = prepare([texts], bucket, **OPTIONS)
    folder = storage_path(bucket)
    index = folder / "train-00000.documents"
    content = index.read_bytes()
    index.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"train-00000.documents is corrupt"):
        open_prepared(bucket).split("train").document_bounds()
    with pytest.raises(UserError, match=r"train-00000.documents is corrupt"):
        open_prepared(bucket, verify=True)
    index.write_bytes(content[:-16])
    with pytest.raises(UserError, match=r"train-00000.documents is truncated"):
        open_prepared(bucket)
    index.unlink()
    with pytest.raises(UserError, match=r"train-00000.documents is missing"):
        open_prepared(bucket)
    assert json.loads((folder / "manifest.json").read_text())["splits"] == data.splits
