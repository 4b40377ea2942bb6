"""The public API: what docs/api.md shows works, and importing it is cheap."""

import doctest
import subprocess
import sys

import numpy as np
import optax
import pytest
from helpers.paths import ROOT

import tttjax


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_examples_of_the_page_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    for name in ("code", "more", "most"):
        line = f"def {name}(argument):\n    return argument + 1  # {name}\n\n"
        (tmp_path / "books" / f"{name}.txt").write_text(line * 200)
    page = str(ROOT / "docs" / "api.md")
    result = doctest.testfile(page, module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 20
    assert not result.failed


def test_the_examples_of_the_recipes_work():
    result = doctest.testmod(tttjax.recipes)
    assert result.attempted
    assert not result.failed


def test_every_public_name_exists_and_says_what_it_is():
    assert dir(tttjax) == sorted([*tttjax.__all__, "__version__"])
    assert all(getattr(tttjax, name).__doc__ for name in tttjax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tttjax.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: x - 300, "inputs must be integers from 0 to 1023"),
        (lambda x: x[:, :31], "have one shape"),
        (lambda x: x[0], "have one shape"),
        (lambda x: x.astype(float), "inputs must be integers"),
    ],
)
def test_a_batch_that_would_be_read_wrongly_is_refused(change, sentence):
    config = tttjax.recipes.get("quickstart:ttt_e2e")
    loss_and_gradient = tttjax.value_and_meta_grad(tttjax.build_model(config), config)
    token = np.full((2, 32), 7)
    batch = tttjax.Batch(change(token), token, np.ones((2, 32), bool))
    with pytest.raises(tttjax.UserError, match=sentence):
        loss_and_gradient(None, batch)


@pytest.mark.parametrize(
    ("weight", "sentence"),
    [
        (np.zeros((2, 32)), "weight is 0 everywhere"),
        (np.ones((2, 32)), "be 0 where mask is False"),
        (np.ones((2, 31)), "the inputs' shape"),
    ],
)
def test_weights_that_would_be_read_wrongly_are_refused(weight, sentence):
    config = tttjax.recipes.get("quickstart:ttt_e2e")
    loss_and_gradient = tttjax.value_and_meta_grad(tttjax.build_model(config), config)
    token = np.full((2, 32), 7)
    batch = tttjax.Batch(token, token, np.arange(64).reshape(2, 32) > 0, weight)
    with pytest.raises(tttjax.UserError, match=sentence):
        loss_and_gradient(None, batch)


def test_a_rule_without_inner_updates_is_refused():
    config = tttjax.recipes.get("quickstart:window")
    with pytest.raises(tttjax.UserError, match="rule and loss need inner updates"):
        tttjax.value_and_meta_grad(tttjax.build_model(config), config, rule=optax.sgd(1.0))


def test_weights_of_float64_configurations_are_float64():
    model = tttjax.build_model(tttjax.recipes.get({"model.param_dtype": "float64"}))
    assert model.abstract_params().slow["embedding"].dtype == np.float64


def test_importing_it_imports_nothing_slow():
    slow = {"jax", "jinja2", "markdown_it", "matplotlib", "numpy", "pandas", "rich"}
    code = f"import sys, tttjax; print({slow} & set(sys.modules), dir(tttjax)[:2])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("set()")
