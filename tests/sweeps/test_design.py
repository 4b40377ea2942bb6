"""Grids and lists of settings, and the sweep's file."""

import json

import pytest
from helpers.paths import ROOT

from tttjax.config import to_dict
from tttjax.errors import UserError
from tttjax.sweeps.design import read_design, write_design
from tttjax.sweeps.make_design import grid, make_design, read_table

TINY = str(ROOT / "tests" / "helpers" / "tiny_run.py")
SMALL = {"eval.context_lengths": (32,)}


def test_a_grid_has_every_combination():
    rows = grid(["inner.chunk_size=8,16", "inner.lr=0.1,1"])
    assert [tuple(row.values()) for row in rows] == [(8, 0.1), (8, 1.0), (16, 0.1), (16, 1.0)]


def test_values_of_list_fields_are_separated_by_semicolons():
    rows = grid(["model.mixers=window;window,full"])
    assert [row["model.mixers"] for row in rows] == [("window",), ("window", "full")]


def test_trials_are_settings_times_seeds():
    design = make_design(
        [f"{TINY}:static", f"{TINY}:ttt_e2e"], grid(["optim.peak_lr=1e-2,2e-2"]), 2, changes=SMALL
    )
    names = [trial.name for trial in design.trials]
    assert names[:2] == ["static,peak_lr=0.01,seed=0", "ttt_e2e,peak_lr=0.01,seed=0"]
    assert len(set(names)) == len(names) == 8
    assert len(design.settings) == 4
    assert design.axes["optim.peak_lr"] == (0.01, 0.02)
    for trial in design.trials:
        assert trial.config.optim.peak_lr == trial.values["optim.peak_lr"]
        assert trial.config.train.seed == trial.config.data.seed == trial.seed
        assert trial.config.model.fast_mlp == trial.setting.startswith("ttt_e2e")


def test_seeds_are_added_to_those_of_the_recipe():
    changes = {**SMALL, "train.seed": 10, "data.seed": 20}
    design = make_design([TINY], [{}], 2, changes=changes)
    seeds = [(t.config.train.seed, t.config.data.seed) for t in design.trials]
    assert seeds == [(10, 20), (11, 21)]


def test_settings_of_a_table_keep_their_rows(tmp_path):
    table = tmp_path / "trials.csv"
    table.write_text(
        f"recipe,optim.peak_lr,model.mixers\n{TINY}:ttt_e2e,0.01,window\n"
        f'{TINY}:static,0.03,"full,window"\n'
    )
    design = make_design([], read_table(table), 1, changes=SMALL)
    values = [(t.config.optim.peak_lr, t.config.model.mixers) for t in design.trials]
    assert values == [(0.01, ("window",)), (0.03, ("full", "window"))]


def test_a_design_survives_its_file(tmp_path):
    design = make_design([TINY], grid(["model.mixers=window;full"]), 2, changes=SMALL)
    write_design(design, tmp_path)
    copy = read_design(tmp_path)
    assert copy == design
    assert [to_dict(trial.config) for trial in copy.trials] == [
        to_dict(trial.config) for trial in design.trials
    ]
    assert read_design(tmp_path / "other") is None


def test_settings_of_one_name_are_told_apart():
    rows = grid(["model.mixers=window+full,full;window,full+full;window,full", "inner.lr=1"])
    design = make_design([TINY], rows, 1, changes=SMALL)
    assert len(design.settings) == 3
    assert "tiny_run,mixers=window+full,lr=1.0" in design.settings
    assert design.trials[0].values["inner.lr"] == 1.0  # also what all settings share


def test_further_settings_keep_the_names_of_the_others():
    few = make_design([f"{TINY}:static"], grid(["inner.lr=1"]), 1, changes=SMALL)
    more = make_design(
        [f"{TINY}:static", f"{TINY}:ttt_e2e"], grid(["inner.lr=1,2"]), 2, changes=SMALL
    )
    assert set(few.settings) < set(more.settings)


