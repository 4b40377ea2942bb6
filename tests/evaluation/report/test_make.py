"""A whole report: its numbers against `compare`, its files, its cache, what it refuses."""

import csv
import dataclasses
import html
import io
import json
import re

import matplotlib.image
import numpy as np
import pytest

from tttjax.cli import main
from tttjax.config import read_config
from tttjax.errors import UserError
from tttjax.evaluation.compare import compare
from tttjax.evaluation.page import to_html
from tttjax.evaluation.report import figures, losses
from tttjax.evaluation.report.entries import ReportEntry
from tttjax.evaluation.report.make import make_report
from tttjax.evaluation.report.outputs import make_page, to_markdown
from tttjax.evaluation.report.results import COLUMNS
from tttjax.evaluation.report.sections import sections
from tttjax.evaluation.report.summary import highlights
from tttjax.planning.flops import train_flops_per_token
from tttjax.runs.run import RunSpec

pytestmark = pytest.mark.slow

LENGTHS, STEPS, WINDOW = (8, 32), 3, 8  # of the runs in tiny_runs.py
PLOTS = (
    *("loss_difference_by_context", "loss_by_position", "loss_by_flops"),
    "state_by_context",
)


@pytest.fixture(scope="module")
def report(report_and_folder):
    return report_and_folder[0]


@pytest.fixture(scope="module")
def folder(report_and_folder):
    return report_and_folder[1]


def read_rows(folder):
    return list(csv.DictReader(io.StringIO((folder / "report.csv").read_text())))


# The numbers -------------------------------------------------------------------------------------


def test_losses_and_differences_are_those_of_compare(report, runs):
    """The same runs through `compare`, combined by hand."""
    comparison = compare([RunSpec(folder) for folder in runs], modes=["on", "off"])
    of_run = {series.run: series for series in comparison.series if series.label != "ttt, TTT off"}
    full, ttt = report.systems
    for length in LENGTHS:
        both = [of_run[name].contexts[length] for name in ("full0", "full1")]
        mean = np.mean([sums.loss().mean for sums in both])
        assert report.loss(full, length).mean == pytest.approx(mean, rel=1e-5)
        expected = of_run["ttt"].contexts[length].loss().mean - mean
        assert report.difference(ttt, length).mean == pytest.approx(expected, rel=1e-3, abs=1e-5)
        spread = abs(np.diff([float(sums.loss().mean) for sums in both])[0]) / 2
        assert report.difference(ttt, length).seeds == pytest.approx(spread, rel=1e-3)


def test_training_costs_what_the_formula_says(report, runs):
    for system, workdir in zip(report.systems, runs[1:], strict=True):
        config = read_config(workdir)
        (*_, facts) = system.runs[32]
        tokens = STEPS * config.train.batch_size * 32
        expected = tokens * train_flops_per_token(config.model, config.inner, 32)
        assert (facts.tokens, facts.flops) == (tokens, pytest.approx(expected))
        assert (facts.seconds, facts.tokens_per_second) == (2.0 * STEPS, 32.0)
        assert facts.known_from_start


def test_state_is_keys_and_values_and_fast_weights(report):
    """float32; one block of one head of 8, and a fast MLP of three 8 x 8 matrices."""
    full, ttt = report.systems
    position = 4
    assert full.state_bytes == {n: 2 * n * 8 * 4 + position for n in LENGTHS}
    of_ttt = 2 * WINDOW * 8 * 4 + 3 * 8 * 8 * 4 + position
    assert ttt.state_bytes == dict.fromkeys(LENGTHS, of_ttt)


def test_times_of_the_reference_form_are_reported_nowhere(report, folder):
    """Prefill speed is measured by `tttjax bench prefill`, not here."""
    for name in ("report.md", "report.html", "report.csv", "report.json"):
        text = (folder / name).read_text().lower()
        assert "prefill" not in text
        assert "long to read" not in text


# What is written ---------------------------------------------------------------------------------


