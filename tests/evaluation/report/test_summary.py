"""Summary sentences of a report, for significant and insignificant differences."""

import dataclasses
import io
from zlib import crc32

import numpy as np
import pytest

from tttjax.evaluation.report.figures import PLOTS, draw
from tttjax.evaluation.report.results import Report, RunFacts, SystemResult
from tttjax.evaluation.report.sections import about_errors, sections
from tttjax.evaluation.report.summary import highlights, summarise
from tttjax.evaluation.statistics import Sums

pytestmark = pytest.mark.slow

DOCUMENTS, TOKENS, WINDOW = 6, 64, 16
LENGTHS = (16, 64)


def make_sums(length, loss, beyond=0.0, noise=0.001, seed=0):
    """Documents that differ much, alike for all systems; beyond: what the late half has more."""
    rng = np.random.default_rng(seed)
    document_D1 = np.linspace(-0.5, 0.5, DOCUMENTS)[:, None]
    loss_DL = loss + document_D1 + noise * rng.normal(size=(DOCUMENTS, length))
    loss_DL[:, (WINDOW + length) // 2 :] += beyond
    count = np.full((DOCUMENTS, length), TOKENS / length)
    return Sums(loss_DL * count, count, None)


def make_system(label, losses, *, mode="off", seeds=1, **options):
    """losses: by context length, the loss per token of the first seed; others lie 0.002 higher."""

    def run(length, seed):
        return RunFacts(f"{label}{seed}", seed, length, 9, 9, 1000, 1e9 * length, True, None, None)

    return SystemResult(
        label=label,
        mode=mode,
        inner=None,
        parameters={"total": 1_234_567, "non_embedding": 1000, "fast": 0},
        sums={
            length: tuple(
                make_sums(length, loss + 0.002 * s, seed=crc32(f"{label}{s}".encode()), **options)
                for s in range(seeds)
            )
            for length, loss in losses.items()
        },
        runs={length: tuple(run(length, s) for s in range(seeds)) for length in losses},
        state_bytes=dict.fromkeys(losses, 2048),
    )


def make_report(*systems):
    return Report(
        title="test",
        systems=systems,
        baseline=systems[0],
        lengths=LENGTHS,
        window=WINDOW,
        bins=8,
        text={"data": "d", "split": "val", "documents": DOCUMENTS, "sequences": 6, "tokens": 384},
    )


def check_plots(report):
    for name in PLOTS:
        figure = draw(name, report)
        figure.set_dpi(30)
        figure.savefig(file := io.BytesIO(), format="png")
        assert file.getvalue().startswith(b"\x89PNG")


FULL = make_system("full", {16: 3.0, 64: 2.9})


def test_a_significant_advantage_is_given_with_its_error():
    ttt = make_system("ttt", {16: 3.1, 64: 2.8}, mode="on")
    first, second, standing, *_ = summarise(make_report(FULL, ttt))
    assert first.startswith("At 16 tokens full has the lowest loss, 3.0")
    assert "the next, ttt, is 0.100 ± 0.00" in first
    assert second.startswith("At 64 tokens ttt has the lowest loss, 2.8")
    assert standing.startswith("The loss of ttt (with TTT) against that of full is ")
    assert "higher at 16 tokens (+0.100 ± 0.00" in standing
    assert "lower at 64 tokens (-0.100 ± 0.00" in standing
    assert "from 16 to 64 tokens the difference moves in its favour (-0.200 ± 0.00" in standing


def test_noise_is_not_called_an_advantage():
    near = make_system("near", {16: 3.0, 64: 2.9}, noise=0.05)
    first, second, standing, *_ = summarise(make_report(FULL, near))
    for text in (first, second):
        assert "not significantly different from it: " in text
    assert "is not significantly different at 16 and 64 tokens" in standing
    assert "the difference does not change significantly" in standing


def test_difference_that_seeds_do_not_support_is_none():
    """0.001 between systems: clear over documents, but the seeds of one lie 0.002 apart."""
    sure = make_system("other", {16: 3.001, 64: 2.901}, noise=1e-6)
    base = make_system("full", {16: 3.0, 64: 2.9}, noise=1e-6)
    assert "higher at 16 and 64" in summarise(make_report(base, sure))[2]
    unsure = make_system("other", {16: 3.0, 64: 2.9}, noise=1e-6, seeds=2)  # mean 0.001 higher
    assert "is not significantly different at 16 and 64" in summarise(make_report(base, unsure))[2]


def test_highlights_are_about_ttt_e2e():
    ttt = make_system("ttt_e2e", {16: 3.1, 64: 2.8}, mode="on")
    report = make_report(FULL, make_system("better", {16: 2.9, 64: 2.7}), ttt)
    report = dataclasses.replace(report, summary=summarise(report))
    best, standing, cost = highlights(report)
    assert best.startswith("At 64 tokens better has the lowest loss")
    assert standing.startswith("The loss of ttt_e2e (with TTT) against that of full is ")
    assert cost == "At 64 tokens ttt_e2e needs 1 times as much state as full."
    alone = make_report(FULL)
    alone = dataclasses.replace(alone, summary=summarise(alone))
    assert len(highlights(alone)) == len(alone.summary) == 1


def test_whose_loss_falls_beyond_the_window():
    falling = make_system("falling", {16: 3.0, 64: 2.9}, beyond=-0.1)
    rising = make_system("rising", {16: 3.0, 64: 2.9}, beyond=0.1)
    *_, text = summarise(make_report(FULL, falling, rising))
    assert "the loss on tokens 41-64 with that on 17-40" in text
    assert "it keeps falling for falling (-0.1" in text
    assert "it rises for rising (+0.1" in text
    assert "it does not change significantly for full (" in text
    short = dataclasses.replace(make_report(FULL, falling), window=64)
    assert not any("Beyond the window" in sentence for sentence in summarise(short))


def test_the_errors_are_named():
    assert "every system has one seed, so none over seeds" in about_errors(make_report(FULL))
    several = make_system("several", {16: 3.0, 64: 2.9}, seeds=3)
    text = about_errors(make_report(FULL, several))
    assert "over seeds (runs: several 3)" in text
    assert "Systems with one seed have no error over seeds: full." in text
    assert "uncertain" not in text


@pytest.mark.parametrize("lengths", [{16: 3.0}, {64: 2.5}])
def test_a_system_may_lack_a_length(lengths):
    report = make_report(FULL, make_system("part", lengths))
    assert any("against that of full is" in sentence for sentence in summarise(report))
    by_title = {section.title: section.table for section in sections(report)}
    row = by_title["Loss by context"].set_index("").loc["part"].tolist()
    assert [cell == "-" for cell in row[:2]] == [length not in lengths for length in LENGTHS]
    assert row[2:] == ["1.23M", "1,000"]
    check_plots(report)


def test_one_system_alone_and_baseline_that_lacks_longest():
    assert sections(make_report(FULL))
    report = make_report(make_system("full", {16: 3.0}), make_system("other", {16: 3.0, 64: 2.9}))
    assert "at 16 tokens" in summarise(report)[1]
    check_plots(report)
