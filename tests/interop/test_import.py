"""`tttjax import` of official checkpoints: the imported run, and errors."""

import json

import jax
import numpy as np
import pytest
from helpers.official_files import official_arrays, official_config, write_official

from tttjax.cli import main
from tttjax.config import read_config, to_dict
from tttjax.data.tokenizers.base import ByteTokenizer, load_tokenizer
from tttjax.errors import UserError
from tttjax.interop import transfer
from tttjax.interop.official.import_ import open_official
from tttjax.interop.official.names import TOP_LEVEL_NAMES, from_official
from tttjax.interop.transfer import import_run
from tttjax.io.locks import hold
from tttjax.models.transformer import build_model
from tttjax.parallel.mesh import make_mesh
from tttjax.runs import write_run
from tttjax.runs.origin import ORIGIN
from tttjax.runs.run import RunSpec, open_run
from tttjax.training import checkpoints, saved_weights
from tttjax.training.step import make_trainer, weights_template

pytestmark = pytest.mark.slow

CONFIG = official_config()
OVERRIDES = (
    *("--config.model.window_size=16", "--config.inner.chunk_size=8", "--config.train.seq_len=32"),
    *("--config.model.rope_theta=1e4", "--config.model.compute_dtype=float32"),
)


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    return write_official(tmp_path_factory.mktemp("official"), official_arrays(CONFIG))


@pytest.fixture(scope="module")
def imported(step, tmp_path_factory):
    """A run that the command imported with a tokenizer."""
    folder = tmp_path_factory.mktemp("imported")
    ByteTokenizer().save(folder / "bytes")
    words = ["import", str(step.parent), "--workdir", str(folder / "run")]
    assert main.main([*words, f"--tokenizer={folder / 'bytes'}", *OVERRIDES]) == 0
    return folder / "run"


def test_the_run_holds_weights_configuration_origin_and_tokenizer(imported, step):
    run = open_run(RunSpec(imported))
    assert (run.step, run.name) == (3, "run")
    model = build_model(run.config.model, run.config.inner)
    assert run.config.model == official_config(rope_theta=1e4).model
    params = run.weights(weights_template(model, make_mesh()))
    expected = from_official(official_arrays(CONFIG), model)
    for actual, expected_leaf in zip(
        jax.tree.leaves(params), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(actual, expected_leaf)
    origin = json.loads((imported / ORIGIN).read_text())
    assert origin["source"] == str(step)
    assert "model.rope_theta" not in origin["assumed"]
    assert "inner.lr" in origin["assumed"]
    assert origin["license"] == "none found"
    assert "carry no licence that we found" in origin["terms"]
    assert load_tokenizer(imported / "tokenizer").fingerprint() == run.tokenizer
    # A single checkpoint can be opened, too.
    assert open_run(RunSpec(imported / "checkpoints" / "3")).config == run.config


def test_the_command_reports_assumptions_and_deviations(step, tmp_path, capsys):
    words = ["import", str(step), "--workdir", str(tmp_path / "run"), *OVERRIDES]
    assert main.main(words) == 0
    output = capsys.readouterr().out
    assert "official TTT-E2E checkpoint, step 3, 20 arrays" in output
    assert "4 blocks of width 8, 2 heads, MLPs of 12, fast MLPs in the last 2" in output
    assert (
        "assumed, because the weights do not determine them: inner.lr=1.0, inner.clip=1.0\n"
        in output
    )
    assert "without a tokenizer" in output
    assert "verified the run: logits of 64 random tokens differ by at most 0\n" in output
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_imported_run_generates(imported, capsys):
    words = ["generate", str(imported), "--prompt=abc", "--max-tokens=2", "--json"]
    assert main.main(words) == 0
    assert len(json.loads(capsys.readouterr().out)[0]["tokens"]) == 2


def test_imported_run_can_be_extended_but_not_resumed(imported):
    trainer = make_trainer(read_config(imported), make_mesh())
    saved_weights.restore_params(imported, trainer.abstract_state.params)
    saver = checkpoints.Checkpointer(imported / checkpoints.CHECKPOINT_DIR)
    with pytest.raises(UserError, match=rf"weights alone.*train.init_from={imported}$"):
        saver.restore(trainer.abstract_state)
    saver.close()


def test_a_configuration_file_must_fit(step, tmp_path, capsys):
    file = tmp_path / "mine.py"
    fields = {**to_dict(CONFIG)["model"], "window_size": 16}
    file.write_text(
        "from tttjax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        f"    config.model.update({fields})\n"
        f"    config.inner.chunk_size = 8\n"
        "    return config\n"
    )
    source = open_official(str(step), config=str(file), log=lambda line: None)
    assert source.config.model == CONFIG.model
    words = ["import", str(step), f"--workdir={tmp_path / 'run'}", f"--config={file}"]
    assert main.main([*words, "--config.model.mlp_dim=10", "--config.model.post_norm=false"]) == 2
    err = capsys.readouterr().err
    assert "feed_forward.w1.weight has shape (4, 8, 12), not (4, 8, 10)" in err
    assert "unexpected language_model.model.h.blocks.ffn_post_norm.weight" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("absent", "There is no folder"),
        ("file", "is a file; give the folder"),
        ("empty", "is neither .*official TTT-E2E code.*supported Hugging Face models.*llama"),
        ("run", "is a tttjax run already"),
        ("s3://bucket/x", "is neither a folder nor a path like gs://"),
        ("begun", "is still being written"),
    ],
)
def test_invalid_sources_are_one_sentence(source, sentence, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "begun" / "4.orbax-checkpoint-tmp-0").mkdir(parents=True)
    before = sorted(tmp_path.iterdir())
    path = source if "://" in source else str(tmp_path / source)
    assert main.main(["import", path, f"--workdir={tmp_path / 'new'}"]) == 2
    err = capsys.readouterr().err
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(err)
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("workdir", "sentence"),
    [("full", "is not empty"), ("full/file", "is a file"), ("full/file/x", "cannot be a folder")],
)
def test_a_work_directory_in_use_is_refused(step, workdir, sentence, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert main.main(["import", str(step), f"--workdir={tmp_path / workdir}"]) == 2
    assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]


