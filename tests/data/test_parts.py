"""A data set that several hosts prepare in parts reads like that of one."""

import json
import shutil
import threading

import numpy as np
import pytest

from tttjax.data import inputs, parts, preparation
from tttjax.data.held_out import eval_sequences
from tttjax.data.parts import InputPart
from tttjax.data.pipeline import StreamOptions, make_train_stream
from tttjax.data.preparation import prepare
from tttjax.data.shards import MANIFEST, open_prepared
from tttjax.errors import UserError
from tttjax.io.sealed import sealed

SETTINGS = {"val_fraction": 0.3, "shard_tokens": 2000, "num_workers": 0}


@pytest.fixture(scope="module")
def joined(corpus, tmp_path_factory):
    """The data set of `prepared`, by three hosts, the last part first."""
    out = tmp_path_factory.mktemp("joined") / "data"
    for index in (2, 0, 1):
        assert not (out / MANIFEST).exists()
        data = prepare([corpus], out, part=f"{index}/3", **SETTINGS)
    assert data.folder == out
    return data


def batches(data):
    stream = make_train_stream(
        [data], StreamOptions(batch_size=2, seq_len=64, seed=3, layout="stream")
    )
    return [stream.batch_at(step) for step in range(8)]


def test_joined_parts_read_as_one_data_set(joined, prepared):
    assert list(joined.splits) == list(prepared.splits)
    for name in prepared.splits:
        one, three = prepared.split(name), joined.split(name)
        assert three.num_bytes == one.num_bytes
        np.testing.assert_array_equal(three.read(0, three.num_tokens), one.read(0, one.num_tokens))
        assert list(three.documents()) == list(one.documents())
        counts = {k: v for k, v in prepared.splits[name].items() if k != "shards"}
        assert counts.items() <= joined.splits[name].items()
    for name in ("skipped", "settings", "inputs", "tokenizer", "version"):
        assert joined.manifest[name] == prepared.manifest[name]
    for a, b in zip(batches(joined), batches(prepared), strict=True):
        np.testing.assert_array_equal(a.inputs, b.inputs)
        np.testing.assert_array_equal(a.mask, b.mask)
    held_out = [eval_sequences(data, length=100, num=8) for data in (joined, prepared)]
    for a, b in zip(*(vars(sequences).values() for sequences in held_out), strict=True):
        np.testing.assert_array_equal(a, b)


def test_finished_parts_are_joined_by_any_and_left_alone(joined, corpus, tmp_path):
    copy = shutil.copytree(joined.folder, tmp_path / "copy")
    content = (copy / MANIFEST).read_bytes()
    lines = []
    for part in ("1/3", "0/8", ""):
        assert prepare([corpus], copy, part=part, log=lines.append, **SETTINGS).folder == copy
    assert lines == [f"prepare: {copy} is already prepared with these settings"] * 3
    (copy / MANIFEST).unlink()  # killed before the join
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(UserError, match="is half prepared: not all of its parts"):
        open_prepared(copy)
    threads = [threading.Thread(target=parts.join, args=(copy, 3, lines.append)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (copy / MANIFEST).read_bytes() == content
    (copy / MANIFEST).unlink()
    assert prepare([corpus], copy, part="2/3", **SETTINGS).folder == copy
    assert (copy / MANIFEST).read_bytes() == content
    with pytest.raises(UserError, match=r"was prepared with other seed \(0\); .* or delete it"):
        prepare([corpus], copy, part="0/3", **SETTINGS, seed=1)
    (copy / MANIFEST).unlink()
    with pytest.raises(UserError, match="is not one of the 2 parts"):
        prepare([corpus], copy, part="0/2", **SETTINGS)


def test_overwriting_removes_the_parts(joined, corpus, tmp_path):
    copy = shutil.copytree(joined.folder, tmp_path / "copy")
    prepare([corpus], copy, overwrite=True, **SETTINGS | {"val_fraction": 0.4})
    assert not list(copy.glob("part-*"))


def test_an_interrupted_part_continues(corpus, joined, tmp_path, monkeypatch):
    out = tmp_path / "d"
    lines = []
    with monkeypatch.context() as interrupted:
        interrupted.setattr(preparation, "_finish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare([corpus], out, part="0/3", **SETTINGS)
    for part in ("1/3", "2/3"):
        data = prepare([corpus], out, part=part, log=lines.append, **SETTINGS)
        assert data.folder.parent == out
    assert any("1 of 3 parts" in line and "not finished (0)" in line for line in lines)
    with pytest.raises(UserError, match=r"half prepared with other seed \(0\); .* delete it"):
        prepare([corpus], out, part="0/3", **SETTINGS, seed=1)
    assert prepare([corpus], out, part="0/3", **SETTINGS).manifest == joined.manifest


def _interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"settings": {"seed": 7}}, r"Part 1/3 .* has seed=7, not 0, compared with part 0"),
        ({"inputs": "other"}, "Part 1/3 .* has other input files"),
        ({"tokenizer": {"fingerprint": "other"}}, "Part 1/3 .* has another tokenizer"),
        ({"part": [0, 3]}, r"holds part \[0, 3\]; delete it, and run part 1/3"),
    ],
)
def test_parts_that_differ_are_not_joined(joined, corpus, tmp_path, edit, message):
    copy = shutil.copytree(joined.folder, tmp_path / "copy")
    (copy / MANIFEST).unlink()
    path = copy / InputPart(1, 3).name / MANIFEST
    manifest = json.loads(path.read_text())
    for name, value in edit.items():
        manifest[name] = manifest[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(sealed(manifest)))
    with pytest.raises(UserError, match=message):
        prepare([corpus], copy, part="0/3", **SETTINGS)
    assert not (copy / MANIFEST).exists()


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("4/4", {}, "part=4/4 must be I/N"),
        ("1", {}, "part=1 must be I/N"),
        ("0/0", {}, "part=0/0 must be I/N"),
        ("0/11", {}, "10 input files cannot be divided into 11 parts; make at most 10"),
        ("0/2", {"tokenizer": "sentencepiece"}, "train it first on a sample"),
        ("0/2", {"drop_duplicates": "exact"}, "remove duplicates from the texts first"),
        ("0/2", {"overwrite": True}, "overwrite does not apply to a part"),
    ],
)
def test_what_a_part_cannot_do(corpus, tmp_path, part, settings, message):
    with pytest.raises(UserError, match=message):
        prepare([corpus], tmp_path / "d", part=part, **SETTINGS | settings)
    assert not (tmp_path / "d").exists()


def test_an_empty_split_of_the_whole_is_refused(corpus, tmp_path):
    settings = SETTINGS | {"val_fraction": 1e-9}
    prepare([corpus], tmp_path / "d", part="0/2", **settings)  # nothing held out in a part
    with pytest.raises(UserError, match="No document of the 2 parts is left to hold out"):
        prepare([corpus], tmp_path / "d", part="1/2", **settings)
    assert not (tmp_path / "d" / MANIFEST).exists()


@pytest.mark.parametrize("seed", range(5))
def test_files_are_divided_by_bytes(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 1000, rng.integers(1, 30))
    sizes[0] += 1 + 5000 * (seed == 1)
    files = [inputs.InputFile(f"{i}", f"{i}", int(n), 0, False) for i, n in enumerate(sizes)]
    for count in range(1, len(files) + 1):
        divided = [InputPart(index, count).files_of(files) for index in range(count)]
        assert all(divided)
        assert [file for part in divided for file in part] == files
        if seed != 1:
            sums = [sum(file.size for file in part) for part in divided]
            assert max(sums) <= sizes.sum() / count + 2000
