"""One process of a two-process run, for `test_two_processes.py`; rank 0 saves the weights.

python one_of_two.py FOLDER PORT RANK
"""

import functools
import sys
from pathlib import Path

import jax
import numpy as np

from tttjax.config import load_config
from tttjax.parallel.distributed import start_distributed
from tttjax.training import loop, train_run

TINY = Path(__file__).parent / "tiny_run.py"


def make_config(folder: Path):
    float64 = ("model.param_dtype", "model.compute_dtype", "inner.fast_dtype")
    overrides = [f"{name}=float64" for name in float64]
    overrides += ["model.num_layers=1", "model.qk_norm=False", "model.post_norm=False"]
    overrides += [f"data.sources={folder / 'data'}", "mesh.fsdp=2"]
    return load_config(f"{TINY}:static", overrides)


def main() -> None:
    folder, port, rank = Path(sys.argv[1]), *map(int, sys.argv[2:4])
    with start_distributed(f"localhost:{port}", rank, 2):
        run(folder, rank)


def run(folder: Path, rank: int) -> None:
    # The second start need not compile again.
    train_run.make_trainer = functools.cache(train_run.make_trainer)
    config, workdir = make_config(folder), folder / "of_two"
    loop.train(config, workdir, stop_after=2)
    result = loop.train(config, workdir, stop_after=5)  # after restoring a checkpoint
    assert jax.device_count() == jax.process_count() == 2
    replicated = jax.jit(
        lambda params: params,
        out_shardings=jax.sharding.NamedSharding(
            jax.tree.leaves(result.state.params)[0].sharding.mesh, jax.sharding.PartitionSpec()
        ),
    )(result.state.params)
    if rank == 0:
        arrays = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(replicated))}
        np.savez(folder / "of_two.npz", **arrays)


if __name__ == "__main__":
    main()
