"""Arrangement of TPU slices on the mesh, with fake devices."""

from collections import Counter
from dataclasses import dataclass

import pytest

from tttjax.errors import UserError
from tttjax.parallel.mesh import arrange_devices


@dataclass(frozen=True)
class FakeTpu:
    """The attributes of a TPU device that JAX reads."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    device_kind: str = "TPU v6 lite"
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0


def slice_of(sides, index=0):
    x, y = sides
    coords = [(i, j, 0) for j in range(y) for i in range(x)]
    return [FakeTpu(index * len(coords) + n, coord, index) for n, coord in enumerate(coords)]


@pytest.mark.parametrize("axes", [(1, 16, 1), (4, 4, 1), (1, 8, 2), (2, 2, 4), (1, 2, 8)])
def test_any_axes_fit_a_slice(axes):
    devices = slice_of((4, 4))
    grid = arrange_devices(devices, *axes)
    assert grid.shape == axes
    assert set(grid.flat) == set(devices)


def test_an_inner_axis_stays_among_neighbours():
    grid = arrange_devices(slice_of((4, 4)), 1, 8, 2)
    for first, second in grid[0]:
        distance = [abs(a - b) for a, b in zip(first.coords, second.coords, strict=True)]
        assert sum(distance) == 1


def test_only_data_crosses_slices():
    devices = slice_of((2, 2), 0) + slice_of((2, 2), 1)
    grid = arrange_devices(devices, 4, 2, 1)
    of_rows = [{device.slice_index for device in row.flat} for row in grid]
    assert all(len(slices) == 1 for slices in of_rows)
    assert Counter(next(iter(slices)) for slices in of_rows) == {0: 2, 1: 2}
    with pytest.raises(UserError, match=r"mesh.data = 1 cannot be divided among 2 TPU slices"):
        arrange_devices(devices, 1, 8, 1)
