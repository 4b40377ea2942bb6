"""Inputs become documents: every format, in a fixed order, in pieces, with clear errors."""

import gzip
import json
import lzma
import sysconfig
from itertools import pairwise

import pytest
import zstandard

from tttjax.data import documents
from tttjax.data.documents import list_inputs, pieces_of, read_items
from tttjax.errors import UserError


def texts_of(inputs, pattern=""):
    """Document -> text, its pieces put together."""
    found = {}
    for file in list_inputs(inputs, pattern):
        for item in read_items(file):
            for piece in pieces_of(item):
                assert piece.begins == (piece.document not in found)
                found[piece.document] = found.get(piece.document, "") + piece.text
    return found


def test_every_format(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    text = "Zwölf Boxkämpfer\r\njagen 😀\n"
    raw = text.encode()
    lines = b"".join(json.dumps({"text": t}).encode() + b"\n" for t in ("one", "two\n", ""))
    (folder / "a.txt").write_bytes(raw)
    (folder / "b.txt.xz").write_bytes(lzma.compress(raw))
    (folder / "c.md.gz").write_bytes(gzip.compress(raw, mtime=0))
    (folder / "d.py.zst").write_bytes(zstandard.compress(raw))
    (folder / "e.jsonl").write_bytes(lines)
    (folder / "f.jsonl.zst").write_bytes(zstandard.compress(lines) + zstandard.compress(lines))
    (folder / "g.txt").write_bytes(b"\xef\xbb\xbf" + raw)
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".hidden.txt").write_bytes(raw)
    found = texts_of([folder])
    same = ["in/a.txt", "in/b.txt.xz", "in/c.md.gz", "in/d.py.zst", "in/g.txt"]
    assert [found.pop(name) for name in same] == [text] * 5
    assert list(found)[:4] == ["in/e.jsonl:1", "in/e.jsonl:2", "in/e.jsonl:3", "in/f.jsonl.zst:1"]
    assert list(found.values()) == ["one", "two\n", "", "one", "two\n", "", "one", "two\n", ""]


def test_pattern_and_single_files(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.log").write_text("log")
    (tmp_path / "x" / "b.txt").write_text("txt")
    assert texts_of([tmp_path / "x"], "*.log") == {"x/a.log": "log"}
    assert texts_of([tmp_path / "x" / "a.log"]) == {"a.log": "log"}
    with pytest.raises(UserError, match=r"None of the 2 files in .* matches the pattern '\*\.nix'"):
        list_inputs([tmp_path / "x"], "*.nix")


def test_long_files_come_in_pieces_with_their_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_BLOCK", 64)
    monkeypatch.setattr(documents, "MARGIN", 10)
    text = "".join(f"línea {i} 😀\n" for i in range(100)) + "x" * 300
    (tmp_path / "long.txt").write_text(text, encoding="utf-8", newline="")
    (file,) = list_inputs([tmp_path / "long.txt"])
    pieces = [piece for item in read_items(file) for piece in pieces_of(item)]
    assert len(pieces) > 20
    assert "".join(piece.text for piece in pieces) == text
    assert [p.begins for p in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [p.ends for p in pieces] == [False] * (len(pieces) - 1) + [True]
    for left, right in pairwise(pieces):
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
        ("cut.txt.zst", zstandard.compress(b"text" * 999)[:-9], r"Cannot read .*cut\.txt\.zst"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl, line 2: not JSON"),
        ("b.jsonl", b'{"body": "x"}\n', r'b\.jsonl, line 1: no text under the key "text"'),
        ("c.jsonl", b'{"text": "\xe9"}\n', r"c\.jsonl, line 1: not UTF-8"),
        ("d.jsonl", b'{"text": "\\ud800"}\n', r"d\.jsonl, line 1: the text has a lone surrogate"),
    ],
)
def test_unreadable_text_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts_of([tmp_path / name])
