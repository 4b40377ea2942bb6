"""Kills a run with SIGKILL at random times and compares it with an uninterrupted one.

    python tests/training/kill_and_resume.py [--kills 20] [--steps 4000] [--arg ttt_e2e] [--seed 0]

Prepares a small data set and trains `tests/helpers/tiny_run.py` twice: without a stop, and with
every start but the last killed after a random time (some while JAX compiles, some while a
checkpoint is being written). In the end metrics records and train states must be bit-identical.
The starts that are killed are processes; those that end run in this one.
Prints a line for every kill; exit code 1 if they differ.
"""

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of this process too, before JAX is imported

import jax
import numpy as np
import orbax.checkpoint as ocp

from tttjax.cli import main as cli
from tttjax.data.preparation import prepare
from tttjax.training import checkpoint_format, checkpoints, saved_weights
from tttjax.training.metrics_file import deterministic_records, read_records

TINY = Path(__file__).parents[1] / "helpers" / "tiny_run.py"


def command(workdir: Path, data: Path, options: argparse.Namespace) -> list[str]:
    """The words after `tttjax` of a start."""
    return [
        *("train", f"--config={TINY}:{options.arg}", f"--workdir={workdir}"),
        *(f"--config.data.sources={data}", f"--config.train.steps={options.steps}"),
        "--config.train.log_every=1000",
        f"--config.train.checkpoint_every={options.checkpoint_every}",
    ]


def start(workdir: Path, data: Path, options: argparse.Namespace) -> subprocess.Popen:
    """One start of the training command; output goes to `workdir`.log."""
    words = [sys.executable, "-m", "tttjax", *command(workdir, data, options)]
    environment = {
        # Restarts then spend their time training, where the kills should fall.
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **os.environ,
    }
    with workdir.with_suffix(".log").open("a") as log:
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)


def complete(workdir: Path, data: Path, options: argparse.Namespace) -> None:
    """A start that is not killed, in this process."""
    path = workdir.with_suffix(".log")
    with path.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        code = cli.main(command(workdir, data, options))
    if code != 0:
        raise SystemExit(f"a start failed:\n{path.read_text()[-3000:]}")


def kill_often(workdir: Path, data: Path, options: argparse.Namespace, seconds: float) -> None:
    """Kills `options.kills` starts at random times. seconds: of the uninterrupted run."""
    rng = random.Random(options.seed)
    per_start = seconds / (options.kills + 1)
    for number in range(1, options.kills + 1):
        before = len(read_records(workdir))
        process = start(workdir, data, options)
        if number % 5:  # every fifth kill falls into the start-up instead
            while len(read_records(workdir)) in (0, before) and process.poll() is None:
                time.sleep(0.02)
            delay = rng.uniform(0, 2 * per_start)
        else:
            delay = rng.uniform(0, 6)
        time.sleep(delay)
        process.kill()
        code = process.wait()
        folder = workdir / checkpoints.CHECKPOINT_DIR
        saved = [
            path.name
            for path in checkpoint_format.completed_checkpoints(checkpoints.epath.Path(folder))
        ]
        incomplete = checkpoint_format.unfinished_steps(checkpoints.epath.Path(folder))
        print(
            f"kill {number:2}: exit code {code}, {len(read_records(workdir))} steps recorded, "
            f"checkpoints {', '.join(saved) or 'none'}"
            + (f", incomplete {incomplete}" if incomplete else ""),
            flush=True,
        )


def train_state(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint by name."""
    arrays = {}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for item in checkpoint_format.ARRAY_ITEMS:
        path = saved_weights.find_checkpoint(workdir) / item
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
        prepare(texts, root / "data", num_workers=0)

        print("training without a stop", flush=True)
        complete(root / "uninterrupted", root / "data", options)
        # Without the first step, which compiles.
        seconds = sum(r["time"]["seconds"] for r in read_records(root / "uninterrupted")[1:])
        print(f"{options.steps} steps in {seconds:.1f} s; now with {options.kills} kills")
        kill_often(root / "killed", root / "data", options, seconds)
        complete(root / "killed", root / "data", options)

        records = [deterministic_records(root / name) for name in ("uninterrupted", "killed")]
        equal = records[0] == records[1] and len(records[0]) == options.steps
        states = same_state(root / "uninterrupted", root / "killed")
        log = (root / "killed.log").read_text()
        print(
            f"{options.kills} kills, {log.count('continuing after')} resumes, "
            f"{log.count('never completed')} incomplete checkpoints: records of "
            f"{options.steps} steps {'bit-identical' if equal else 'DIFFER'}, "
            f"final states {'bit-identical' if states else 'DIFFER'}"
        )
        return 0 if equal and states else 1


if __name__ == "__main__":
    raise SystemExit(main())
