"""Atomic writes of files and folders: permissions, concurrent writers, failures."""

import os

import pytest

from tttjax.errors import UserError
from tttjax.io.atomic import atomic_folder, atomic_write, require_empty_dir, write_files, write_text


def test_a_file_is_replaced_only_when_complete(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()

    def interrupted():
        with atomic_write(path) as temporary:
            temporary.write_text("sec")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_the_umask(tmp_path, umask, mode):
    """Also if a library sets other permissions on the file."""
    before = os.umask(umask)
    try:
        for private in (0o600, 0o666):
            with atomic_write(tmp_path / "a") as temporary:
                temporary.write_text("")
                temporary.chmod(private)
            assert (tmp_path / "a").stat().st_mode & 0o777 == mode
        assert os.umask(umask) == umask
    finally:
        os.umask(before)


def test_two_writers_of_a_file_do_not_mix(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as slow:
        slow.write_text("the first")
        with atomic_write(path) as quick:
            quick.write_text("the second")
        assert path.read_text() == "the second"
    assert path.read_text() == "the first"
    assert list(tmp_path.iterdir()) == [path]


def test_files_written_before_a_failure_remain(tmp_path):
    def fails(path):
        path.write_text("half")
        raise OSError("full")

    writers = {"a": lambda path: write_text(path, "größer"), "b": fails}
    with pytest.raises(OSError, match="full"):
        write_files(tmp_path / "new", writers)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]
    del writers["b"]
    assert write_files(tmp_path / "new", writers) == {"a": tmp_path / "new" / "a"}
    assert (tmp_path / "new" / "a").read_text("utf-8") == "größer"


def test_a_folder_appears_complete(tmp_path):
    def broken_off(path):
        with atomic_folder(path, "--to") as temporary:
            (temporary / "a").write_text("half")
            raise OSError("full")

    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "new" / "folder", tmp_path / "empty"):
        with pytest.raises(OSError, match="full"):
            broken_off(path)
        assert not list(path.glob("*"))
        assert not list(path.parent.glob(".*"))
        with atomic_folder(path, "--to") as temporary:
            (temporary / "a").write_text("whole")
        assert (path / "a").read_text() == "whole"


def test_one_process_at_a_time_writes_a_folder(tmp_path):
    (tmp_path / ".a.1.tmp").mkdir()  # of a killed process
    (tmp_path / ".a.1.tmp" / "half").write_text("")
    with atomic_folder(tmp_path / "a", "--to"):
        with pytest.raises(UserError, match="is being written"):
            atomic_folder(tmp_path / "a", "--to").__enter__()
        with atomic_folder(tmp_path / "b", "--to"):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert not any((tmp_path / "a").iterdir())


def test_a_folder_created_meanwhile_is_unchanged(tmp_path):
    path = tmp_path / "a"

    def late():
        with atomic_folder(path, "--to"):
            path.mkdir()
            (path / "b").write_text("another's")

    with pytest.raises(UserError, match="not empty"):
        late()
    assert [child.name for child in tmp_path.iterdir()] == ["a"]


def test_a_nonempty_folder_error_names_the_option(tmp_path):
    (tmp_path / "file").write_text("")
    for path, sentence in ((tmp_path, "not empty"), (tmp_path / "file", "is a file")):
        with pytest.raises(UserError, match=f"--to=.*{sentence}"):
            require_empty_dir(path, "--to")
    with pytest.raises(UserError, match="cannot be a folder"):
        require_empty_dir(tmp_path / "file" / "below", "--to")
