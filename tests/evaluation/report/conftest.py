"""Tiny runs for reports: full attention with two seeds and one that learns, on five documents."""

import pytest


@pytest.fixture(scope="session")
def runs(make_run):
    """full of two seeds; learning."""
    full = [make_run(f"full{seed}", seed=seed, mixers=("full",)) for seed in (0, 1)]
    return [*full, make_run("ttt", suffix_layers=1, fast_mlp=True, mixers=("window",))]


@pytest.fixture(scope="session")
def report_and_folder(runs, tmp_path_factory):
    from tttjax.evaluation.report.entries import ReportEntry
    from tttjax.evaluation.report.make import make_report

    out = tmp_path_factory.mktemp("out") / "report"
    entries = [
        ReportEntry("full", runs[0]),
        ReportEntry("full", runs[1]),
        ReportEntry("ttt", runs[2]),
    ]
    return make_report(entries, out, notes="With `--scale cpu`:\n\n```\ncommand <x>\n```"), out
