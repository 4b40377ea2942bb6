"""From conversations to a tuned model: prepare, train, resume, evaluate, answer."""

import json

import numpy as np
import pytest
from helpers.chat import write_chats

from tttjax.cli.main import main
from tttjax.config import load_config
from tttjax.data.pipeline import StreamOptions, make_train_stream
from tttjax.data.preparation import prepare
from tttjax.errors import UserError
from tttjax.evaluation.compare import compare
from tttjax.runs.run import RunSpec
from tttjax.training.loop import train
from tttjax.training.metrics_file import deterministic_records, read_records

pytestmark = pytest.mark.slow
OVERRIDES = (
    "data.layout=documents",
    "train.steps=4",
    "train.seq_len=64",
    "train.eval_every=4",
    "eval.num_sequences=8",
    "eval.context_lengths=64",
    "inner.remat=False",
    "model.remat=none",
)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Conversations as bytes, a third of them held out."""
    folder = tmp_path_factory.mktemp("chats")
    write_chats(folder / "chats.jsonl", 40)
    return prepare([folder / "chats.jsonl"], folder / "data", chat=True, val_fraction=0.3)


@pytest.fixture(scope="module")
def make(tiny, chats):
    return lambda *more: tiny(f"data.sources={chats.folder}", *OVERRIDES, *more, arg="ttt_e2e")


@pytest.fixture(scope="module")
def tuned(make, tmp_path_factory):
    """(work directory, result) of a run that was not stopped."""
    workdir = tmp_path_factory.mktemp("tuned")
    return workdir, train(make(), workdir)


@pytest.mark.exhaustive
def test_resuming_equals_never_stopping(make, tuned, tmp_path):
    train(make(), tmp_path, stop_after=3)
    train(make(), tmp_path)
    assert deterministic_records(tmp_path) == deterministic_records(tuned[0])


def test_the_loss_is_that_of_the_answers(tuned):
    """At step 0 every token is as likely as any other, up to the initial weights."""
    records = read_records(tuned[0])
    assert all(np.isfinite(record["loss"]) for record in records)
    assert records[0]["loss"] == pytest.approx(np.log(264), abs=0.2)
    assert records[0]["loss"] != pytest.approx(records[0]["first_chunk_loss"], abs=1e-4)


def test_micro_batches_give_the_same_step(make, tuned, tmp_path):
    train(make("train.accum_steps=4", "train.eval_every=0"), tmp_path, stop_after=1)
    (step,), (expected, *_) = read_records(tmp_path), read_records(tuned[0])
    assert step["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def test_held_out_losses_and_evaluation_count_answers_alone(tuned, chats):
    (held_out,) = read_records(tuned[0], "held_out.jsonl")
    comparison = compare([RunSpec(tuned[0])], progress=None)
    split = chats.split("val")
    assert 0 < comparison.text["tokens"] < split.targets(0, split.num_tokens).sum()
    for series in comparison.series:
        sums = series.contexts[64]
        assert sums.count_DL.sum() == comparison.text["tokens"]
        loss = float(sums.loss().mean)
        assert loss == pytest.approx(held_out[series.mode]["loss"], rel=1e-5)
    positions = [*held_out["on"]["by_position"]]
    assert len(positions) == len(held_out["first_token"])


def test_the_command_reports_and_answers(tuned, tmp_path, capsys):
    assert main(["evaluate", str(tuned[0]), f"--out={tmp_path / 'eval'}"]) == 0
    assert "losses are of the marked tokens alone" in capsys.readouterr().out
    question = ("generate", str(tuned[0]), "--chat", "--max-tokens=4", "--temperature=0")
    assert main([*question, "--prompt=What is 1 plus 1?"]) == 0
    answer = capsys.readouterr().out
    rendered = "--prompt=User:\nWhat is 1 plus 1?\n\nAssistant:\n"
    assert main([*question[:2], *question[3:], rendered]) == 0
    assert capsys.readouterr().out == answer
    assert main([*question, "--prompt= "]) == 2
    assert main([*question, "--prompt=a", "--session=b"]) == 2
    assert "remove one" in capsys.readouterr().err


def test_the_recipe_tunes_a_run(make, tuned, chats, tmp_path):
    overrides = ("train.steps=25", "train.log_every=1", f"data.sources={chats.folder}")
    config = load_config(f"chat:{tuned[0]}", overrides)
    assert (config.model, config.inner.chunk_size) == (make().model, make().inner.chunk_size)
    assert config.optim.peak_lr == pytest.approx(make().optim.peak_lr / 10)
    assert config.train.init_from == str(tuned[0])
    train(config, tmp_path, stop_after=1)
    # It starts with what the run ended with.
    (record,) = read_records(tmp_path)
    assert record["loss"] < read_records(tuned[0])[0]["loss"]
    with pytest.raises(UserError, match="not the work directory of a run"):
        load_config(f"chat:{tmp_path / 'nothing'}")


def test_other_targets_do_not_continue_a_run(chats, tmp_path):
    options = StreamOptions(seq_len=16, batch_size=4)
    state = make_train_stream([chats], options, prefetch=0).get_state()
    write_chats(tmp_path / "chats.jsonl", 40, seed=1)
    other = prepare([tmp_path / "chats.jsonl"], tmp_path / "data", chat=True, num_workers=0)
    with pytest.raises(UserError, match="data differ from those of the checkpoint"):
        make_train_stream([other], options, prefetch=0).set_state(json.loads(json.dumps(state)))
