"""Fixtures: a tiny prepared data set, and work directories with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tttjax.config import (
    Config,
    DataConfig,
    EvalConfig,
    InnerConfig,
    ModelConfig,
    TrainConfig,
    write_run_info,
)
from tttjax.data.preparation import prepare
from tttjax.models.transformer import build_model
from tttjax.training import checkpoints

WINDOW, CHUNK, STEPS = 8, 8, 3
LENGTHS = (8, 32)


def prepare_texts(folder, sizes):
    """Prepares documents of the given sizes in characters; the last is the training split."""
    rng = np.random.default_rng(0)
    texts = folder / "texts"
    texts.mkdir()
    rows = ["document\tsplit"]
    for i, size in enumerate(sizes):
        line = "".join(rng.choice(list("abcdé "), 23)) + "\n"
        (texts / f"{i}.txt").write_text((line * 40)[:size], encoding="utf-8")
        rows.append(f"{i}.txt\t{'train' if i == len(sizes) - 1 else 'val'}")
    splits = folder / "splits.tsv"
    splits.write_text("\n".join(rows) + "\n")
    return prepare([texts], folder / "data", split_manifest=str(splits), num_workers=0)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data set of bytes with five held-out documents of different lengths."""
    return prepare_texts(tmp_path_factory.mktemp("data"), (300, 200, 140, 90, 60, 500)).folder


@pytest.fixture(scope="session")
def make_run(data, tmp_path_factory):
    """make_run(name, seed=, step=, seq_len=, init_from=, model fields) -> its work directory."""
    folder = tmp_path_factory.mktemp("runs")

    def make(name, seed=0, step=STEPS, seq_len=32, init_from="", tokenizer="", **model):
        fields = {"embed_dim": 8, "num_layers": 1, "num_heads": 1, "mlp_dim": 8, "init_std": 0.3}
        config = Config(
            model=ModelConfig(vocab_size=264, window_size=WINDOW, **{**fields, **model}),
            inner=InnerConfig(chunk_size=CHUNK),
            train=TrainConfig(
                steps=STEPS, batch_size=2, seq_len=seq_len, seed=seed, init_from=str(init_from)
            ),
            data=DataConfig(sources=(str(data),)),
            eval=EvalConfig(context_lengths=LENGTHS, num_sequences=6, batch_size=8, bins=6),
        )
        workdir = folder / name
        write_run_info(workdir, config)
        rng = np.random.default_rng(seed)
        params = jax.tree.map(
            lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape, np.float32)),
            build_model(config.model, config.inner).abstract_params(),
        )
        checkpointer = checkpoints.Checkpointer(workdir / checkpoints.CHECKPOINT_DIR)
        checkpointer.save(step, {"params": params, "step": jnp.int32(step)}, tokenizer=tokenizer)
        checkpointer.close()
        record = '{"step": %d, "loss": 1.0, "time": {"seconds": 2.0, "tokens_per_second": 32.0}}\n'
        (workdir / "metrics.jsonl").write_text("".join(record % (i + 1) for i in range(step)))
        return workdir

    return make
