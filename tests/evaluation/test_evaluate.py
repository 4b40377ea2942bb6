"""Evaluation: the numbers against direct computations, the statistics by hand, files, errors."""

import csv
import dataclasses
import io
import json
import re

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from helpers.inference import random_params
from helpers.tiny_runs import prepare_texts

import tttjax.evaluation.compare
from tttjax.cli import main
from tttjax.config import (
    Config,
    DataConfig,
    EvalConfig,
    InnerConfig,
    ModelConfig,
    TrainConfig,
    write_run_info,
)
from tttjax.data.held_out import doubling_windows, eval_sequences
from tttjax.data.preparation import prepare
from tttjax.errors import UserError
from tttjax.evaluation.compare import compare, evaluate
from tttjax.evaluation.outputs import write_comparison
from tttjax.evaluation.results import Comparison, Series
from tttjax.evaluation.statistics import (
    Sums,
    difference,
    position_bins,
    sum_by_document,
)
from tttjax.evaluation.summary import blocks, sentence
from tttjax.evaluation.tables import CaptionedTable, format_estimate, make_table, render, show
from tttjax.evaluation.text import Text
from tttjax.models.transformer import build_model
from tttjax.parallel.mesh import make_mesh
from tttjax.runs.eval_setup import LearningOptions
from tttjax.runs.run import RunSpec, run_of_params
from tttjax.training import checkpoints
from tttjax.ttt.outer_loss import make_forward, make_inner_loop
from tttjax.types import Batch

pytestmark = pytest.mark.slow

