"""Texts behind URLs: the same documents as from files, changes noticed, failures in a sentence."""

import contextlib
import functools
import gzip
import json
import os
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.registry import known_implementations

from tttjax.cli.main import main
from tttjax.data import remote
from tttjax.data.documents import item_spans, read_items
from tttjax.data.inputs import list_inputs
from tttjax.data.preparation import prepare
from tttjax.data.shards import JOURNAL, MANIFEST
from tttjax.data.streams import read_text, zstd
from tttjax.errors import ResumableError, UserError
from tttjax.runs.long_text import find_text, text_fingerprint

TEXT = "Zwölf Boxkämpfer 😀\r\n" * 200


@pytest.fixture
def bucket():
    """fsspec's file system in memory, as `memory://`."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


@contextlib.contextmanager
def serve(folder, handler=SimpleHTTPRequestHandler):
    """The URL of a local web server of a folder."""

    class Silent(handler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def fresh_http():
    """fsspec's HTTP file system, and no connection left open afterwards."""
    pytest.importorskip("aiohttp")
    system = fsspec.filesystem("http")
    yield system
    if system._session is not None:
        fsspec.asyn.sync(system.loop, system._session.close)
    type(system).clear_instance_cache()


def texts_of(inputs, pattern=""):
    result = {}
    for file in list_inputs(inputs, pattern):
        for item in read_items(file):
            for span in item_spans(item):
                result[span.document] = result.get(span.document, "") + span.text
    return result


def test_every_format_is_read_from_a_bucket(bucket, tmp_path):
    rows = pyarrow.table({"text": ["one", "two"]})
    pyarrow.parquet.write_table(rows, tmp_path / "c.parquet")
    bucket.pipe_file("/in/a.txt", b"\xef\xbb\xbf" + TEXT.encode())
    bucket.pipe_file("/in/b.txt", zstd.compress(TEXT.encode()))
    bucket.pipe_file("/in/c.parquet", (tmp_path / "c.parquet").read_bytes())
    bucket.pipe_file("/in/more/d.jsonl.gz", gzip.compress(b'{"text": "three"}\n'))
    bucket.pipe_file("/in/.hidden/e.txt", b"hidden")
    bucket.pipe_file("/in/f.png", b"\x89PNG")
    assert texts_of(["memory://in"]) == {
        "memory:///in/a.txt": TEXT,
        "memory:///in/b.txt": TEXT,
        "memory:///in/c.parquet:1": "one",
        "memory:///in/c.parquet:2": "two",
        "memory:///in/more/d.jsonl.gz:1": "three",
    }
    assert texts_of(["memory://in"], "a.*") == {"memory:///in/a.txt": TEXT}
    assert texts_of(["memory://in/b.txt"]) == {"memory://in/b.txt": TEXT}
    assert read_text("memory://in/b.txt") == TEXT
    with pytest.raises(UserError, match=r"None of the 5 files in memory://in matches .*\.nix"):
        list_inputs(["memory://in"], "*.nix")