def test_the_csv_has_a_row_for_every_number(report, folder):
    rows = read_rows(folder)
    assert tuple(rows[0]) == COLUMNS
    ttt = report.systems[1]
    (row,) = (r for r in rows if r["quantity"] == "difference" and r["context"] == "32")
    value = report.difference(ttt, 32)
    assert row["system"] == "ttt"
    found = [float(row[name]) for name in ("value", "stderr", "stderr_documents", "stderr_seeds")]
    expected = [value.mean, value.stderr, value.documents, value.seeds]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert [r["seed"] for r in rows if r["quantity"] == "seed_loss" and r["context"] == "8"] == [
        *("0", "1", "0")
    ]
    bins = [r for r in rows if r["quantity"] == "loss_by_position" and r["context"] == "32"]
    assert (bins[0]["first_token"], bins[-1]["last_token"]) == ("1", "32")
    values = json.loads((folder / "report.json").read_text())
    assert tuple(values["columns"]) == COLUMNS
    assert [["" if x is None else str(x) for x in row] for row in values["rows"]] == [
        list(row.values()) for row in rows
    ]


def test_the_page_is_self_contained_with_every_table(report, folder):
    page = (folder / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    addresses = re.findall(r'(?:src|href)="([^"]{0,22})', page)
    assert len(addresses) == len(PLOTS)
    assert set(addresses) == {"data:image/png;base64,"}
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page
    assert "<pre><code>command &lt;x&gt;\n</code></pre>" in page
    for section in sections(report):
        for row in section.table.to_numpy():
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            assert f"{cells}</tr>" in page
    for sentence in report.summary:
        assert html.escape(sentence) in page


def test_notes_have_tables_and_their_html_is_text(report):
    notes = "| rate | loss |\n|---|--:|\n| 0.1 | **3.2** |\n\n<script>alert(1)</script>\n"
    page = to_html(make_page(dataclasses.replace(report, notes=notes)), dict.fromkeys(PLOTS, b""))
    assert '<td style="text-align:right"><strong>3.2</strong></td>' in page
    assert "&lt;script&gt;" in page
    assert "<script" not in page


def test_the_page_opens_with_its_picture_and_three_sentences(report, folder):
    page = (folder / "report.html").read_text()
    opening = page[page.index("<body>") : page.index("<h2>")]
    assert opening.count("<img ") == 1
    assert re.findall("<li>(.*?)</li>", opening) == [html.escape(s) for s in highlights(report)]
    assert len(highlights(report)) == 3


def test_every_table_has_parameter_counts(report):
    for section in sections(report):
        counts = section.table[["", "parameters", "non-embedding"]]
        assert counts.to_numpy().tolist() == [["full", "2,616", "504"], ["ttt", "2,824", "712"]]


def test_markdown_and_plots(report, folder):
    text = (folder / "report.md").read_text()
    assert text == to_markdown(make_page(report))
    assert "over the 5 held-out documents, paired by document for differences" in text
    assert "over seeds (runs: full 2)" in text
    assert "Systems with one seed have no error over seeds: ttt." in text
    assert "With `--scale cpu`:\n\n```\ncommand <x>\n```" in text
    for name in PLOTS:
        assert f"({name}.png)" in text
        pixels = matplotlib.image.imread(folder / f"{name}.png")
        assert pixels[..., :3].min() < 0.5 < pixels[0, 0, :3].min()  # drawn on, on white
    assert sorted(p.name for p in folder.iterdir()) == sorted([*report.paths, "cache"])


# The cache ---------------------------------------------------------------------------------------


@pytest.fixture
def no_computing(monkeypatch):
    monkeypatch.setattr(losses, "compare", lambda *args, **options: pytest.fail("it reads"))


def test_the_command_reuses_cached_losses(report, folder, runs, no_computing, monkeypatch, capsys):
    drawn = {name: (folder / f"{name}.png").read_bytes() for name in PLOTS}
    monkeypatch.setattr(figures, "image", lambda name, report: drawn[name])
    before = (folder / "report.csv").read_text()
    words = [f"full={runs[0]}", f"full={runs[1]}", f"ttt={runs[2]}:on", f"--out={folder}"]
    assert main.main(["report", *words, "--title=Two & more"]) == 0
    out = capsys.readouterr().out
    assert all(sentence in out for sentence in report.summary)
    assert str(folder / "report.html") in out
    assert (folder / "report.csv").read_text() == before
    assert "<h1>Two &amp; more</h1>" in (folder / "report.html").read_text()


def test_an_interrupted_report_resumes_from_the_cache(folder, runs, no_computing):
    """A damaged cache file is computed again."""
    cached = sorted((folder / "cache").glob("losses-*.npz"))
    assert len(cached) == 3 * len(LENGTHS)
    content = cached[0].read_bytes()
    cached[0].write_bytes(content[:50])
    with pytest.raises(pytest.fail.Exception, match="it reads"):
        make_report(
            [ReportEntry("full", runs[0]), ReportEntry("full", runs[1]), ReportEntry("t", runs[2])],
            folder,
        )
    cached[0].write_bytes(content)


def test_other_settings_do_not_use_the_cache(folder, runs, no_computing):
    for options in ({"num_sequences": 4}, {"lengths": (8, 16)}):
        with pytest.raises(pytest.fail.Exception, match="it reads"):
            make_report([ReportEntry("full", runs[0])], folder, **options)


# A run for every context -------------------------------------------------------------------------


def test_runs_of_several_contexts_use_their_own(make_run, tmp_path, monkeypatch):
    """The cost of an extension has that of the run before it; the first of these has stopped."""
    monkeypatch.setattr(figures, "image", lambda name, report: b"")
    mixers = ("full",)
    first = make_run("first", seq_len=8, step=2, mixers=mixers)
    longer = make_run("longer", seq_len=16, init_from=first, mixers=mixers)
    lost = make_run("lost", seq_len=16, init_from=tmp_path / "gone", seed=1, mixers=mixers)
    entries = [ReportEntry("full", first), ReportEntry("full", longer), ReportEntry("full", lost)]
    report = make_report(entries, tmp_path / "out")
    (full,) = report.systems
    assert report.lengths == (8, 16)
    assert [run.workdir for run in full.runs[8]] == [str(first)]
    before, after, unknown = full.runs[8][0], *full.runs[16]
    assert before.tokens == 2 * 2 * 8
    assert after.tokens == before.tokens + STEPS * 2 * 16
    assert after.flops > before.flops
    assert (after.known_from_start, unknown.known_from_start) == (True, False)
    assert report.warnings == (
        f"full: the run {first} stopped at step 2 of 3; it is compared as it is.",
        "full has no run with context 8 of seed 1.",
    )
    text = (tmp_path / "out" / "report.md").read_text()
    assert "- **Note:** full: the run" in text
    assert "≥ 96 tokens" not in text  # 96 of one, 128 of the other seed
    assert "≥ 112 tokens" in text


# What is refused ---------------------------------------------------------------------------------


def test_invalid_arguments_are_user_errors(runs, make_run, tmp_path, capsys):
    out = tmp_path / "out"
    words = [f"full={runs[0]}", f"ttt={runs[2]}", f"--out={out}"]
    for more, sentence in (
        (["--baseline=none"], "the baseline 'none' is not among the systems full, ttt"),
        (["--lengths=20"], "20 is not a multiple of the chunk size 8 of the run ttt"),
        (["--lengths=4096"], "context of 4096 tokens; the longest that fits is"),
        (["--lengths=a"], "--lengths: 'a' must be an integer"),
        (["--dynamic-lr=0.1"], "need a run in the mode dynamic"),
        (["--num-sequences=-1"], "eval.num_sequences = -1 must be at least 1"),
        (["--data=nowhere"], "nowhere does not exist"),
        (["--split=test"], "no documents in the split 'test'"),
        ([f"again={runs[0]}"], "given twice, as again and as full"),
        ([f"new={tmp_path}"], "holds no checkpoint"),
    ):
        assert main.main(["report", *more, *words]) == 2
        err = capsys.readouterr().err
        assert sentence in err
        assert err.count("\n") == 1
        assert not out.exists()


def test_baseline_without_run_at_any_length_is_refused(make_run, tmp_path):
    runs = [make_run(f"full_at_{n}", seq_len=n, mixers=("full",)) for n in (8, 16)]
    with pytest.raises(
        UserError, match="full has no run for any of the contexts 32, only for 8, 1"
    ):
        make_report([ReportEntry("full", run) for run in runs], tmp_path / "out", lengths=(32,))


def test_another_tokenizer_is_refused(make_run, runs, tmp_path):
    other = make_run("other", tokenizer="0123456789abcdef", mixers=("window",))
    sentence = r"another tokenizer .* than those of the run other \(0123456789ab\)"
    with pytest.raises(UserError, match=sentence):
        make_report([ReportEntry("full", runs[0]), ReportEntry("other", other)], tmp_path / "out")