WINDOW, CHUNK, LONGEST = 16, 8, 64
LENGTHS = (16, 64)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Bytes; five held-out documents of different lengths, the longest of 400."""
    return prepare_texts(tmp_path_factory.mktemp("data"), (400, 300, 200, 140, 90, 500))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices()[:1])


def make_config(data, fast=True, **inner):
    model = ModelConfig(
        vocab_size=264,
        embed_dim=16,
        num_layers=2,
        num_heads=2,
        mlp_dim=24,
        window_size=WINDOW,
        suffix_layers=int(fast),
        fast_mlp=fast,
        init_std=0.3,
    )
    return Config(
        model=model,
        inner=InnerConfig(chunk_size=CHUNK, **inner),
        train=TrainConfig(seq_len=32),
        data=DataConfig(sources=(str(data.folder),)),
        eval=EvalConfig(context_lengths=LENGTHS, num_sequences=9, batch_size=4, bins=8),
    )


def one_length(config, **values):
    return dataclasses.replace(config.eval, **{"context_lengths": (LONGEST,), **values})


def make_params(config, seed=0):
    return random_params(build_model(config.model, config.inner), seed)


@pytest.fixture(scope="module")
def config(data):
    return make_config(data)


@pytest.fixture(scope="module")
def params(config):
    return make_params(config)


@pytest.fixture(scope="module")
def comparison(config, params, data, mesh):
    """On and off of one model, and a control with other weights."""
    control = make_config(data, fast=False)
    runs = [
        run_of_params(config, params, "ttt"),
        run_of_params(control, make_params(control, seed=1), "control"),
    ]
    return compare(runs, data=data, mesh=mesh)


def series_of(comparison, label):
    return next(series for series in comparison.series if series.label == label)


def nll_by_hand(config, params, data, length, learn):
    """[(document, NLL, targets)] of every context, evaluated alone."""
    model, inner = build_model(config.model, config.inner), make_inner_loop(config.inner)
    read = jax.jit(make_forward(model, inner, learn=learn), static_argnums=2)
    held_out = eval_sequences(data, length=LONGEST, num=9, seed=config.eval.seed)
    found = []
    for tokens, document in zip(held_out.tokens, held_out.document, strict=True):
        for start in range(0, LONGEST, length):
            piece = tokens[None, start : start + length + 1]
            mask = piece[:, 1:] != data.tokenizer.bos_id
            batch = Batch(inputs=piece[:, :-1], targets=piece[:, 1:], mask=mask)
            nll_T = np.asarray(read(params, batch, config.inner.lr).token_nll_T)[0]
            found.append((document, nll_T, piece[0, 1:]))
    return found


# The numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "mode"), [(16, "on"), (64, "on"), (64, "off")])
def test_losses_equal_those_of_single_contexts(comparison, config, params, data, length, mode):
    found = nll_by_hand(config, params, data, length, learn=mode == "on")
    sums = series_of(comparison, f"ttt, TTT {mode}").contexts[length]
    every = np.stack([nll for _, nll, _ in found])
    np.testing.assert_allclose(sums.loss().mean, every.mean(), rtol=1e-5)
    np.testing.assert_allclose(sums.loss_by_position().mean, every.mean(axis=0), rtol=1e-4)
    num_bytes = sum((target < 256).sum() for _, _, target in found)
    bits = every.sum(dtype=np.float64) / np.log(2) / num_bytes
    np.testing.assert_allclose(sums.bits_per_byte().mean, bits, rtol=1e-5)


def test_every_context_length_scores_the_same_tokens(comparison):
    for series in comparison.series:
        counts = {length: series.contexts[length].count_DL.sum() for length in LENGTHS}
        assert set(counts.values()) == {9 * LONGEST} == {comparison.text["tokens"]}
    assert comparison.text["documents"] == 5


def test_learning_changes_the_later_chunks_only(comparison):
    on, off = (series.contexts[LONGEST] for series in comparison.series[:2])
    change_DL = np.abs(on.loss_DL - off.loss_DL)
    np.testing.assert_allclose(change_DL[:, :CHUNK], 0, atol=1e-4)
    assert change_DL[:, CHUNK:].max() > 1e-3


def test_with_learning_rate_of_zero_on_equals_off(config, params, data, mesh):
    still = LearningOptions(inner={"lr": 0.0})
    result = evaluate(config, params, data, mesh=mesh, settings=one_length(config), learning=still)
    on, off = (series.contexts[LONGEST].loss_DL for series in result.series)
    np.testing.assert_allclose(on, off, rtol=1e-5)
    assert "did not change the loss of model significantly" in result.sentence


def test_the_batch_size_changes_nothing(comparison, config, params, data, mesh):
    settings = one_length(config, batch_size=7)
    result = evaluate(config, params, data, mesh=mesh, settings=settings, modes=["on"])
    expected = comparison.series[0].contexts[LONGEST]
    actual = result.series[0].contexts[LONGEST]
    np.testing.assert_allclose(actual.loss_DL, expected.loss_DL, rtol=1e-5)


def test_a_sharded_mesh_changes_nothing(comparison, config, params, data):
    mesh, settings = make_mesh(2, 2, 2), one_length(config)
    result = evaluate(config, params, data, mesh=mesh, settings=settings, modes=["on"])
    expected = comparison.series[0].contexts[LONGEST]
    actual = result.series[0].contexts[LONGEST]
    np.testing.assert_allclose(actual.loss_DL, expected.loss_DL, rtol=1e-4)


def test_losses_of_bfloat16_models_have_float32_resolution(config, params, data, mesh):
    model = dataclasses.replace(config.model, compute_dtype="bfloat16")
    config = dataclasses.replace(config, model=model)
    settings = one_length(config, context_lengths=(16,), num_sequences=1)
    result = evaluate(config, params, data, mesh=mesh, settings=settings, modes=["off"])
    loss_T = result.series[0].contexts[16].loss_DL[0]
    assert np.any(loss_T != np.asarray(jnp.asarray(loss_T, jnp.bfloat16), np.float64))


# Dynamic evaluation ------------------------------------------------------------------------------


def test_dynamic_evaluation_starts_from_the_static_model(data, mesh):
    """Its relayout keeps the loss; at a rate above zero the weights do move, after a chunk."""
    config = make_config(data, fast=False)
    result = evaluate(
        config,
        make_params(config),
        data,
        mesh=mesh,
        settings=one_length(config),
        modes=["off", "dynamic"],
        learning=LearningOptions(dynamic_lrs=(0.0, 1.0), dynamic_layers=1),
    )
    off, still, moving = (series.contexts[LONGEST].loss_DL for series in result.series)
    np.testing.assert_allclose(still, off, rtol=1e-5)
    np.testing.assert_allclose(moving[:, :CHUNK], off[:, :CHUNK], rtol=1e-5)
    assert np.abs(moving - off).max() > 1e-3
    assert [s.label for s in result.series] == ["model", "model, dynamic 0", "model, dynamic 1"]
    assert result.series[2].inner == {"rule": "sgd", "lr": 1.0, "clip": 1.0, "chunk_size": CHUNK}


# Statistics --------------------------------------------------------------------------------------


def test_standard_errors_by_hand():
    """Two sequences of document 7, one each of 3 and 5: documents are averaged first."""
    loss_NT = np.array([[1.0, 3.0], [2.0, 2.0], [5.0, 1.0], [0.0, 4.0]])
    document_N = np.array([7, 3, 7, 5])
    loss_DL = sum_by_document(loss_NT, document_N, 2)
    np.testing.assert_array_equal(loss_DL, [[2, 2], [0, 4], [6, 4]])
    count_DL = sum_by_document(np.ones_like(loss_NT, bool), document_N, 2)
    loss = Sums(loss_DL, count_DL, None).loss()
    mean = loss.mean
    assert mean == 18 / 8
    residual = [4 - 2 * mean, 4 - 2 * mean, 10 - 4 * mean]
    assert loss.stderr == pytest.approx(np.sqrt(3 / 2 * np.sum(np.square(residual))) / 8)


def test_masked_targets_do_not_count():
    text = Text(
        folder="",
        split="val",
        fingerprint="",
        lossless=True,
        mask_NT=np.array([[True, False], [True, True]]),
        bytes_NT=np.array([[4, 0], [1, 3]]),
        document_N=np.array([0, 1]),
    )
    sums = text.sums(np.array([[2.0, 1e9], [3.0, 4.0]], np.float32), 2)
    assert sums.loss().mean == 3
    assert sums.bits_per_byte().mean == pytest.approx(9 / 8 / np.log(2))
    np.testing.assert_array_equal(sums.loss_by_position().mean, [2.5, 4])


def test_equally_weighted_documents_have_the_usual_standard_error():
    means = np.array([1.0, 4.0, 2.5, 3.0])
    loss = Sums(means[:, None] * 8, np.full((4, 1), 8)).loss()
    assert loss.mean == pytest.approx(means.mean())
    assert loss.stderr == pytest.approx(means.std(ddof=1) / 2)


def test_single_documents_and_masked_positions_give_nan():
    loss = Sums(np.array([[2.0, 0.0]]), np.array([[1, 0]])).loss_by_position()
    assert loss.mean[0] == 2
    assert np.isnan(loss.stderr[0])
    assert np.isnan(loss.mean[1])


def test_a_difference_is_paired():
    """Documents differ by tens, the two series by exactly one: no error is left."""
    count = np.full((3, 1), 2.0)
    a, b = (Sums(np.array([[10.0], [40.0], [90.0]]) + 2 * i, count, None) for i in (1, 0))
    change = difference([a], [b])
    assert (change.mean, change.stderr) == (1, 0)
    with pytest.raises(ValueError, match="same tokens"):
        difference([a], [Sums(b.loss_DL, count + 1, None)])


def test_contexts_of_a_sequence_are_summed_by_position():
    x_NT = np.arange(6.0)[None]
    np.testing.assert_array_equal(sum_by_document(x_NT, np.array([0]), 2), [[0 + 2 + 4, 1 + 3 + 5]])


@pytest.mark.parametrize(
    ("length", "window", "bins"), [(2048, 256, 32), (131072, 8192, 32), (64, 64, 8), (96, 64, 2)]
)
def test_bins_cover_every_position_once_until_the_window(length, window, bins):
    edges = position_bins(length, window, bins)
    assert (edges[0], edges[-1]) == (0, length)
    assert (np.diff(edges) > 0).all()
    assert min(window, length) in edges
    assert bins / 2 <= len(edges) - 1 <= bins + 1
    assert position_bins(length, window, 1).tolist() == [0, length]


def test_binning_keeps_sums_doubling_windows_reach_the_end():
    sums = Sums(np.arange(10.0)[None], np.ones((1, 10)), None)
    assert sums.binned([0, 3, 4, 10]).loss_DL.tolist() == [[3, 3, 39]]
    assert sums.between(2, 5).loss_DL.tolist() == [[9]]
    assert doubling_windows(100, 16) == [0, 16, 32, 64, 100]
    assert doubling_windows(16, 16) == [0, 16]


# Text and files ----------------------------------------------------------------------------------


def fake(comparison, beyond):
    """The comparison with the on series' loss beyond the window changed by `beyond` per token."""
    on, off = comparison.series[:2]
    contexts = {}
    for length, sums in off.contexts.items():
        loss_DL = sums.loss_DL.copy()
        noise = np.resize([0.05, -0.05], len(loss_DL))[:, None]
        loss_DL[:, WINDOW:] += (beyond + noise) * sums.count_DL[:, WINDOW:]
        contexts[length] = dataclasses.replace(sums, loss_DL=loss_DL)
    return dataclasses.replace(comparison, series=(dataclasses.replace(on, contexts=contexts), off))


