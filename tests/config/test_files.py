"""Experiment files are run by path; overrides apply; errors in them are one sentence."""

import sys

import pytest

from tttjax.config import load_config
from tttjax.config.files import matching_specs
from tttjax.errors import UserError

GOOD = """
from tttjax.config import default_config

def get_config(arg=None):
    config = default_config()
    config.train.steps = int(arg or 7)
    config.model.mixers = ["window", "full"]
    return config
"""


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    return path


def test_the_argument_reaches_get_config(experiment):
    assert load_config(str(experiment)).train.steps == 7
    assert load_config(f"{experiment}:9").train.steps == 9


def test_a_star_stands_for_all_recipes_that_fit(experiment):
    experiment.write_text(GOOD + "\ndef recipes():\n    return ['7', '70', '8']\n")
    assert matching_specs(f"{experiment}:7*") == [f"{experiment}:7", f"{experiment}:70"]
    assert matching_specs(f"{experiment}:9") == [f"{experiment}:9"]
    assert matching_specs(str(experiment)) == [str(experiment)]
    with pytest.raises(
        UserError, match=r"'9\*' matches no recipe of .*mine.py; there are 7, 70, 8"
    ):
        matching_specs(f"{experiment}:9*")
    assert len(matching_specs("paper:125m,*,pretrain")) == 10
    experiment.write_text(GOOD)
    with pytest.raises(UserError, match=r"mine.py has no function recipes\(\)"):
        matching_specs(f"{experiment}:*")


def test_overrides_apply_in_order_with_the_fields_types(experiment):
    overrides = ["--config.train.steps=1", "train.steps=3", "--config.optim.peak_lr=1e-4"]
    overrides += ["--config.model.mixers=full", "--config.eval.context_lengths=256,512"]
    config = load_config(str(experiment), overrides)
    assert (config.train.steps, config.optim.peak_lr) == (3, 1e-4)
    assert (config.model.mixers, config.eval.context_lengths) == (("full",), (256, 512))


def test_files_of_one_folder_import_each_other(tmp_path, monkeypatch):
    folder = tmp_path / "recipes_of_a_test"
    folder.mkdir()
    (folder / "table.py").write_text("STEPS = 11\n")
    source = GOOD.replace("int(arg or 7)", "STEPS")
    (folder / "run.py").write_text("from recipes_of_a_test.table import STEPS\n" + source)
    monkeypatch.chdir("/")
    before = list(sys.path)
    assert load_config(str(folder / "run.py")).train.steps == 11
    assert sys.path == before


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("--config.train.stpes=3", "no configuration field 'train.stpes'. Did you mean 'train.st"),
        ("--config.train=3", "train is a section"),
        ("--config.train.steps", "has no value"),
        ("--config.train.steps=x", "train.steps = 'x' must be an integer"),
        ("--config.train.seq_len=1000", "train.seq_len = 1000 is not a multiple"),
    ],
)
def test_a_wrong_override_is_refused(experiment, override, sentence):
    with pytest.raises(UserError, match=sentence):
        load_config(str(experiment), [override])


@pytest.mark.parametrize(
    ("source", "spec", "sentence"),
    [
        ("def get_config(:\n", "", r"mine.py, line 1: invalid syntax"),
        ("\0", "", r"mine.py: .*source code string cannot contain null"),
        ("import a_module_nobody_has\n", "", "mine.py, line 1: ModuleNotFoundError"),
        ("x = 1\n", "", "has no function get_config"),
        ("def get_config(arg=None):\n    return 3\n", "", "returned int, not a ConfigDict"),
        ("def get_config():\n    return 3\n", ":a", "takes no argument, but 'a' was given"),
        ("def get_config(arg):\n    return 1 / 0\n", ":a", "line 2: ZeroDivisionError"),
        (GOOD, ":many", "mine.py, line 6: ValueError"),
        (GOOD.replace("train.steps", "train.stesp"), "", "line 6: there is no.*'stesp'.*'steps'"),
        (GOOD.replace("int(arg or 7)", "'7'"), "", "mine.py, line 6: TypeError"),
    ],
)
def test_errors_of_the_file_name_file_and_line(experiment, source, spec, sentence):
    experiment.write_text(source)
    with pytest.raises(UserError, match=sentence) as caught:
        load_config(f"{experiment}{spec}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_suggests_its_neighbour(experiment):
    with pytest.raises(UserError, match=r"no experiment file .*mien.py.* Did you mean '.*mine.py'"):
        load_config(str(experiment).replace("mine", "mien"))


def test_a_configuration_is_a_python_file(tmp_path):
    with pytest.raises(UserError, match="must name a Python file"):
        load_config(str(tmp_path / "mine.yaml"))


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "odd.py").mkdir()
    with pytest.raises(UserError, match="There is no experiment file"):
        load_config(str(tmp_path / "odd.py"))


def test_a_file_with_earlier_names_can_be_overridden(tmp_path):
    path = tmp_path / "old.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        '    return ConfigDict({"model": {"mamba_state": 16, "ttt_chunk": 8}})\n'
    )
    model = load_config(str(path), ["--config.model.mamba2.state_size=32"]).model
    assert (model.mamba2.state_size, model.ttt_layer.chunk_size) == (32, 8)


def test_a_file_that_sets_an_earlier_name_is_told_the_current_one(tmp_path):
    path = tmp_path / "old.py"
    path.write_text(
        "from tttjax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.model.mamba_state = 16\n"
        "    return config\n"
    )
    with pytest.raises(
        UserError, match=r"line 4: model.mamba_state is now model.mamba2.state_size"
    ):
        load_config(str(path))
