"""One process of two that save and restore checkpoints, for `test_two_processes.py`.

python one_of_two_savers.py FOLDER PORT RANK

Writes what it observed to FOLDER/RANK.json.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tttjax.config.schema import TrainConfig
from tttjax.errors import UserError
from tttjax.parallel.distributed import start_distributed
from tttjax.training import checkpoint_integrity, checkpoints
from tttjax.training.save_schedule import SaveSchedule


def make_state(step: int):
    """A matrix with a half on each process, and a replicated scalar."""
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))
    values = {"params": {"w": step + np.arange(64.0, dtype=np.float32).reshape(8, 8)}}
    values["step"] = np.full((), step, np.int32)

    def put(x):
        sharding = NamedSharding(mesh, PartitionSpec("fsdp") if x.ndim else PartitionSpec())
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, values)


def restore(folder: Path) -> str:
    """What `restore` returns for a folder of this process: "step: its values", or the error."""
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(0)
    )
    try:
        saver = checkpoints.Checkpointer(folder)
        restored = saver.restore(target)
        saver.close()
    except UserError as error:
        return str(error)
    shard = restored.state["params"]["w"].addressable_shards[0]
    return f"{restored.step}: {int(np.asarray(shard.data)[0, 0])}"


def remove_newest(folder: Path) -> None:
    shutil.rmtree(folder / "2")


def truncate_newest(folder: Path) -> None:
    arrays = next((folder / "2" / "params" / "ocdbt.process_1" / "d").iterdir())
    arrays.write_bytes(arrays.read_bytes()[:-1])


def add_newer(folder: Path) -> None:
    shutil.copytree(folder / "2", folder / "3")


def main() -> None:
    folder, port, rank = Path(sys.argv[1]), *map(int, sys.argv[2:4])
    with start_distributed(f"localhost:{port}", rank, 2):
        run(folder, rank)


def run(folder: Path, rank: int) -> None:
    hashed, seen = [], {}
    original = checkpoint_integrity.file_checksums

    def recorded(path, names):
        hashed.extend(names)
        return original(path, names)

    checkpoint_integrity.file_checksums = recorded
    shared = folder / "shared"
    saver = checkpoints.Checkpointer(shared)
    for step in (1, 2):
        hashed.clear()
        saver.save(step, make_state(step))
        saver.wait()
    saver.close()
    seen["hashed to save"] = list(hashed)
    hashed.clear()
    seen["shared"] = restore(shared)
    seen["hashed to restore"] = list(hashed)

    # Process 1 has a disk of its own, with a copy that differs.
    for change in (remove_newest, truncate_newest, add_newer):
        mine = folder / change.__name__ if rank else shared
        if rank:
            shutil.copytree(shared, mine)
            change(mine)
        multihost_utils.sync_global_devices(change.__name__)
        seen[change.__name__] = restore(mine)

    # Process 1's clock says that a checkpoint is due after every step.
    now = iter(range(0, 10**6, 10**4 if rank else 20))
    settings = dataclasses.replace(TrainConfig(), checkpoint_minutes=1.0)
    schedule = SaveSchedule(settings, 0, lambda: next(now))
    seen["due"] = [step for step in range(1, 7) if schedule.is_due(step)]

    (folder / f"{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
