"""Prefilling long texts, without a model: splitting, snapshots, binned means, the plot."""

import numpy as np
import pytest

from tttjax.evaluation.update_trace import MAX_BINS, Bins
from tttjax.evaluation.update_trace_plot import draw
from tttjax.runs.long_text import _split_at_multiples
from tttjax.runs.snapshots import Snapshots


@pytest.mark.parametrize("first", [0, 3, 8, 11, 29])
@pytest.mark.parametrize("until", [8, 21, 30])
def test_parts_end_at_multiples_wherever_they_begin(first, until):
    tokens = np.arange(30)
    parts = iter(np.split(tokens, [1, 2, 13, 14]))
    result = list(_split_at_multiples(parts, 8, first, until))
    assert np.concatenate([np.zeros(0, int), *result]).tolist() == list(range(first, until))
    assert all(len(part) for part in result)
    assert all(int(part[-1] + 1) % 8 == 0 for part in result[:-1])


@pytest.mark.parametrize(("every", "max_count"), [(1, 2), (1, 16), (3, 5)])
def test_snapshots_are_few_and_evenly_spaced(tmp_path, every, max_count):
    snapshots = Snapshots(tmp_path / "s", every, max_count, call_tokens=10)
    taken: list[int] = []
    for calls in range(300):
        assert not snapshots.is_due(10 * calls + 5)
        if not snapshots.is_due(10 * calls):
            continue
        interval = snapshots.interval(calls)
        taken = [call for call in (*taken, calls) if call % interval == 0]
        assert len(taken) <= max_count
        assert taken == list(range(0, calls + 1, interval))
    assert len(taken) > max_count // 2


def test_bins_hold_means_of_any_number_of_rows():
    rows = np.random.default_rng(0).normal(size=(2 * MAX_BINS + 1, 3))
    bins = Bins(3)
    for row in rows:
        bins.add(row)
    means = bins.means()
    assert len(means) == MAX_BINS // 2 + 1
    np.testing.assert_allclose(means[:-1], rows[:-1].reshape(-1, 4, 3).mean(axis=1), atol=1e-12)
    np.testing.assert_allclose(means[-1], rows[-1], atol=1e-12)
    np.testing.assert_allclose(bins.mean(), rows.mean(axis=0), atol=1e-12)


@pytest.mark.parametrize("layers", [1, 3, 9])
def test_plot_shows_few_layers_as_lines(tmp_path, layers):
    about = {
        "layers": [f"layer{i}" for i in range(layers)],
        "start_norm": [0.0] + [1.0] * (layers - 1),
        "text": "a book",
        "chunk_size": 4,
        "clip": 1.0,
    }
    means = np.random.default_rng(0).uniform(0.1, 1, size=(20, 5 + 2 * layers))
    means[:, 0] = 8.0 * np.arange(20)
    figure = draw(about, means)
    top, _, bottom = figure.axes[:3]
    assert len(top.lines) == 2
    assert len(bottom.lines) == (layers if layers <= 8 else 0)
    assert bool(bottom.collections) == (layers > 8)
    figure.savefig(tmp_path / "plot.png")
