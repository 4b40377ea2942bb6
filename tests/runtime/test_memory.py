"""Memory in use: of the fullest device where JAX knows it, else of the process."""

from types import SimpleNamespace

import jax
import pytest

from tttjax.runtime.memory import MemoryUse, memory_use


@pytest.mark.parametrize(
    ("stats", "expected"),
    [
        ([(5, 9), (7, 8)], MemoryUse(5, 9, "device")),
        ([(5, 9), None], MemoryUse(5, 9, "device")),
    ],
)
def test_the_fullest_device_counts(stats, expected, monkeypatch):
    def device(pair):
        values = pair and {"bytes_in_use": pair[0], "peak_bytes_in_use": pair[1]}
        return SimpleNamespace(memory_stats=lambda: values)

    monkeypatch.setattr(jax, "local_devices", lambda: list(map(device, stats)))
    assert memory_use() == expected


def test_without_device_figures_it_is_the_process():
    use = memory_use()
    assert use.where == "process"
    assert 1e7 < use.now <= use.peak
