"""How a run adapts to another number of hosts and devices."""

import dataclasses
import json

import pytest
from config.test_checks import configured

from tttjax.config import write_run_info
from tttjax.config.placement import Placement, choose_placement, describe_change
from tttjax.config.run_info import ENVIRONMENT
from tttjax.errors import UserError


def start(workdir, devices, hosts=1, **values):
    """The placement of a start that takes a step, of a batch of 12 sequences."""
    config = configured(**{"train.batch_size": 12} | values)
    placement = choose_placement(config, workdir, devices, hosts)
    write_run_info(workdir, config, placement=dataclasses.asdict(placement))
    return placement


@pytest.mark.parametrize(
    ("accum_steps", "devices", "expected"),
    [
        (1, [4, 2, 3, 4, 12, 1], [1, 2, 2, 1, 1, 4]),  # at most 3 sequences at a time
        (2, [2, 4, 6, 1, 2], [2, 1, 1, 4, 2]),
        (4, [1, 3, 2], [4, 2, 2]),
        (12, [1, 12, 1], [12, 1, 12]),
    ],
)
def test_a_device_never_holds_more_sequences_than_at_first(
    accum_steps, devices, expected, tmp_path
):
    found = [start(tmp_path, n, **{"train.accum_steps": accum_steps}) for n in devices]
    assert [placement.accum_steps for placement in found] == expected
    held = [12 // placement.data // placement.accum_steps for placement in found]
    assert max(held) == held[0]


def test_another_accumulation_is_taken_as_it_is(tmp_path):
    assert start(tmp_path, 4).accum_steps == 1
    assert start(tmp_path, 2, **{"train.accum_steps": 3}).accum_steps == 3
    assert start(tmp_path, 1, **{"train.accum_steps": 3}).accum_steps == 6
    assert start(tmp_path, 2).accum_steps == 2


def test_starts_of_earlier_versions_leave_the_accumulation_alone(tmp_path):
    write_run_info(tmp_path, configured(**{"train.batch_size": 12}))
    assert start(tmp_path, 2).accum_steps == 1


def test_a_line_says_what_changed(tmp_path):
    first = start(tmp_path, 4, 4)
    assert describe_change(first, tmp_path) == ""
    second = dataclasses.replace(first, hosts=2, data=2)
    assert describe_change(second, tmp_path) == (
        "continuing on 2 hosts instead of 4, 2 devices instead of 4, mesh.data = 2 instead of 4; "
        "batch and order of the data stay"
    )
    fewer = Placement(hosts=4, data=2, fsdp=1, tensor=2, accum_steps=2)
    line = describe_change(fewer, tmp_path)
    assert "hosts" not in line
    assert "mesh.tensor = 2 instead of 1, train.accum_steps = 2 instead of 1;" in line


@pytest.mark.parametrize(
    ("devices", "hosts", "values", "fitting"),
    [
        (5, 1, {}, "4 or 6 devices would fit"),
        (10, 5, {}, "3 or 6 processes would fit"),
        (16, 2, {}, "multiple of 16."),
        (3, 3, {"mesh.fsdp": 2}, "2 or 4 processes would fit"),
        (8, 8, {"mesh.data": 8}, "multiple of 8."),
    ],
)
def test_what_would_fit_is_named(devices, hosts, values, fitting, tmp_path):
    start(tmp_path, 4, 4)  # its number of micro-batches does not count
    with pytest.raises(UserError, match=fitting):
        start(tmp_path, devices, hosts, **values)


def test_a_damaged_record_is_refused(tmp_path):
    start(tmp_path, 4)
    starts = json.loads((tmp_path / ENVIRONMENT).read_text())
    del starts[0]["placement"]["data"]
    (tmp_path / ENVIRONMENT).write_text(json.dumps(starts))
    with pytest.raises(UserError, match=r"environment\.json is damaged"):
        start(tmp_path, 4)
