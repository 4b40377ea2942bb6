"""The recipes of docs/custom.md through the commands, and what is refused."""

import doctest
import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers.paths import ROOT

from tttjax.cli.main import main
from tttjax.config import custom_code, load_config, write_run_info
from tttjax.errors import UserError
from tttjax.ttt.outer_loss import make_inner_loop

PAGE = (ROOT / "docs" / "custom.md").read_text()
RULE, LOSS = re.findall(r"```python\n(# my_\w+\.py\n.*?)```", PAGE, re.DOTALL)
SMALL = {
    "model": {"vocab_size": 264, "embed_dim": 8, "num_heads": 1, "mlp_dim": 8},
    "inner": {"chunk_size": 8, "lr_warmup_steps": 0},
    "optim": {"warmup_steps": 1},
    "train": {"steps": 2, "seq_len": 32},
    "eval": {"context_lengths": 32, "num_sequences": 2},
}
FLAGS = [f"--config.{name}.{key}={value}" for name in SMALL for key, value in SMALL[name].items()]


@pytest.fixture(autouse=True)
def no_code(monkeypatch):
    """A process that has run no recipe file yet."""
    monkeypatch.setattr(custom_code, "_known", {})


@pytest.fixture
def recipe(tmp_path):
    def write(text, name="my.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def train(recipe, workdir, data, layers=2):
    flags = [
        f"--config.model.num_layers={layers}",
        f"--workdir={workdir}",
        f"--config.data.sources={data}",
        *FLAGS,
    ]
    return main(["train", f"--config={recipe}", *flags])


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("body", "layers"), [(RULE, 4), (LOSS, 2)], ids=["rule", "loss"])
def test_commands_use_the_run_s_code_and_no_other(
    body, layers, recipe, data, tmp_path, no_code, capsys
):
    run = tmp_path / "run"
    assert train(recipe(body), run, data, layers) == 0
    assert (run / "recipe.py").read_text() == body
    metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert ("inner_lr_layer1" in metrics) == (body == LOSS)

    custom_code._known.clear()
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 2
    assert f"read {run / 'recipe.py'}, then give --code=" in capsys.readouterr().err
    flag = f"--code={run / 'recipe.py'}"
    assert main(["evaluate", str(run), flag]) == 0
    assert "nan" not in (run / "eval" / "results.json").read_text().lower()
    text = tmp_path / "text.txt"
    text.write_text("abcdé " * 20)
    session = tmp_path / "a.session"
    assert main(["read", str(run), str(text), f"--save-session={session}", flag]) == 0
    flags = [f"--session={session}", "--prompt=abc", "--max-tokens=3", flag]
    assert main(["generate", str(run), *flags]) == 0
    report = tmp_path / "report"
    assert main(["report", f"mine={run}", f"--out={report}", flag]) == 0
    assert "nan" not in (report / "report.csv").read_text().lower()

    changed = recipe(body + "\n")
    assert train(changed, run, data, layers) == 2
    assert "inner.code was" in capsys.readouterr().err
    custom_code._known.clear()
    assert main(["evaluate", str(run), f"--code={changed}"]) == 2
    assert "is another file" in capsys.readouterr().err


def test_tuning_a_run_needs_its_code(recipe, tmp_path, monkeypatch, capsys):
    def start(config, workdir, **options):
        make_inner_loop(config.inner)
        return SimpleNamespace(interrupted=False)

    monkeypatch.setattr("tttjax.training.loop.train", start)
    run = tmp_path / "run"
    write_run_info(run, load_config(recipe(LOSS)))
    custom_code._known.clear()
    flags = [f"--config=chat:{run}", f"--workdir={tmp_path / 'tuned'}"]
    assert main(["train", *flags]) == 2
    assert "give --code=FILE" in capsys.readouterr().err
    assert main(["train", *flags, f"--code={run / 'recipe.py'}"]) == 0


@pytest.mark.exhaustive
@pytest.mark.slow
def test_trials_of_a_sweep_use_the_code(recipe, data, tmp_path):
    out = tmp_path / "sweep"
    flags = [flag for flag in FLAGS if "train.steps" not in flag]
    flags += ["--config.model.num_layers=2", f"--data={data}", f"--out={out}", "--jobs=1"]
    assert main(["sweep", f"--config={recipe(LOSS)}", "--set=train.steps=2", *flags]) == 0
    (copy,) = out.glob("recipe-*.py")
    assert copy.read_text() == LOSS
    table = pd.read_csv(out / "report" / "settings.csv")
    assert np.isfinite(table["loss"]).all()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_examples_in_python_work():
    result = doctest.testfile(str(ROOT / "docs" / "custom.md"), module_relative=False)
    assert result.attempted > 5
    assert not result.failed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (RULE.partition("def inner_rule")[0], "function inner_rule, and there is none"),
        (RULE.replace("inner_rule(", "inner_loss("), "my.py defines none"),
        ("from . import other\n" + RULE, "attempted relative import"),
    ],
)
def test_a_recipe_without_its_code_is_refused(text, words, recipe):
    with pytest.raises(UserError, match=words):
        load_config(recipe(text))


def test_code_that_imports_from_its_folder_is_refused(tmp_path, recipe):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "other.py").write_text("")
    path = recipe("from mine import other\n" + RULE, "mine/my.py")
    with pytest.raises(UserError, match="imports from mine/, line 1"):
        load_config(path)


def test_unused_code_is_not_part_of_the_configuration(recipe):
    path = recipe(RULE)
    assert load_config(path).inner.code
    assert not load_config(path, ["--config.inner.rule=sgd"]).inner.code


def test_an_error_in_the_code_names_file_and_line(recipe):
    path = recipe(RULE.replace("optax.trace", "optax.trase"))
    with pytest.raises(UserError, match=r"my\.py, line \d+: AttributeError"):
        make_inner_loop(load_config(path).inner)


def test_a_file_without_code_is_refused(recipe, capsys):
    path = recipe(RULE.partition("def inner_rule")[0])
    assert main(["evaluate", "nowhere", f"--code={path}"]) == 2
    assert "defines neither inner_rule nor inner_loss" in capsys.readouterr().err