@pytest.mark.parametrize(
    ("beyond", "expected"),
    [
        (-0.5, "lowered the loss of ttt by 0."),
        (+0.5, "raised the loss of ttt by 0."),
        (0.0, "did not change the loss of ttt significantly"),
    ],
)
def test_the_sentence_says_what_the_numbers_say(comparison, beyond, expected):
    text = sentence(fake(comparison, beyond))
    assert text.startswith(
        "Beyond the window (tokens 17-64 of 5 held-out documents), test-time training"
    )
    assert expected in text
    assert "with TTT off" in text


def test_the_sentence_gives_the_difference_at_the_start(comparison):
    assert re.search(
        r"that of control \(before its first step, tokens 1-\d+: ", comparison.sentence
    )
    assert comparison.sentence.count("\n") == 0


def test_without_learning_the_sentence_compares_contexts(comparison):
    alone = dataclasses.replace(comparison, series=comparison.series[2:])
    assert sentence(alone).startswith("With a context of 64 tokens, control had a loss of")
    assert "against one of 16 tokens" in sentence(alone)
    assert not alone.main_pairs()


def test_all_files_are_written_and_agree(comparison, tmp_path):
    paths = write_comparison(comparison, tmp_path / "new" / "eval")
    assert sorted(path.name for path in (tmp_path / "new" / "eval").iterdir()) == sorted(paths)
    values = json.loads(paths["results.json"].read_text())
    on = values["series"][0]["contexts"]["64"]
    assert len(on["by_token"]["loss"]) == 64
    rows = list(csv.DictReader(io.StringIO(paths["by_context.csv"].read_text())))
    expected = ["ttt, TTT on", "64", "beyond_window"]
    row = next(r for r in rows if [r["label"], r["context"], r["tokens"]] == expected)
    assert float(row["loss"]) == on["beyond_window"]["nats_per_token"]["mean"]
    assert float(row["bits_per_byte"]) == on["beyond_window"]["bits_per_byte"]["mean"]
    rows = list(csv.DictReader(io.StringIO(paths["by_position.csv"].read_text())))
    found = [float(r["loss"]) for r in rows if (r["label"], r["context"]) == ("ttt, TTT on", "64")]
    assert found == on["bins"]["loss"]
    for name in ("loss_by_position.png", "loss_by_context.png"):
        image = matplotlib.image.imread(paths[name])
        assert image.shape[0] > 300
        assert image[..., :3].std() > 0.01


