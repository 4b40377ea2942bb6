"""Kills a run with SIGKILL at random moments and compares it with one that was left alone.

    python tests/training/kill_and_resume.py [--kills 20] [--steps 4000] [--arg ttt_e2e] [--seed 0]

Prepares a small data set, trains `tests/helpers/tiny_run.py` once without a stop, and once more
with every start but the last killed after a random time (some while JAX compiles, some while a
checkpoint is being written: one is due every few steps). At the end the loss streams and the train
states must be equal bit for bit. Prints what happened at every kill; exit code 1 if they differ.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from helpers.paths import TINY

from tttjax.data.preparation import prepare
from tttjax.training import checkpoint_format, checkpoints
from tttjax.training.metrics import deterministic_records, read_records


def start(workdir: Path, data: Path, options: argparse.Namespace) -> subprocess.Popen:
    """One start of the training command; output goes to `workdir`.log."""
    command = [sys.executable, "-m", "tttjax", "train", f"--config={TINY}:{options.arg}"]
    command += [f"--workdir={workdir}", f"--config.data.sources={data}"]
    command += [f"--config.train.steps={options.steps}", "--config.train.log_every=1000"]
    command += [f"--config.train.checkpoint_every={options.checkpoint_every}"]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # So that restarts spend their time training, and kills fall there.
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with workdir.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def finish(workdir: Path, process: subprocess.Popen) -> None:
    """Waits for a start that is not killed."""
    if process.wait() != 0:
        raise SystemExit(f"a start failed:\n{workdir.with_suffix('.log').read_text()[-3000:]}")


def kill_often(workdir: Path, data: Path, options: argparse.Namespace, whole: float) -> None:
    """Kills `options.kills` starts, each some time after it began to train."""
    chance = random.Random(options.seed)
    per_start = whole / (options.kills + 1)
    for number in range(1, options.kills + 1):
        before = len(read_records(workdir))
        process = start(workdir, data, options)
        if number % 5:  # every fifth kill falls at a random moment of the start-up instead
            while len(read_records(workdir)) in (0, before) and process.poll() is None:
                time.sleep(0.02)
            delay = chance.uniform(0, 2 * per_start)
        else:
            delay = chance.uniform(0, 6)
        time.sleep(delay)
        process.kill()
        code = process.wait()
        folder = workdir / checkpoints.CHECKPOINT_DIR
        saved = [
            path.name
            for path in checkpoint_format.completed_checkpoints(checkpoints.epath.Path(folder))
        ]
        torn = checkpoint_format.unfinished_steps(checkpoints.epath.Path(folder))
        print(
            f"kill {number:2}: exit code {code}, {len(read_records(workdir))} steps recorded, "
            f"checkpoints {', '.join(saved) or 'none'}"
            + (f", broken off while saving {torn}" if torn else ""),
            flush=True,
        )


def train_state(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint by name."""
    arrays = {}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for item in checkpoint_format.ARRAY_ITEMS:
        path = checkpoints.find_checkpoint(workdir) / item
        saved = ocp.PyTreeCheckpointHandler().metadata(path).tree
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), saved
        )
        arrays |= checkpoint_format.named_leaves(
            {item: checkpoint_format.read_item(path, template)}
        )
    return {name: np.asarray(array) for name, array in arrays.items()}


def same_state(first: Path, second: Path) -> bool:
    """Whether the newest checkpoints hold the same train state, bit for bit."""
    a, b = train_state(first), train_state(second)
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--checkpoint-every", type=int, default=25)
    parser.add_argument("--arg", default="static", choices=("static", "ttt_e2e"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        library = Path(os.__file__).parent
        texts = [str(library / name) for name in ("argparse.py", "ast.py", "shutil.py")]
        prepare(texts, root / "data", num_workers=1)

        print("training without a stop", flush=True)
        finish(root / "whole", start(root / "whole", root / "data", options))
        seconds = sum(r["time"]["seconds"] for r in read_records(root / "whole"))
        print(f"{options.steps} steps in {seconds:.1f} s; now with {options.kills} kills")
        kill_often(root / "killed", root / "data", options, seconds)
        finish(root / "killed", start(root / "killed", root / "data", options))

        streams = deterministic_records(root / "whole"), deterministic_records(root / "killed")
        equal = streams[0] == streams[1] and len(streams[0]) == options.steps
        states = same_state(root / "whole", root / "killed")
        log = (root / "killed.log").read_text()
        print(
            f"{options.kills} kills, {log.count('continuing after')} resumes, "
            f"{log.count('never completed')} checkpoints broken off: loss streams of "
            f"{options.steps} steps {'equal bit for bit' if equal else 'DIFFER'}, "
            f"final states {'equal' if states else 'DIFFER'}"
        )
        return 0 if equal and states else 1


if __name__ == "__main__":
    raise SystemExit(main())
