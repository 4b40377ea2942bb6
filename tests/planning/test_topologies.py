"""Pod names and their errors; the table of accelerators."""

import importlib.util
import math

import pytest

from tttjax.config import MeshConfig
from tttjax.errors import UserError
from tttjax.planning.accelerators import ACCELERATORS, peaks
from tttjax.planning.topologies import CONSOLE, TPUS, open_mesh, parse_topology


@pytest.mark.parametrize(
    ("name", "accelerator", "chips", "devices"),
    [
        ("v5p:4x4x4", "v5p", 64, 64),
        ("v5e:2x2", "v5e", 4, 4),
        ("v7x:2x2x1", "v7x", 4, 8),
        ("gpu:h100:8x4", "h100", 32, 32),
        ("gpu:a100:4", "a100", 4, 4),
    ],
)
def test_names(name, accelerator, chips, devices):
    topology = parse_topology(name)
    assert topology.accelerator == ACCELERATORS[accelerator]
    assert (topology.num_chips, topology.devices) == (chips, devices)


@pytest.mark.parametrize(
    ("console", "name"),
    [
        ("v5litepod-1", "v5e:1x1"),
        ("v5litepod-8", "v5e:2x4"),
        ("v5e-256", "v5e:16x16"),
        ("v6e-128", "v6e:8x16"),
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-64", "v5p:2x4x4"),
        ("v5p-128", "v5p:4x4x4"),
        ("v5p-384", "v5p:4x4x12"),
        ("v5p-1024", "v5p:8x8x8"),
        ("v5p-12288", "v5p:16x16x24"),
        ("tpu7x-16", "v7x:2x2x2"),
    ],
)
def test_names_of_the_cloud_console(console, name):
    assert parse_topology(console) == parse_topology(name)


def test_console_numbers_count_cores_or_chips():
    for prefix, (tpu, per_chip, shapes) in CONSOLE.items():
        assert tpu in TPUS
        chips = [math.prod(map(int, shape.split("x"))) for shape in shapes]
        assert chips == sorted(set(chips))
        for count, shape in zip(chips, shapes, strict=True):
            topology = parse_topology(f"{prefix}-{per_chip * count}")
            assert (topology.num_chips, topology.name) == (count, f"{tpu}:{shape}")


def test_this_machine():
    topology = parse_topology("cpu:4")
    assert (topology.accelerator, topology.devices, topology.platform) == (None, 4, "cpu")
    assert open_mesh(topology, MeshConfig(data=2, fsdp=2)).devices.size == 4
    with pytest.raises(UserError, match="has 8 CPU devices"):
        open_mesh(parse_topology("cpu:16"), MeshConfig(data=16))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5q:2x2", "unknown accelerator 'v5q'.*Did you mean 'v5"),
        ("v5p", "chips along each axis"),
        ("v5p:4x0", "chips along each axis"),
        ("v5p:2x2x2x2", "chips along each axis"),
        ("v4-8", "unknown accelerator 'v4'"),
        ("v5p-10", "no slice of 10 TensorCores, two per chip; the nearest are v5p-8 and v5p-16"),
        ("v5p-1", "the nearest are v5p-8 and v5p-16"),
        ("v5litepod-512", "no slice of 512 chips; the nearest are v5litepod-128 and v5litepod-256"),
        ("v5p-4x4x4", "the number of TensorCores.*v5p:2x4x4"),
        ("v6e-", "the number of chips, as in v6e-8"),
        ("gpu:h10:8", "unknown GPU 'h10'.*Did you mean 'h100'"),
        ("gpu:h100", "GPUs per host x hosts"),
        ("gpu:h100:8x4x2", "GPUs per host x hosts"),
        ("gpu:v5p:8", "unknown GPU 'v5p'"),
        ("cpu:none", "write cpu:N"),
    ],
)
def test_errors_are_one_sentence_with_the_nearest_name(name, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_topology(name)
    assert "\n" not in str(caught.value)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu.* not installed.*\[plan\]"):
        open_mesh(parse_topology("v5e:2x2"), MeshConfig(data=4))


def test_links_within_a_host_and_between_hosts():
    topology = parse_topology("gpu:h100:8x4")
    assert topology.link(8) == ACCELERATORS["h100"].link
    assert topology.link(16) == ACCELERATORS["h100"].network
    assert parse_topology("v5p:4x4x4").link(64) == ACCELERATORS["v5p"].link


@pytest.mark.parametrize("accelerator", ACCELERATORS.values(), ids=ACCELERATORS)
def test_the_table_of_accelerators_is_sane(accelerator):
    assert 1e14 < accelerator.flops < 1e16
    assert 15e9 < accelerator.memory < 1e12
    assert 5e11 < accelerator.bandwidth < 1e13
    assert 100 < accelerator.flops / accelerator.bandwidth < 700  # FLOPs per byte
    assert 5e10 < accelerator.link < accelerator.bandwidth
    assert accelerator.network < accelerator.link
    assert not (accelerator.network and accelerator.topology)
    assert all(kind.startswith("NVIDIA") == bool(accelerator.network) for kind in accelerator.kinds)


def test_mfu_uses_the_same_table():
    assert peaks()["TPU v5 lite"] == ACCELERATORS["v5e"].flops
    assert peaks()["TPU7x"] == ACCELERATORS["v7x"].flops / 2  # a chip is two devices
