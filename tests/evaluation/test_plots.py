"""Plots and text tables of tidy rows: styles, labels that do not overlap, empty cells."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tttjax.evaluation.files import to_csv, to_json
from tttjax.evaluation.plots import (
    BASELINE,
    E2E,
    Panel,
    draw_heat_map,
    line_styles,
    plot_by_context,
    plot_by_position,
)
from tttjax.evaluation.statistics import average, subtract
from tttjax.evaluation.tables import pivot

NINE = [
    *("full", "window", "hybrid", "mamba2", "gated_deltanet", "ttt_linear", "ttt_mlp"),
    *("dynamic", "ttt_e2e"),
]


def test_ttt_e2e_has_its_own_colour_and_solid_line():
    styles = line_styles(NINE, baseline="full", with_ttt=["ttt_e2e"])
    assert (styles["ttt_e2e"]["color"], styles["ttt_e2e"]["linestyle"]) == (E2E, "-")
    assert styles["full"]["color"] == BASELINE
    looks = {(style["color"], style["linestyle"]) for style in styles.values()}
    assert len(looks) == len(NINE)
    assert [style["color"] for style in styles.values()].count(E2E) == 1
    named = line_styles(["a", "ttt_e2e, TTT off", "ttt_e2e, TTT on"], with_ttt=["ttt_e2e, TTT on"])
    assert [label for label, style in named.items() if style["color"] == E2E] == ["ttt_e2e, TTT on"]
    assert line_styles(["a", "mine"], with_ttt=["mine"])["mine"]["color"] == E2E


def boxes(figure: Figure):
    """Bounding boxes of the texts of a drawn figure: ticks, titles, legends."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        texts += [*axes.get_xticklabels(), axes.xaxis.label, axes._left_title]
    return [text.get_window_extent(renderer) for text in texts if text.get_text()]


def curves(labels, lengths):
    rows = itertools.product(labels, lengths)
    frame = pd.DataFrame(rows, columns=["label", "context"])
    bins = {"first_token": frame["context"] // 2 + 1, "last_token": frame["context"]}
    return frame.assign(value=np.linspace(3, 2, len(frame)), stderr=0.1, **bins)


@pytest.mark.parametrize("lengths", [(128, 256, 512, 1024), (64, 100_000, 131_072), (300, 330)])
@pytest.mark.parametrize("draw", ["position", "context"])
def test_no_label_covers_another_or_a_curve(lengths, draw):
    panels = [Panel(curves(NINE, lengths), "title", "loss", zero=zero) for zero in (None, "")]
    styles = line_styles(NINE)
    if draw == "position":
        figure = plot_by_position(panels, styles, lengths, window=lengths[0])
    else:
        figure = plot_by_context(panels, styles, lengths)
    found = boxes(figure)
    assert len(found) > len(NINE) + 2
    assert not [pair for pair in itertools.combinations(found, 2) if pair[0].overlaps(pair[1])]
    (legend,) = figure.legends
    assert not any(legend.get_window_extent().overlaps(a.bbox) for a in figure.axes)


def test_heat_maps_leave_missing_cells_empty():
    rows = pd.DataFrame({"lr": [0.1, 0.1, 1.0], "chunk": [8, 16, 8], "loss": [3.0, 2.0, 1.0]})
    table = rows.pivot(index="lr", columns="chunk", values="loss")
    axes = Figure().subplots()
    image = draw_heat_map(axes, table, "{:.1f}".format, framed=table < 2, cmap="viridis")
    assert [text.get_text() for text in axes.texts] == ["3.0", "2.0", "1.0"]
    assert len(axes.patches) == 1
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("chunk", "lr")
    assert np.isnan(image.get_array().filled(np.nan)[1, 1])
    text = pivot(rows, "lr", "chunk", rows["loss"].map(str), "rate")
    assert text.to_numpy().tolist() == [["0.1", "3.0", "2.0"], ["1.0", "1.0", "-"]]


def test_averages_and_paired_differences_of_rows():
    rows = pd.DataFrame(
        {"system": ["a", "a", "b", "b"], "seed": [0, 1, 1, 0], "loss": [1.0, 3.0, 3.5, 1.5]}
    )
    found = average(rows, ["system"], ["loss"])
    assert found["number"].tolist() == [2, 2]
    assert found["loss"].tolist() == [2.0, 2.5]
    np.testing.assert_allclose(found["loss_stderr"], 1.0)
    a, b = (rows[rows["system"] == name] for name in "ab")
    assert subtract(a, b, ["seed"], ["loss"])["loss"].tolist() == [-0.5, -0.5]


def test_files_are_read_back_by_pandas(tmp_path):
    rows = pd.DataFrame({"label": ["a", "b"], "loss": [1 / 3, np.nan], "steps": [3, 4]})
    (tmp_path / "a.csv").write_text(to_csv(rows))
    expected = rows.assign(loss=[0.3333333, np.nan])
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "a.csv"), expected)
    (tmp_path / "a.json").write_text(to_json({"title": "x"}, rows))
    values = pd.read_json(tmp_path / "a.json", typ="series")
    pd.testing.assert_frame_equal(pd.DataFrame(values["rows"], columns=values["columns"]), expected)
