"""Packs the newest weights of a run into a small folder: what experiments/books-1.7m was made with.

    python experiments/pack_weights.py RUN OUT

Weights are rounded to bfloat16 and stored in float32, so that the zeros compress: about two bytes a
weight. OUT is a work directory for all commands but `tttjax train`, with the tokenizer and without
optimizer state, metrics and paths of this machine.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from tttjax.config.build import replace_values
from tttjax.config.run_info import ENVIRONMENT
from tttjax.errors import UserError
from tttjax.io.atomic import atomic_folder
from tttjax.models.transformer import build_model
from tttjax.parallel.mesh import make_mesh
from tttjax.runs.run import RunSpec, open_run
from tttjax.runs.tokenizer import load_run_tokenizer
from tttjax.runs.write_run import write_run
from tttjax.training.step import weights_template


def pack(source: str, out: str) -> None:
    """Writes the folder `out`. Raises UserError if it is not empty or the run cannot be opened."""
    with atomic_folder(out, "OUT") as folder:
        run = open_run(RunSpec(source))
        mesh = make_mesh(devices=jax.devices()[:1])
        weights = run.weights(
            weights_template(build_model(run.config.model, run.config.inner), mesh)
        )
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), weights)
        names = tuple(Path(source).name for source in run.config.data.sources)
        config = replace_values(run.config, {"data.sources": names, "train.init_from": ""})
        write_run(
            folder,
            config,
            rounded,
            step=run.step or 0,
            origin={"kind": "trained with tttjax", "source": run.name, "license": "apache-2.0"},
            tokenizer=load_run_tokenizer(run, None),
        )
        (folder / ENVIRONMENT).unlink()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/pack_weights.py RUN OUT")
    try:
        pack(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
