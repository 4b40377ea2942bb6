"""A recipe file with a custom inner rule, loss or rates, through the commands; and its refusals."""

import json

import pytest

from tttjax.cli.main import main
from tttjax.config import custom_code, load_config
from tttjax.errors import UserError

HEAD = """\
import optax, jax.numpy as jnp
from tttjax.config import default_config

def get_config():
    config = default_config()
    config.model.update(vocab_size=264, embed_dim=8, num_layers=4, num_heads=1, mlp_dim=8)
    config.model.update(window_size=8, suffix_layers=4, init_std=0.3)
    config.inner.chunk_size = 8
    config.train.update(steps=2, batch_size=8, seq_len=32)
    config.eval.update(context_lengths=(32,), num_sequences=2)
"""
RULE = """\
    config.inner.update(rule="custom", fast_paths=("suffix/**/mixer/wo",))
    return config

def inner_rule(inner):
    return optax.chain(optax.clip(0.1), optax.trace(0.5), optax.scale(-1.0))
"""
LOSS = """\
    config.model.update(num_layers=2, suffix_layers=1, fast_mlp=True)
    config.inner.update(loss="custom", learn_lr="layer")
    return config

def inner_loss(chunk):
    count = jnp.maximum(1, jnp.sum(chunk.mask_C))
    return jnp.sum(jnp.where(chunk.mask_C, chunk.nll_C ** 2, 0)) / count
"""


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


def train(recipe, workdir, data):
    flags = [f"--workdir={workdir}", f"--config.data.sources={data}"]
    return main(["train", f"--config={recipe}", *flags])


@pytest.mark.slow
@pytest.mark.parametrize("body", [RULE, LOSS], ids=["rule", "loss"])
def test_commands_use_the_run_s_code_and_no_other(body, recipe, data, tmp_path, no_code, capsys):
    run = tmp_path / "run"
    assert train(recipe(HEAD + body), run, data) == 0
    assert (run / "recipe.py").read_text() == HEAD + body
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

    changed = recipe(HEAD + body + "\n")
    assert train(changed, run, data) == 2
    assert "inner.code was" in capsys.readouterr().err
    custom_code._known.clear()
    assert main(["evaluate", str(run), f"--code={changed}"]) == 2
    assert "is another file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEAD + '    config.inner.rule = "custom"\n    return config\n', "function inner_rule"),
        (HEAD + RULE.replace("inner_rule(", "inner_loss("), "my.py defines none"),
        ("from . import other\n" + HEAD + RULE, "attempted relative import"),
    ],
)
def test_a_recipe_without_its_code_is_refused(text, words, recipe):
    with pytest.raises(UserError, match=words):
        load_config(recipe(text))


def test_code_that_imports_from_its_folder_is_refused(tmp_path, recipe):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "other.py").write_text("")
    path = recipe("from mine import other\n" + HEAD + RULE, "mine/my.py")
    with pytest.raises(UserError, match="imports from mine/, line 1"):
        load_config(path)


def test_unused_code_is_not_part_of_the_configuration(recipe):
    path = recipe(HEAD + RULE)
    assert load_config(path).inner.code
    assert not load_config(path, ["--config.inner.rule=sgd"]).inner.code


def test_an_error_in_the_code_names_file_and_line(recipe):
    from tttjax.ttt.outer_loss import make_inner_loop

    path = recipe(HEAD + RULE.replace("optax.trace(0.5)", "optax.trase(0.5)"))
    with pytest.raises(UserError, match=r"my\.py, line 1\d: AttributeError"):
        make_inner_loop(load_config(path).inner)


def test_a_file_without_code_is_refused(recipe, capsys):
    path = recipe(HEAD + "    return config\n")
    assert main(["evaluate", "nowhere", f"--code={path}"]) == 2
    assert "defines neither inner_rule nor inner_loss" in capsys.readouterr().err
