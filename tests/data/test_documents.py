"""Inputs become documents: every format, in a fixed order, in spans, with clear errors."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import sys
import sysconfig
import tarfile
import zipfile
from itertools import pairwise

import pyarrow.parquet
import pytest

from tttjax.data import documents, inputs
from tttjax.data.documents import file_spans, item_spans, read_items
from tttjax.data.inputs import list_inputs
from tttjax.data.streams import read_text, zstd
from tttjax.errors import UserError


def texts_of(inputs, pattern=""):
    """Document -> text, its spans concatenated."""
    result = {}
    for file in list_inputs(inputs, pattern):
        for item in read_items(file):
            for span in item_spans(item):
                assert span.is_first == (span.document not in result)
                result[span.document] = result.get(span.document, "") + span.text
    return result


def test_every_format(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    text = "Zwölf Boxkämpfer\r\njagen 😀\n"
    raw = text.encode()
    lines = b"".join(json.dumps({"text": t}).encode() + b"\n" for t in ("one", "two\n", ""))
    (folder / "a.txt").write_bytes(raw)
    (folder / "b.txt.xz").write_bytes(lzma.compress(raw))
    (folder / "c.md.gz").write_bytes(gzip.compress(raw, mtime=0))
    (folder / "d.py.zst").write_bytes(zstd.compress(raw))
    (folder / "e.jsonl").write_bytes(lines)
    (folder / "f.jsonl.zst").write_bytes(zstd.compress(lines) + zstd.compress(lines))
    (folder / "g.txt").write_bytes(b"\xef\xbb\xbf" + raw)
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".hidden.txt").write_bytes(raw)
    result = texts_of([folder])
    same = ["in/a.txt", "in/b.txt.xz", "in/c.md.gz", "in/d.py.zst", "in/g.txt"]
    assert [result.pop(name) for name in same] == [text] * 5
    assert list(result)[:4] == ["in/e.jsonl:1", "in/e.jsonl:2", "in/e.jsonl:3", "in/f.jsonl.zst:1"]
    assert list(result.values()) == ["one", "two\n", "", "one", "two\n", "", "one", "two\n", ""]


def test_pattern_and_single_files(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.log").write_text("log")
    (tmp_path / "x" / "b.txt").write_text("txt")
    assert texts_of([tmp_path / "x"], "*.log") == {"x/a.log": "log"}
    assert texts_of([tmp_path / "x" / "a.log"]) == {"a.log": "log"}
    with pytest.raises(UserError, match=r"None of the 2 files in .* matches the pattern '\*\.nix'"):
        list_inputs([tmp_path / "x"], "*.nix")


def test_long_files_are_read_in_spans_with_context(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_BLOCK", 64)
    monkeypatch.setattr(documents, "MARGIN", 10)
    text = "".join(f"línea {i} 😀\n" for i in range(100)) + "x" * 300
    (tmp_path / "long.txt").write_text(text, encoding="utf-8", newline="")
    (file,) = list_inputs([tmp_path / "long.txt"])
    spans = [span for item in read_items(file) for span in item_spans(item)]
    assert len(spans) > 20
    assert "".join(span.text for span in spans) == text
    assert [p.is_first for p in spans] == [True] + [False] * (len(spans) - 1)
    assert [p.is_last for p in spans] == [False] * (len(spans) - 1) + [True]
    for left, right in pairwise(spans):
        assert left.after == right.text[:10]
        assert right.before == left.text[-10:]


def test_stdlib_is_python_without_tests():
    files = list_inputs(["stdlib"])
    ids = [file.id for file in files]
    assert "stdlib/json/decoder.py" in ids
    assert ids == sorted(ids, key=lambda name: name.split("/"))
    assert not any("/test/" in name or "site-packages" in name for name in ids)
    assert all(file.path.startswith(sysconfig.get_paths()["stdlib"]) for file in files)
    assert sum(file.size for file in files) > 5e6


def test_bad_inputs(tmp_path):
    with pytest.raises(UserError, match=r"Input .*nothing\.txt does not exist"):
        list_inputs([tmp_path / "nothing.txt"])
    with pytest.raises(UserError, match="No input was given"):
        list_inputs([])
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(UserError, match=r"All input files are empty .*empty\.txt"):
        list_inputs([empty])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", b"caf\xe9 au lait", r"latin\.txt is not UTF-8 text \(about byte 3\)"),
        ("cut.txt", "caf\u00e9".encode()[:-1], r"cut\.txt is not UTF-8 text"),
        ("torn.txt.xz", lzma.compress(b"text" * 999)[:-9], r"Cannot read .*torn\.txt\.xz"),
        ("torn.txt.gz", gzip.compress(b"text" * 999, mtime=0)[:-9], r"Cannot read .*torn\.txt\.gz"),
        ("torn.jsonl.zst", b"\x28\xb5\x2f\xfdnonsense", r"Cannot read .*torn\.jsonl\.zst"),
        ("cut.txt.zst", zstd.compress(b"text" * 999)[:-9], r"Cannot read .*cut\.txt\.zst"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl, line 2: not JSON"),
        ("b.jsonl", b'{"body": "x"}\n', r'b\.jsonl, line 1: no text under the key "text"'),
        ("c.jsonl", b'{"text": "\xe9"}\n', r"c\.jsonl, line 1: not UTF-8"),
        ("d.jsonl", b'{"text": "\\ud800"}\n', r"d\.jsonl, line 1: the text has a lone surrogate"),
        ("e.ndjson", b'["text"]\n', r"e\.ndjson, line 1: not a JSON object"),
        ("f.jsonl", b"[" * 100_000, r"f\.jsonl, line 1: not JSON"),
        (
            "g.jsonl",
            b'{"body": "x", "n": 1, "url": "y"}\n',
            r'keys with text: "body", "url"\); .*--text',
        ),
        ("h.jsonl", b'{"text": null}\n', r"line 1: no text under .* \(keys with text: none\)"),
        ("utf16.txt", "text".encode("utf-16"), r"utf16\.txt is not UTF-8 text .*UTF-16"),
        ("x.txt", b"a\x00b", r"x\.txt is a binary file, not text"),
        ("x.md", b"PK\x03\x04...", r"x\.md is a zip archive; unpack"),
        ("x.txt.gz", gzip.compress(b"a\x00b", mtime=0), r"x\.txt\.gz is a binary file"),
        ("cut.txt.bz2", bz2.compress(b"text" * 999)[:-9], r"Cannot read .*cut\.txt\.bz2"),
        ("x.lz4", b"\x04\x22\x4d\x18...", r"x\.lz4 is compressed with lz4, .*unpack"),
        ("x.7z", b"7z\xbc\xaf\x27\x1c...", r"x\.7z is a 7z archive; unpack"),
        ("x.txt", b"PAR1\x15\x00...PAR1", r"Cannot read .*x\.txt"),
    ],
)
def test_unreadable_text_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts_of([tmp_path / name])


def archive(kind):
    """A file of one member, as bytes."""
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive_file:
            archive_file.writestr("a.txt", "text")
    else:
        with tarfile.open(fileobj=file, mode="w") as archive_file:
            archive_file.addfile(tarfile.TarInfo("a.txt"), io.BytesIO(b""))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.zip", archive("zip")),
        ("a.txt", archive("tar")),
        ("a.tar", archive("tar")),
        ("a.tar.gz", gzip.compress(archive("tar"), mtime=0)),
        ("a.tgz", gzip.compress(archive("tar"), mtime=0)),
        ("a.tar.xz", lzma.compress(archive("tar"))),
        ("a.tar.zst", zstd.compress(archive("tar"))),
    ],
)
def test_archives_are_refused_whatever_their_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is a (zip|tar) archive; unpack it"):
        list_inputs([tmp_path / name])


RECORDS = b'{"text": "one", "body": "1"}\n\n{"text": "two\\r\\n", "body": "2"}\r\n'
PACKED = {
    "": bytes,
    ".gz": lambda raw: gzip.compress(raw, mtime=0),
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstd.compress,
    ".parts.zst": lambda raw: zstd.compress(raw[:9]) + zstd.compress(raw[9:]),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".unknown", ""])
@pytest.mark.parametrize("packing", PACKED)
def test_json_lines_are_read_whatever_the_suffix(tmp_path, suffix, packing):
    path = tmp_path / f"part{suffix}{packing}"
    path.write_bytes(PACKED[packing](b"\xef\xbb\xbf" + RECORDS))
    assert list(texts_of([path]).values()) == ["one", "two\r\n"]
    result = [
        span.text
        for file in list_inputs([path], text_key="body")
        for item in read_items(file)
        for span in item_spans(item)
    ]
    assert result == ["1", "2"]


def test_compression_is_detected_by_content(tmp_path):
    for i, pack in enumerate(PACKED.values()):
        (tmp_path / f"{i}.txt").write_bytes(pack(b"text"))
        (tmp_path / f"{i}.txt.gz").write_bytes(pack(b"text"))
    assert set(texts_of([tmp_path]).values()) == {"text"}
    assert [file.compressed for file in list_inputs([tmp_path])] == [False] * 2 + [True] * 10


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"text": "one"}', inputs.LINES),
        (b'{"name": "one"}', inputs.JSON),
        (b'{"name": "one"}\n{"name": "two"}', inputs.LINES),
        (b'{\n "text": "one"\n}', inputs.JSON),
        (b'[{"text": "one"}]', inputs.JSON),
        (b"// settings\n{}", inputs.JSON),
    ],
)
def test_single_json_documents_are_not_lines(tmp_path, content, kind):
    (tmp_path / "a.json").write_bytes(content)
    assert list_inputs([tmp_path / "a.json"])[0].kind == kind


def test_json_in_a_text_file_stays_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(RECORDS)
    (tmp_path / "b.log").write_bytes(b'{"event": "x"}\n{"event": "y"}\n')
    result = texts_of([tmp_path / "a.txt", tmp_path / "b.log"])
    assert result["a.txt"] == RECORDS.decode()
    assert result["b.log"].startswith('{"event"')


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a"])
def test_parquet_rows_are_documents(tmp_path, name):
    texts = [f"línea {i}\r\n" for i in range(200)]
    path = write_parquet(tmp_path / name, text=texts, n=list(range(200)), body=["b"] * 200)
    result = texts_of([path])
    assert list(result) == [f"{name}:{i}" for i in range(1, 201)]
    assert list(result.values()) == texts
    (file,) = list_inputs([path], text_key="body")
    assert {span.text for span in read_items(file)} == {"b"}


def test_parquet_without_text_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", n=[1], body=["b"], raw=[b"b"])
    for key in ("text", "n", "raw"):
        (file,) = list_inputs([path], text_key=key)
        with pytest.raises(UserError, match=rf'column "{key}" \(its columns of text: "body"\)'):
            list(read_items(file))
    path = write_parquet(tmp_path / "b.parquet", text=["a", None])
    with pytest.raises(UserError, match=r"b\.parquet, row 2: no text"):
        texts_of([path])
    path = write_parquet(tmp_path / "c.parquet", text=["a" * 999])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"Cannot read .*c\.parquet"):
        texts_of([path])


def test_missing_pyarrow_names_the_extra(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", text=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"needs pyarrow: .*parquet"):
        list_inputs([path])


def test_a_file_name_that_is_not_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    try:
        with open(path, "wb") as file:
            file.write(b"text")
    except OSError:
        pytest.skip("this file system has no such names")
    assert texts_of([os.fsdecode(path)]) == {"caf\\xe9.txt": "text"}


@pytest.mark.parametrize("packing", PACKED)
def test_byte_order_mark_goes_and_line_ends_stay(tmp_path, packing):
    path = tmp_path / "a.txt"
    path.write_bytes(PACKED[packing](b"\xef\xbb\xbfa\r\nb\rc\n\xef\xbb\xbf"))
    assert read_text(path) == texts_of([path])["a.txt"] == "a\r\nb\rc\n\ufeff"


def test_flipped_bytes_of_gz_file_raise_user_errors(tmp_path):
    path = tmp_path / "a.txt.gz"
    packed = gzip.compress(b"one line of text\n" * 40)
    for i in range(2, len(packed)):
        path.write_bytes(packed[:i] + bytes([packed[i] ^ 0x41]) + packed[i + 1 :])
        with contextlib.suppress(UserError):  # some bytes are a time, or a name
            texts = [span.text for span in file_spans(*list_inputs([path]))]
            assert texts == ["one line of text\n" * 40]


def test_file_named_twice_is_one_document(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "link.txt").symlink_to(tmp_path / "texts" / "a.txt")
    inputs = [tmp_path / "texts", tmp_path / "texts" / "a.txt", tmp_path / "link.txt"]
    assert [file.id for file in list_inputs(inputs)] == ["texts/a.txt"]