def test_a_field_of_all_trials_and_of_the_settings_is_refused():
    with pytest.raises(UserError, match="give it once"):
        make_design([TINY], grid(["inner.lr=1,2"]), 1, changes={**SMALL, "inner.lr": 3.0})


def test_long_names_fit_file_systems():
    rows = [{"train.init_from": f"{'x' * 300}{i}"} for i in range(2)]
    design = make_design([TINY], rows, 1, changes=SMALL)
    assert len(design.settings) == 2
    assert max(map(len, design.settings)) < 200


def test_contexts_that_no_chunk_divides_are_refused_before_training():
    with pytest.raises(UserError, match=r"chunk_size=5,seed=0.*chunk"):
        make_design(
            [f"{TINY}:ttt_e2e"],
            grid(["inner.chunk_size=5,10"]),
            1,
            changes={"train.seq_len": 20, "eval.context_lengths": ()},
            scoring={"lengths": (24,)},
        )
    with pytest.raises(UserError, match="--window"):
        make_design([TINY], [{}], 1, changes=SMALL, scoring={"window": -1})


@pytest.mark.parametrize(
    "content", ["{", '{"format": 1}', '{"format": 99}', '{"format": 1, "trials": [], "scoring": 3}']
)
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(UserError, match=r"sweep\.json"):
        read_design(tmp_path)


def test_all_trials_are_scored_alike():
    design = make_design([TINY], grid(["model.window_size=8,16"]), 1)
    assert design.scoring.window == 16
    assert design.scoring.lengths == (32,)  # of training
    with pytest.raises(UserError, match="several --split"):
        make_design([TINY], grid(["data.val_split=val,test"]), 1)
    scored = make_design([TINY], grid(["data.val_split=val,test"]), 1, scoring={"split": "val"})
    assert scored.scoring.split == "val"


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["inner.chunk_size"], "has no values"),
        (["inner.chunk_size=8,x"], "must be an integer|chunk_size"),
        (["inner.chunk=8"], "Did you mean"),
        (["inner.lr=1", "inner.lr=2"], "given twice"),
        (["inner.lr=1,1"], "given twice"),
        (["train.seed=1,2"], "--seeds"),
        (["inner.chunk_size=8,5"], "multiple|chunk"),
    ],
)
def test_settings_that_do_not_fit_are_refused(axes, message):
    with pytest.raises(UserError, match=message):
        make_design([f"{TINY}:ttt_e2e"], grid(axes), 1, changes=SMALL)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inner.lr\n", "a line for each setting"),
        ("inner.lr,inner.clip\n1\n", "1 cells, not 2"),
        ("inner.rate\n1\n", "Did you mean"),
        ("inner.lr,inner.lr\n1,2\n", "several columns"),
    ],
)
def test_uneven_tables_are_refused(tmp_path, text, message):
    path = tmp_path / "trials.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_table(path)


def test_tables_of_spreadsheets_are_read(tmp_path):
    """With a byte-order mark and blank lines."""
    path = tmp_path / "trials.csv"
    path.write_text("\ufeffinner.lr\r\n0.5\r\n\r\n", newline="")
    assert read_table(path) == [{"inner.lr": 0.5}]


def test_a_sweep_without_a_recipe_is_refused():
    with pytest.raises(UserError, match="needs a recipe"):
        make_design([], [{}], 1)
    with pytest.raises(UserError, match="at least 1"):
        make_design([TINY], [{}], 0)
    with pytest.raises(UserError, match="column `recipe`"):
        make_design([TINY], [{"recipe": TINY}], 1)


def test_the_file_holds_whole_configurations(tmp_path):
    """Nodes of a cluster need no recipe file."""
    write_design(make_design([TINY], [{}], 1, changes=SMALL), tmp_path)
    values = json.loads((tmp_path / "sweep.json").read_text())
    assert values["trials"][0]["config"]["train"]["steps"] == 12
