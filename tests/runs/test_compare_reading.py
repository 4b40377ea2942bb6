"""`tttjax read --compare`: losses with learning and without, over stops and kills."""

import json
import shutil

import jax
import numpy as np
import pandas as pd
import pytest
from helpers.inference import StopAfter

from tttjax.api import load
from tttjax.cli.main import main
from tttjax.errors import UserError
from tttjax.inference.prefill import make_inference_model
from tttjax.inference.sequence_nll import make_scorer
from tttjax.parallel.mesh import make_mesh
from tttjax.training import stopping
from tttjax.types import Batch

pytestmark = pytest.mark.slow

TEXT = "the cat sat on the mat. " * 9  # 27 chunks of 8 bytes, in prefill calls of 64
FILES = {"losses.csv", "losses.json", "losses.png"}


@pytest.fixture
def read(run, tmp_path, monkeypatch, capsys, shared_models):
    """read(options..., stop=None) -> (exit code, stdout, stderr), into tmp_path."""
    (tmp_path / "cat.txt").write_text(TEXT)

    def read(*options, stop=None):
        monkeypatch.setattr(stopping, "StopRequest", lambda: StopAfter(stop))
        words = ["read", run, tmp_path / "cat.txt", "--save-session", tmp_path / "s", *options]
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return read


@pytest.fixture(scope="module")
def scores(run):
    """NLL [T] of the targets of TEXT, with learning and without, as `tttjax evaluate` scores."""
    loaded = load(run)
    setup = loaded._loaded.setup
    token = np.array([[loaded.tokenizer.bos_id, *loaded.tokenizer.encode(TEXT)]])
    batch = Batch(token[:, :-1], token[:, 1:], np.ones(token[:, 1:].shape, bool))
    mesh = make_mesh(devices=jax.devices()[:1])
    models = [make_inference_model(setup.model, setup.inner, 0.0, learn=x) for x in (True, False)]
    return [np.asarray(make_scorer(m, mesh)(setup.params, batch, setup.lr)[0]) for m in models]


def test_losses_are_those_of_evaluate(run, read, scores, tmp_path):
    code, out, err = read("--compare", tmp_path / "c")
    assert code == 0
    assert "without learning" in err
    table = pd.read_csv(tmp_path / "c" / "losses.csv")
    expected = [nll_T.reshape(-1, 8).mean(1) for nll_T in scores]
    assert table["tokens"].tolist() == list(range(8, len(TEXT) + 1, 8))
    for name, loss_N in zip(("with", "without"), expected, strict=True):
        np.testing.assert_allclose(table[f"loss_{name}"], loss_N, atol=2e-5)
        means = np.cumsum(loss_N) / np.arange(1, len(loss_N) + 1)
        np.testing.assert_allclose(table[f"mean_{name}"], means, atol=2e-5)
    assert table["loss_with"][0] == table["loss_without"][0]  # before any update
    assert abs(table["loss_with"] - table["loss_without"])[1:].min() > 1e-4
    with_ttt, without = (float(loss_N.mean()) for loss_N in expected)
    verb = "lowered" if with_ttt < without else "raised"
    assert out.startswith(f"over {len(TEXT)} tokens, learning {verb} the loss by ")
    assert out.endswith(f" nats per token ({without:.3f} to {with_ttt:.3f})\n")
    assert {path.name for path in (tmp_path / "c").iterdir()} == FILES
    comparison = load(run).compare(tmp_path / "cat.txt")
    np.testing.assert_array_equal(comparison.tokens_N, table["tokens"])
    np.testing.assert_allclose(comparison.loss_N, table["loss_with"], atol=1e-6)
    np.testing.assert_allclose(comparison.loss_without_N, table["loss_without"], atol=1e-6)


@pytest.mark.exhaustive
def test_stopped_and_killed_comparison_is_bit_identical(read, tmp_path):
    compare = ("--compare", tmp_path / "c", "--keep-every=64", "--telescope", tmp_path / "t")
    assert read(*compare)[0] == 0
    uninterrupted = {name: (tmp_path / "c" / name).read_bytes() for name in FILES}
    for name in ("c", "t", "s.kept"):
        shutil.rmtree(tmp_path / name)
    (tmp_path / "s").unlink()

    assert read(*compare, stop=1)[0] == 75
    early = (tmp_path / "s").read_bytes()
    assert read(*compare, stop=1)[0] == 75
    # As if killed after the session without updates was saved, and before the other.
    (tmp_path / "s").write_bytes(early)
    with (tmp_path / "c" / "losses.csv").open("a") as file:
        file.write("136,1.2")
    code, out, _ = read(*compare, stop=2)
    assert code == 75
    assert out.startswith("over 192 tokens")
    assert read(*compare)[0] == 0
    content = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    assert content == uninterrupted
    (tmp_path / "c" / "losses.png").unlink()
    assert read(*compare)[1].startswith(f"over {len(TEXT)} tokens")
    assert (tmp_path / "c" / "losses.png").read_bytes() == uninterrupted["losses.png"]


def test_comparisons_of_a_part_are_refused(run, read, make_run, tmp_path):
    assert read(stop=1)[0] == 75
    assert "does not hold the losses of the first 64 tokens" in refused(read, tmp_path)
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    (tmp_path / "s").rename(tmp_path / "base")
    base = ("--session", tmp_path / "base")
    assert "does not hold the losses" in refused(read, tmp_path, *base)
    assert read("--compare", tmp_path / "c", stop=1)[0] == 75
    (static,) = (tmp_path / "c").glob("without-*")
    static.unlink()
    assert "does not hold the losses" in refused(read, tmp_path)
    lines = (tmp_path / "c" / "losses.csv").read_text().splitlines()
    (tmp_path / "c" / "losses.csv").write_text("\n".join([*lines[:-1], "64,nan,1,1,1"]))
    assert "line 9 of" in refused(read, tmp_path)
    (tmp_path / "s").unlink()
    assert json.loads((tmp_path / "c" / "losses.json").read_text())["tokens"] == 64
    (tmp_path / "cat.txt").write_text(TEXT.upper())
    assert "another model or text" in refused(read, tmp_path)
    (tmp_path / "cat.txt").write_text("a cat")
    assert "has no full chunk of 8 tokens" in refused(read, tmp_path)
    assert "--compare needs inner updates" in refused(read, tmp_path, "--learn=none")
    with pytest.raises(UserError, match="no inner updates"):
        load(run, mode="off").compare(tmp_path / "cat.txt")
    assert not (tmp_path / "s").exists()


def refused(read, folder, *options):
    code, _, err = read("--compare", folder / "c", *options)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err