def test_tables_line_up(comparison):
    tables = comparison.table.split("\n\n")[1:]
    assert len(tables) == 3
    for text in tables:
        lines = text.splitlines()[1:]
        assert len({len(line) for line in lines}) == 1
        assert all(line.startswith("|") for line in lines)
    assert "| ttt, TTT on - TTT off |" in tables[2]
    assert "| ttt, TTT on - control |" in tables[2]


def made_up(modes, window=64):
    """A comparison with the defaults of `eval`; modes of each run, "" if nothing can learn."""
    lengths = tuple(window * n for n in (1, 2, 4, 8))
    rng = np.random.default_rng(0)

    def series(run, mode):
        contexts = {}
        for length in lengths:
            count_DL = np.full((58, length), lengths[-1] // length)
            contexts[length] = Sums((3 + rng.random((58, length))) * count_DL, count_DL, count_DL)
        label, inner = f"{run}, TTT {mode}" if mode else run, None
        if mode == "on":
            inner = {"rule": "sgd", "lr": 1.0, "clip": 1.0, "chunk_size": 32}
        return Series(run, mode or "off", label, inner, contexts, seconds=1.0)

    text = {"tokens": 65_536, "documents": 58, "split": "val", "data": "runs/quickstart/data"}
    return Comparison(
        series=tuple(series(run, mode) for run, of_run in modes.items() for mode in of_run),
        lengths=lengths,
        window=window,
        bins=EvalConfig().bins,
        runs=tuple({"name": run, "step": 10_000} for run in modes),
        text={**text, "sequences": 128, "bytes_are_exact": True},
    )


@pytest.mark.parametrize("names", [("ttt_e2e", "window"), ("ttt_e2e-760m-lr0.002", "w" * 20)])
@pytest.mark.parametrize("second", [("",), ("on", "off")])
def test_tables_fit_100_columns(names, second):
    found = made_up({names[0]: ("on", "off"), names[1]: second})
    text = render(blocks(found))
    assert max(map(len, text.splitlines())) <= 100
    for words in ("64 tokens", "512 tokens", "512 - 64", "bits per byte at 512", "257-512"):
        assert f" {words} |" in text
    for series in found.series:
        assert format_estimate(series.contexts[512].loss()) in text


def test_tables_of_the_quickstart_are_split_once():
    found = made_up({"ttt_e2e": ("on", "off"), "window": ("",)})
    parts = render(blocks(found)).split("\n\n")
    heads = [next(line for line in part.splitlines() if line[0] == "|") for part in parts[1:]]
    assert [len(head.split("|")) - 3 for head in heads] == [4, 2, 4, 3]


def test_wide_tables_are_split():
    head = ["name", *(f"column {i} of those" for i in range(12))]
    rows = [[name, *(f"{name}{i}" for i in range(12))] for name in ("a" * 20, "b")]
    table = make_table({name: cells for name, *cells in rows}, *(head[0], head[1:]))
    parts = [part.splitlines() for part in render([CaptionedTable("", table)]).split("\n\n")]
    assert all(len(line) <= 100 for part in parts for line in part)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for part in parts for line in part]
    for i, expected in enumerate((head, None, *rows)):
        if expected:
            found = cells[i :: len(rows) + 2]
            assert {line[0] for line in found} == {expected[0]}
            assert [cell for line in found for cell in line[1:]] == expected[1:]
    wide = render([CaptionedTable("", make_table({"a": ["1"]}, "n", ["x" * 200]))])
    assert wide.splitlines()[2] == f"| a | {'1':>200} |"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("width", [60, 140])
