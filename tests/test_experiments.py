"""The programs of experiments/: recall by distance, and the bias of cheaper meta-gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from helpers.paths import ROOT

import tttjax
from experiments import meta_gradient_bias, pack_weights, recall
from tttjax.data.preparation import prepare
from tttjax.data.shards import open_prepared
from tttjax.errors import UserError

BLOCKS = 2


def test_passages_are_read_twice_or_once(data):
    split = open_prepared(data).split("train")
    read, unread = recall.passages(split, 8, 3, 4)
    assert read.tokens.shape[1] == 4 * 8 + 1
    assert (read.tokens[:, 1:9] == read.tokens[:, -8:]).all()
    assert (read.tokens[:, 9:] == unread.tokens[:, 9:]).all()
    assert (read.tokens[:, :9] != unread.tokens[:, :9]).any(axis=1).all()
    text = split.read(0, split.num_tokens).tobytes()
    assert all(row[:9].tobytes() in text for row in read.tokens)


@pytest.mark.slow
def test_only_fast_weights_recall_beyond_the_reach_of_the_windows(data, make_run, tmp_path, capsys):
    run = make_run("recall", num_layers=BLOCKS, suffix_layers=1, fast_mlp=True)
    far = BLOCKS + 2
    flags = [str(run), f"--data={data}", "--split=train", "--passages=4"]
    assert recall.main([*flags, f"--distances={far}", f"--out={tmp_path}"]) == 0
    rows = pd.read_csv(tmp_path / "recall.csv").set_index(["run", "windows"])["recall"]
    assert rows["recall, TTT off", far] == 0
    assert rows["recall, TTT on", far] != 0
    assert np.isfinite(rows).all()
    assert (tmp_path / "recall.png").exists()
    assert recall.main([*flags, "--distances=100000", f"--out={tmp_path}"]) == 2
    assert "shorter --distances" in capsys.readouterr().err


def test_bad_arguments_are_refused(data, make_run, tmp_path, capsys):
    run = str(make_run("run", suffix_layers=1, fast_mlp=True))
    (tmp_path / "text").write_text("a text of some words\n" * 200)
    other = tmp_path / "other"
    prepare([tmp_path / "text"], other, tokenizer="sentencepiece", vocab_size=300, num_workers=0)
    out = tmp_path / "out"
    for program, flags, sentence in [
        (recall, [run, f"--data={other}"], "another tokenizer"),
        (recall, [run, run, f"--data={data}"], "the same name"),
        (recall, [run, f"--data={data}", "--dynamic-lr=0.1"], "is for the mode dynamic"),
        (recall, [run, f"--data={data}", "--distances=1,1"], "must differ"),
        (meta_gradient_bias, [run, f"--data={other}"], "another tokenizer"),
        (meta_gradient_bias, [run, f"--data={data}", "--batches=0"], "must be positive"),
    ]:
        assert program.main([*flags, "--split=train", f"--out={out}"]) == 2
        assert sentence in capsys.readouterr().err
        assert not out.exists()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_exact_meta_gradient_has_no_bias(data, make_run, tmp_path, capsys):
    run = make_run("bias", suffix_layers=1, fast_mlp=True)
    flags = [f"--data={data}", f"--out={tmp_path}", "--batches=2"]
    assert meta_gradient_bias.main([str(run), *flags]) == 0
    table = pd.read_csv(tmp_path / "meta_gradient_bias.csv").set_index(["meta_gradient", "weights"])
    np.testing.assert_allclose(table.loc["exact"][["cosine", "norm_ratio"]], 1, atol=1e-6)
    cosine = table["cosine"].xs("all", level="weights")
    # 32 tokens are four chunks: nothing is cut off by four.
    np.testing.assert_allclose(cosine["truncated4"], 1, atol=1e-6)
    assert 1 > cosine["truncated2"] > cosine["first_order"] > cosine["none"]
    assert meta_gradient_bias.main([str(run), *flags, "--split=nothing"]) == 2
    assert "nothing" in capsys.readouterr().err
    assert meta_gradient_bias.main([str(make_run("static")), *flags]) == 2
    assert "no fast weights" in capsys.readouterr().err


# The trained model -------------------------------------------------------------------------------

BOOKS = ROOT / "experiments" / "books-1.7m"


@pytest.mark.slow
def test_packed_weights_are_the_runs_rounded_without_its_paths(make_run, tmp_path):
    run = make_run("large", suffix_layers=1, fast_mlp=True)
    pack_weights.pack(str(run), str(tmp_path / "packed"))
    before, after = (tttjax.load(folder) for folder in (run, tmp_path / "packed"))
    for x, y in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_array_equal(np.asarray(x).astype(jnp.bfloat16).astype(x.dtype), y)
    text = (tmp_path / "packed" / "config.json").read_text()
    assert str(ROOT) not in text
    assert str(tmp_path.parent) not in text
    with pytest.raises(UserError, match="is not empty"):
        pack_weights.pack(str(run), str(tmp_path / "packed"))


@pytest.mark.slow
def test_the_trained_model_learns_while_it_reads():
    size = sum(path.stat().st_size for path in BOOKS.rglob("*") if path.is_file())
    assert size < 5_000_000
    text = (ROOT / "experiments" / "moby-dick.txt").read_text()[:20_000]
    run = tttjax.load(BOOKS)
    gain_T = run.forward(text, learn=False).nll_T - run.forward(text).nll_T
    np.testing.assert_allclose(gain_T[:32], 0, atol=1e-4)  # before the first update
    assert gain_T[len(gain_T) // 2 :].mean() > 0.1
