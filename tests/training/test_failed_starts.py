"""The count of failed starts in a row: what adds to it, what ends it, what it refuses."""

import json

import pytest

from tttjax.errors import UserError
from tttjax.training.failed_starts import FAILED_STARTS, count_start, forget_failed_starts

LIMIT = 3


def start(workdir, error=None, step=None):
    """A start that writes the record of a step and ends with an error."""
    with count_start(workdir, LIMIT):
        if step is not None:
            with (workdir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step}) + "\n")
        if error is not None:
            raise error


def fail(workdir, step=None):
    with pytest.raises(SystemExit):
        start(workdir, SystemExit(76), step)


def test_starts_without_a_step_are_refused_once(tmp_path):
    for _ in range(2):
        for _ in range(LIMIT):
            fail(tmp_path)
        with pytest.raises(UserError, match=r"last 3 starts .* run the same command again"):
            start(tmp_path)
        assert not any(tmp_path.iterdir())


def test_only_a_step_beyond_all_earlier_ones_ends_the_count(tmp_path):
    for step in (5, 4, 5):  # resumed from a checkpoint, and no further than before
        fail(tmp_path, step)
    fail(tmp_path, 6)
    assert json.loads((tmp_path / FAILED_STARTS).read_text()) == {"starts": 3, "last_step": 5}
    for _ in range(LIMIT):
        fail(tmp_path)
    with pytest.raises(UserError, match="after step 6"):
        start(tmp_path)


@pytest.mark.parametrize("error", [UserError("mend it"), KeyboardInterrupt()])
def test_what_nothing_starts_again_is_not_counted(tmp_path, error):
    for failed in (0, 2):
        for _ in range(failed):
            fail(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(type(error)):
            start(tmp_path, error)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_clean_end_forgets_the_failed_starts(tmp_path):
    fail(tmp_path)
    start(tmp_path)
    forget_failed_starts(tmp_path)
    forget_failed_starts(tmp_path)
    assert not any(tmp_path.iterdir())
