"""Checkpoints record their tokenizer; data of another one are refused."""

import os
import shutil
from pathlib import Path

import pytest

from tttjax.data.preparation import prepare
from tttjax.data.tokenizers.base import copy_tokenizer, load_tokenizer
from tttjax.errors import UserError
from tttjax.evaluation.compare import compare
from tttjax.runs.run import RunSpec, open_run
from tttjax.runs.tokenizer import load_run_tokenizer
from tttjax.training import saved_weights
from tttjax.training.loop import train
from tttjax.training.train_run import open_batches

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "prepared"
    text = str(Path(os.__file__).parent / "argparse.py")
    prepare([text], folder, tokenizer="sentencepiece", vocab_size=400, num_workers=0)
    return folder


@pytest.fixture(scope="module")
def replaced(tiny, data, other_data, tmp_path_factory):
    """(work directory, configuration, data folder) of a run whose data were replaced."""
    folder = tmp_path_factory.mktemp("replaced")
    shutil.copytree(data, folder / "data")
    config = tiny(f"data.sources={folder / 'data'}", "model.vocab_size=400", "train.steps=4")
    train(config, folder / "run", stop_after=1)
    shutil.rmtree(folder / "data")
    shutil.copytree(other_data, folder / "data")
    return folder / "run", config, folder / "data"


def refusal(weights):
    sentence = rf"data in .* another tokenizer \(.*{weights}.*\([0-9a-f]+"
    return pytest.raises(UserError, match=sentence)


def test_resume_with_other_tokenizer_is_refused(replaced):
    workdir, config, _ = replaced
    with refusal("run/checkpoints"):
        train(config, workdir)


def test_extension_with_other_tokenizer_is_refused(replaced, tiny, tmp_path):
    workdir, _, folder = replaced
    changed = (f"data.sources={folder}", "model.vocab_size=400", f"train.init_from={workdir}")
    with refusal(workdir.name):
        train(tiny(*changed), tmp_path)


def test_moved_run_finds_its_own_tokenizer(replaced, data, tmp_path):
    expected = load_tokenizer(data / "tokenizer").fingerprint()
    shutil.copytree(replaced[0], tmp_path / "moved")
    for path in (tmp_path / "moved", tmp_path / "moved" / "checkpoints" / "1"):
        assert load_run_tokenizer(open_run(RunSpec(path))).fingerprint() == expected
    shutil.rmtree(tmp_path / "moved" / "tokenizer")
    with pytest.raises(UserError, match=r"tokenizer in .*data/tokenizer is not that of .*moved"):
        load_run_tokenizer(open_run(RunSpec(tmp_path / "moved")))
    copy_tokenizer(replaced[2] / "tokenizer", tmp_path / "moved" / "tokenizer")
    with pytest.raises(UserError, match=r"tokenizer in .*moved/tokenizer is not that of"):
        load_run_tokenizer(open_run(RunSpec(tmp_path / "moved")))
    copy_tokenizer(data / "tokenizer", tmp_path / "moved" / "tokenizer")
    assert load_run_tokenizer(open_run(RunSpec(tmp_path / "moved"))).fingerprint() == expected
    assert not list((tmp_path / "moved").glob("*.tmp"))


def test_evaluation_checks_tokenizer_of_weights_against_data(replaced):
    with pytest.raises(UserError, match=r"another tokenizer .* than those of the run run"):
        compare([RunSpec(replaced[0])])


def test_weights_from_custom_batches_accept_any_data(replaced, tiny, data, tmp_path):
    config = tiny("model.vocab_size=400")
    train(config, tmp_path / "first", batches=open_batches(config)[0], stop_after=1)
    assert saved_weights.load_tokenizer_fingerprint(tmp_path / "first") == ""
    own_tokenizer = tmp_path / "first" / "tokenizer"
    assert not own_tokenizer.exists()
    train(
        config, tmp_path / "first", stop_after=1
    )  # as for runs of versions that saved no tokenizer
    assert (
        load_tokenizer(own_tokenizer).fingerprint()
        == load_tokenizer(data / "tokenizer").fingerprint()
    )
    origin = f"train.init_from={tmp_path / 'first'}"
    extended = tiny(f"data.sources={replaced[2]}", "model.vocab_size=400", origin)
    assert train(extended, tmp_path / "second", stop_after=1).step == 1
    assert len(saved_weights.load_tokenizer_fingerprint(tmp_path / "second")) > 12