def test_tables_fit_the_terminal(width, monkeypatch):
    """All numbers are there, on lines that fit; a pipe gets Markdown."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", "25")  # rich uses neither alone on a terminal without escapes
    monkeypatch.setenv("TERM", "dumb")
    found = made_up({"ttt_e2e": ("on", "off"), "window": ("",)})
    show(blocks(found), terminal := Terminal())
    text = terminal.getvalue()
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= width
    assert "|" not in text
    for series in found.series:
        assert format_estimate(series.contexts[512].loss()) in text
    assert (text.count("loss by context") == 1) == (width == 140)  # a wide table is split
    show(blocks(found), pipe := io.StringIO())
    assert pipe.getvalue() == f"{render(blocks(found))}\n"


# The command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(config, params, tmp_path_factory):
    """A finished run of 3 steps."""
    folder = tmp_path_factory.mktemp("runs") / "ttt"
    write_run_info(folder, config)
    saver = checkpoints.Checkpointer(folder / checkpoints.CHECKPOINT_DIR)
    saver.save(3, {"params": params, "step": jnp.int32(3)})
    saver.close()
    return folder


def test_the_command_evaluates_a_work_directory(workdir, comparison, mesh, monkeypatch, capsys):
    monkeypatch.setattr(tttjax.evaluation.compare, "make_run_mesh", lambda config: mesh)
    words = ["--context-lengths=64", "--modes=on", "--bins=4", "--names=first"]
    assert main.main(["evaluate", str(workdir), *words]) == 0
    out, err = capsys.readouterr()
    assert "first after 3 steps: 576 target tokens of 5 held-out documents" in out
    assert "evaluate 100%" in err
    values = json.loads((workdir / "eval" / "results.json").read_text())
    assert values["runs"][0] == {"name": "first", "step": 3, "source": str(workdir), "window": 16}
    expected = comparison.series[0].contexts[LONGEST].loss().mean
    actual = values["series"][0]["contexts"]["64"]["all"]["nats_per_token"]["mean"]
    assert actual == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--context-lengths=20"],
            "20 is not a multiple of the chunk size 8 .* nearest is 16 or 24",
        ),
        (["--context-lengths=0"], "at least 1"),
        (["--context-lengths=4096"], "context of 4096 tokens; the longest that fits is [0-9]+:"),
        (["--split=test"], "no documents in the split 'test'"),
        (["--data=nowhere"], "nowhere does not exist"),
        (["--modes=dynamic"], "does not fit the run ttt, which has fast weights"),
        (["--modes=of"], "mode 'of' is unknown"),
        (["--chunk-size=32"], "window of 16 tokens, smaller than the chunk size of 32"),
        (["--inner-lr=-1"], "inner.lr = -1.0 must be at least 0"),
        (["--batch-size=0"], "eval.batch_size = 0 must be at least 1"),
        (["--names=a,b"], "2 names for 1 work directories"),
    ],
)
def test_invalid_arguments_are_user_errors(workdir, words, sentence, tmp_path, capsys):
    assert main.main(["evaluate", str(workdir), f"--out={tmp_path / 'out'}", *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(err)
    assert not (tmp_path / "out").exists()


def test_no_checkpoint_is_a_user_error(tmp_path, capsys):
    assert main.main(["evaluate", str(tmp_path)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_data_of_another_tokenizer_are_refused(config, params, data, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(4):
        (texts / f"{i}.txt").write_text("some other words, many times over. " * 40)
    other = prepare(
        [texts],
        tmp_path / "other",
        tokenizer="sentencepiece",
        vocab_size=300,
        val_fraction=0.5,
        num_workers=0,
    )
    with pytest.raises(UserError, match=r"another tokenizer .* than those of the run model"):
        evaluate(config, params, other)
    unknown = dataclasses.replace(config, data=DataConfig())
    with pytest.raises(UserError, match="300 tokens, is larger than that of the run model, 264"):
        evaluate(unknown, params, other)


def test_ambiguous_or_missing_data_are_user_errors(config, params):
    several = dataclasses.replace(config, data=DataConfig(sources=("a", "b")))
    with pytest.raises(UserError, match=r"was trained on 2 \(a, b\); give --data=DIR"):
        evaluate(several, params)
    moved = dataclasses.replace(config, data=DataConfig(sources=("moved/away",)))
    with pytest.raises(UserError, match=r"were not found \(tried moved/away"):
        evaluate(moved, params)


def test_two_runs_need_two_names(config, params, data):
    runs = [run_of_params(config, params), run_of_params(config, params)]
    with pytest.raises(UserError, match="two runs are called 'model'"):
        compare(runs, data=data)


def test_weights_of_another_architecture_are_refused(workdir, config, data, tmp_path):
    bigger = dataclasses.replace(config.model, mlp_dim=32)
    folder = tmp_path / "run"
    write_run_info(folder, dataclasses.replace(config, model=bigger))
    (folder / checkpoints.CHECKPOINT_DIR).symlink_to(workdir / checkpoints.CHECKPOINT_DIR)
    with pytest.raises(UserError, match="does not fit this model"):
        compare([RunSpec(folder)], data=data)