def test_an_import_of_nan_leaves_nothing_behind(tmp_path):
    arrays = official_arrays(CONFIG)
    arrays[TOP_LEVEL_NAMES["final_norm/weight"]][:] = np.nan
    path = write_official(tmp_path / "official", arrays)
    source = open_official(str(path), overrides=OVERRIDES, log=lambda line: None)
    with pytest.raises(UserError, match="are not finite"):
        import_run(source, tmp_path / "deep" / "run", log=lambda line: None)
    assert not (tmp_path / "deep").exists()


def test_a_concurrent_import_is_refused(step, tmp_path, capsys):
    with hold(tmp_path / "run", beside=True):
        assert main.main(["import", str(step), f"--workdir={tmp_path / 'run'}"]) == 2
    assert "run is being written by another command" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_arrays_that_are_no_floats_are_refused(tmp_path):
    arrays = official_arrays(CONFIG)
    name = TOP_LEVEL_NAMES["final_norm/weight"]
    arrays[name] = arrays[name].astype(np.int32)
    path = write_official(tmp_path / "official", arrays)
    with pytest.raises(UserError, match=f"{name} holds int32, not floating-point numbers"):
        open_official(str(path), overrides=OVERRIDES, log=lambda line: None)


def test_a_wrongly_written_run_is_removed(step, tmp_path, monkeypatch):
    """The run is written with other weights than those that were read."""

    def wrong(folder, config, params, **options):
        write_run.write_run(folder, config, jax.tree.map(lambda x: 2 * x, params), **options)

    monkeypatch.setattr(transfer, "write_run", wrong)
    source = open_official(str(step), overrides=OVERRIDES, log=lambda line: None)
    with pytest.raises(UserError, match="computes other logits"):
        import_run(source, tmp_path / "run", log=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_must_exist_and_fit(step, tmp_path):
    with pytest.raises(UserError, match="there is no tokenizer at"):
        open_official(str(step), overrides=OVERRIDES, tokenizer=str(tmp_path), log=print)
    ByteTokenizer().save(tmp_path)
    small = write_official(tmp_path / "small", official_arrays(official_config(vocab_size=16)))
    with pytest.raises(UserError, match="has 264 tokens, more than the 16"):
        open_official(str(small), overrides=OVERRIDES, tokenizer=str(tmp_path), log=print)
