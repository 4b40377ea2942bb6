"""One process of a two-process run, for `test_two_processes.py`; rank 0 saves the weights.

python one_of_two.py FOLDER PORT RANK COUNT     (COUNT 1: a single process with all devices)
"""

import sys
from pathlib import Path

import jax
import numpy as np

from tttjax.config import load_config
from tttjax.parallel.distributed import start_distributed
from tttjax.training.loop import train

TINY = Path(__file__).parent / "tiny_run.py"


def main() -> None:
    folder, port, rank, count = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    if count > 1:
        start_distributed(f"localhost:{port}", rank, count)
    float64 = ("model.param_dtype", "model.compute_dtype", "inner.fast_dtype")
    overrides = [f"{name}=float64" for name in float64]
    overrides += [f"data.sources={folder / 'data'}", "mesh.fsdp=2"]
    config = load_config(f"{TINY}:static", overrides)
    workdir = folder / f"of_{count}"
    train(config, workdir, stop_after=2)
    result = train(config, workdir, stop_after=5)  # after restoring a checkpoint
    assert jax.device_count() == 2
    assert jax.process_count() == count
    replicated = jax.jit(
        lambda params: params,
        out_shardings=jax.sharding.NamedSharding(
            jax.tree.leaves(result.state.params)[0].sharding.mesh, jax.sharding.PartitionSpec()
        ),
    )(result.state.params)
    if rank == 0:
        arrays = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(replicated))}
        np.savez(folder / f"of_{count}.npz", **arrays)


if __name__ == "__main__":
    main()