def test_prepared_data_of_urls_are_those_of_files(bucket, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8", newline="")
    bucket.pipe_file("/a.txt", TEXT.encode())
    local = prepare([tmp_path / "a.txt"], tmp_path / "local", num_workers=0)
    there = prepare(["memory://a.txt"], tmp_path / "there", num_workers=0)
    for name in ("train-00000.tokens", "val-00000.tokens"):
        assert (local.folder / name).read_bytes() == (there.folder / name).read_bytes()
    assert list(there.split("train").document_names()) == ["memory://a.txt"]


def test_prepare_notices_changes_behind_a_url(bucket, tmp_path):
    bucket.pipe_file("/a.txt", b"good text " * 50)
    lines = []
    prepare(["memory://a.txt"], tmp_path / "out", num_workers=0)
    prepare(["memory://a.txt"], tmp_path / "out", num_workers=0, log=lines.append)
    assert lines == [f"prepare: {tmp_path / 'out'} is already prepared with these settings"]
    bucket.pipe_file("/a.txt", b"evil text " * 50)
    with pytest.raises(UserError, match="with other content of its input files"):
        prepare(["memory://a.txt"], tmp_path / "out", num_workers=0)


def test_a_broken_connection_can_be_resumed(bucket, tmp_path, monkeypatch):
    for i in range(40):
        bucket.pipe_file(f"/in/{i:02}.txt", f"text {i} ".encode() * 9000)
    whole = prepare(["memory://in"], tmp_path / "whole", num_workers=0)
    opened, paths = type(bucket)._open, []

    def unplugged(system, path, *args, **options):
        paths.append(path)
        if len(paths) > 110:  # two openings of each file find its format
            raise RuntimeError("connection reset")
        return opened(system, path, *args, **options)

    monkeypatch.setattr("tttjax.data.prepare_pass.JOURNAL_SECONDS", 0)
    with monkeypatch.context() as patch:
        patch.setattr(type(bucket), "_open", unplugged)
        with pytest.raises(ResumableError, match=r"Cannot read memory:.* connection reset"):
            prepare(["memory://in"], tmp_path / "out", num_workers=0)
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert json.loads((tmp_path / "out" / JOURNAL).read_text())["tasks"] > 0
    resumed = prepare(["memory://in"], tmp_path / "out", num_workers=0)
    assert resumed.manifest == whole.manifest


def test_sessions_recognise_a_text_behind_a_url(bucket, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text")
    bucket.pipe_file("/a.txt", b"text")
    fingerprints = [
        text_fingerprint(find_text(name)) for name in (str(tmp_path / "a.txt"), "memory://a.txt")
    ]
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("memory://nothing.txt", "Input memory://nothing.txt does not exist"),
        ("nosuch://a/b.txt", "begins with nosuch://, which fsspec does not know"),
        ("memory://torn.gz", r"Cannot read memory://torn\.gz \(Compressed file ended"),
        ("memory://latin.txt", r"latin\.txt is not UTF-8"),
    ],
)
def test_bad_urls_are_named_in_a_sentence(url, sentence, bucket, tmp_path):
    bucket.pipe_file("/torn.gz", gzip.compress(TEXT.encode())[:-9])
    bucket.pipe_file("/latin.txt", b"caf\xe9 " * 10)
    with pytest.raises(UserError, match=sentence):
        prepare([url], tmp_path / "out", num_workers=0)
    with pytest.raises(UserError, match=sentence.removeprefix("Input ")):
        read_text(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://user:geheim@host/a.txt",
        "https://host/a.txt?X-Amz-Credential=me&X-Amz-Signature=geheim",
        "https://host/a.txt?id=3&TOKEN=geheim",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url, tmp_path):
    with pytest.raises(UserError, match="holds credentials") as error:
        prepare([url], tmp_path / "data", num_workers=0)
    assert "geheim" not in str(error.value)
    assert "host/a.txt" in str(error.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("command", ["prepare {} --out=out", "read run {} --save-session=s"])
def test_a_missing_package_is_named(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(
        known_implementations,
        "nobucket",
        {"class": "nobucketfs.System", "err": "Install nobucketfs to access NoBucket"},
    )
    assert main(command.format("nobucket://b/a.txt").split()) == 2
    assert capsys.readouterr().err == (
        "error: Reading nobucket://b/a.txt needs a further package: "
        "Install nobucketfs to access NoBucket.\n"
    )
    assert not any(tmp_path.iterdir())


def test_outputs_are_not_urls(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "memory://a.txt", "--out=memory://out"]) == 2
    assert "not a path on this machine" in capsys.readouterr().err


def test_web_pages_are_read(fresh_http, tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    (tmp_path / "b.jsonl.zst").write_bytes(zstd.compress(b'{"text": "one"}\n'))
    with serve(tmp_path) as url:
        inputs = [f"{url}/a.txt?download=1", f"{url}/b.jsonl.zst"]
        assert texts_of(inputs) == {inputs[0]: TEXT, f"{inputs[1]}:1": "one"}
        before = remote.describe(inputs[0])
        (tmp_path / "a.txt").write_bytes(b"x" * before[0])
        os.utime(tmp_path / "a.txt", (1, 1))
        assert remote.describe(inputs[0]) != before
        with pytest.raises(UserError, match=r"Input http.*/none\.txt does not exist"):
            list_inputs([f"{url}/none.txt"])
    with pytest.raises(UserError, match=r"Cannot read http.*check the address, the network"):
        read_text(inputs[0])


def test_a_long_page_is_read_from_a_server_that_sends_no_parts(fresh_http, tmp_path):
    text = TEXT * (fresh_http.block_size // len(TEXT.encode()) + 100)
    (tmp_path / "a.txt").write_bytes(text.encode())
    with serve(tmp_path) as url:
        assert read_text(f"{url}/a.txt") == text


class Silently(SimpleHTTPRequestHandler):
    """Sends no size, as programs do that make pages."""

    def send_header(self, name, value):
        if name != "Content-Length":
            super().send_header(name, value)


def test_web_pages_without_a_size_are_known_by_content(fresh_http, tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    with serve(tmp_path, Silently) as url:
        assert texts_of([f"{url}/a.txt"]) == {f"{url}/a.txt": TEXT}
        size, version = remote.describe(f"{url}/a.txt")
        assert size == len(TEXT.encode())
        (tmp_path / "a.txt").write_bytes(b"x" * size)
        assert remote.describe(f"{url}/a.txt") != (size, version)


class Breaking(SimpleHTTPRequestHandler):
    """Promises a size, and ends before it."""

    def copyfile(self, source, outputfile):
        outputfile.write(source.read()[:-5])


def test_an_early_end_of_a_connection_is_an_error(fresh_http, tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    with serve(tmp_path, Breaking) as url, pytest.raises(UserError, match=r"Cannot read http"):
        read_text(f"{url}/a.txt")
