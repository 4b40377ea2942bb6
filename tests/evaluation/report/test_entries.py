"""Report entries: grouping into systems, contexts, and user errors."""

from pathlib import Path

import pytest

from tttjax.errors import UserError
from tttjax.evaluation.report.entries import ReportEntry, choose_baseline, open_systems, parse_entry
from tttjax.runs.eval_setup import LearningOptions


@pytest.mark.parametrize(
    ("text", "label", "folder", "mode"),
    [
        ("a=runs/x", "a", "runs/x", "auto"),
        ("a=runs/x:off", "a", "runs/x", "off"),
        ("runs/x", "x", "runs/x", "auto"),
        ("runs/x:dynamic", "x", "runs/x", "dynamic"),
    ],
)
def test_a_run_is_named_on_the_command_line(text, label, folder, mode):
    assert parse_entry(text) == ReportEntry(label, Path(folder), mode)


def test_a_folder_may_have_any_name(tmp_path):
    odd = tmp_path / "a=b:c"
    odd.mkdir()
    assert parse_entry(str(odd)) == ReportEntry("a=b:c", odd)


@pytest.mark.parametrize(
    ("text", "sentence"), [("a=x:of", "mode 'of' is unknown"), ("a=", "names no directory")]
)
def test_invalid_entries_are_refused(text, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_entry(text)


@pytest.fixture(scope="module")
def short(make_run):
    """Extensions of full attention: seed 0 to 8 and 16 tokens, seed 1 to 8."""
    return [
        make_run("short8", seq_len=8, mixers=("full",)),
        make_run("short16", seq_len=16, mixers=("full",)),
        make_run("other8", seed=1, seq_len=8, mixers=("full",)),
    ]


def test_seeds_and_contexts_are_grouped_by_label(runs, short):
    extended, single = open_systems(
        [ReportEntry("full", workdir) for workdir in reversed(short)]
        + [ReportEntry("ttt", runs[2])]
    )
    assert extended.contexts == (8, 16)
    assert [member.seed for member in extended.at(8)] == [0, 1]
    assert [member.run.source for member in extended.at(16)] == [str(short[1])]
    assert extended.at(32) == ()
    assert (single.mode, extended.mode) == ("on", "off")
    assert len(single.at(8)) == len(single.at(512)) == 1  # the only run reads every context


def test_an_entry_may_override_context_and_seed(short):
    (system,) = open_systems(
        [ReportEntry("a", short[0], context=64, seed=5), ReportEntry("a", short[1])]
    )
    assert [(m.seed, m.context) for m in system.at(64)] == [(5, 64)]


def test_the_baseline_is_full_attention_unless_named(runs):
    entries = [
        ReportEntry("ttt", runs[2]),
        ReportEntry("dynamic", runs[0], "dynamic"),
        ReportEntry("full", runs[0]),
    ]
    systems = open_systems(entries)
    assert choose_baseline(systems).label == "full"
    assert choose_baseline(systems, "ttt").label == "ttt"
    assert choose_baseline(systems[:2]).label == "ttt"
    with pytest.raises(UserError, match="baseline 'fall' is not among the systems ttt, dynamic, f"):
        choose_baseline(systems, "fall")


def test_runs_that_do_not_fit_together_are_refused(runs, tmp_path):
    full, other, ttt = runs
    several = LearningOptions(dynamic_lrs=(0.1, 1.0))
    for entries, sentence in (
        ([], "no runs to report on"),
        ([ReportEntry("a", tmp_path)], "holds no checkpoint"),
        (
            [ReportEntry("a", full), ReportEntry("a", full)],
            "a has two runs with context 32 and seed 0",
        ),
        ([ReportEntry("a", full), ReportEntry("b", full)], "given twice, as a and as b"),
        ([ReportEntry("a", full), ReportEntry("a", ttt, seed=1)], "different modes \\(off, on\\)"),
        ([ReportEntry("a", ttt, "dynamic")], "mode dynamic does not fit the run a"),
        ([ReportEntry("a", other, "dynamic", learning=several)], "a has several dynamic_lrs"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_systems(entries)
