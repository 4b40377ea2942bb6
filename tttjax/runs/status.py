"""The state of a run, from the files of its work directory alone, whether it lives or not."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from etils import epath

from tttjax.config.run_info import CONFIG, read_config
from tttjax.errors import UserError
from tttjax.exit_codes import DONE, FAILED, INTERRUPTED, LOST, SAVED, USER_ERROR
from tttjax.io.locks import living_holder
from tttjax.io.paths import storage_path
from tttjax.training.checkpoint_format import completed_checkpoints
from tttjax.training.checkpoint_integrity import CHECKSUMS
from tttjax.training.checkpoints import CHECKPOINT_DIR, absolute
from tttjax.training.failed_starts import FAILED_STARTS
from tttjax.training.ledger import RunStart, goodput, read_starts
from tttjax.training.metrics_file import last_record
from tttjax.training.start_account import LOOP
from tttjax.training.watchdog import STACKS_DIR

ENDS = {
    DONE: "done",
    SAVED: "stopped, saved",
    LOST: "lost a process, or hung",
    USER_ERROR: "user error",
    INTERRUPTED: "interrupted, not saved",
    FAILED: "a bug, or a broken machine",
}


@dataclass(frozen=True)
class RunStatus:
    """What the files of a run say.

    state: "running", "finished", "stopped", "failed", "killed", or "not running" for a run of an
    earlier version. holder: the process that runs it. phase: "start", "steps", "save", ... of one
    that runs. quiet_seconds: since its last sign of life.
    step, loss: of the last record. tokens_per_second, mfu, eta_seconds: at the last speed of the
    newest start. checkpoint_step, checkpoint_seconds: the newest checkpoint and its age. starts:
    as in their files. goodput: seconds by their use. hangs: stacks that were written, by time.
    """

    workdir: str
    state: str
    holder: str | None
    phase: str | None
    quiet_seconds: float | None
    step: int
    steps: int | None
    loss: float | str | None
    tokens_per_second: float | None
    mfu: float | None
    eta_seconds: float | None
    checkpoint_step: int | None
    checkpoint_seconds: float | None
    starts: Sequence[RunStart]
    goodput: dict[str, float]
    lost_steps: int
    failed_starts: int
    hangs: Sequence[str]

    @property
    def hosts(self) -> list[dict[str, Any]]:
        """Names, devices and last figures of the newest start's hosts, by process."""
        return self.starts[-1].hosts if self.starts else []

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


def run_status(workdir: str | os.PathLike) -> RunStatus:
    """Reads a run's files. Raises UserError if the folder is no run, or a file is damaged."""
    folder, now = storage_path(workdir), time.time()
    starts = read_starts(folder)
    counted = folder / FAILED_STARTS
    if not (starts or counted.exists() or (folder / CONFIG).exists()):
        raise UserError(
            f"{folder} is no run: give the --workdir of `tttjax train`, or `tttjax runs DIR` to "
            "list the runs below a folder"
        )
    config, record, holder = read_config(folder), last_record(folder), living_holder(folder)
    last, step = (starts[-1] if starts else None), record.get("step", 0)
    steps = last.steps if last else config.train.steps if config else None
    rates, seconds = record.get("time", {}), _step_seconds(last, record)
    scale = rates["seconds"] / seconds if rates and seconds else 1.0
    checkpoints = completed_checkpoints(absolute(folder / CHECKPOINT_DIR))
    return RunStatus(
        workdir=str(workdir),
        state="running" if holder else _state(last, step, steps),
        holder=holder,
        phase=_phase(last) if holder and last else None,
        quiet_seconds=max(0.0, now - last.ended) if last else None,
        step=step,
        steps=steps,
        loss=record.get("loss"),
        tokens_per_second=scale * rates["tokens_per_second"] if rates else None,
        mfu=scale * rates["mfu"] if "mfu" in rates else None,
        eta_seconds=(steps - step) * seconds if holder and steps and seconds else None,
        checkpoint_step=int(checkpoints[-1].name) if checkpoints else None,
        checkpoint_seconds=_age(checkpoints[-1], now) if checkpoints else None,
        starts=starts,
        goodput=goodput(starts),
        lost_steps=sum(start.lost_steps for start in starts),
        failed_starts=_failed_starts(counted, step, bool(holder)),
        hangs=sorted({path.name.partition("-process-")[0] for path in _files(folder / STACKS_DIR)}),
    )


def describe_end(start: RunStart, is_running: bool) -> str:
    """How a start ended, and its exit code where that is known. is_running: it has not."""
    if is_running:
        return f"running ({_phase(start)})"
    if start.code is not None:
        return f"{ENDS.get(start.code, 'ended')} ({start.code})"
    return f"failed ({start.error})" if start.error else "killed"


def _phase(start: RunStart) -> str:
    return "steps" if start.phase in LOOP else start.phase


def _state(last: RunStart | None, step: int, steps: int | None) -> str:
    """Of a run that no process holds."""
    if last is None:
        return "finished" if steps is not None and step >= steps else "not running"
    if last.code is None:
        return "failed" if last.error else "killed"
    return {DONE: "finished", SAVED: "stopped", INTERRUPTED: "stopped"}.get(last.code, "failed")


def _step_seconds(last: RunStart | None, record: dict[str, Any]) -> float | None:
    """Seconds per step: process 0's last mean, or that of the last record."""
    figures = last.hosts[0] if last and last.hosts else {}
    return figures.get("step_seconds") or record.get("time", {}).get("seconds")


def _failed_starts(path: Path, step: int, is_running: bool) -> int:
    """Those in a row that ended without a new step; a start is counted when it begins."""
    counted = json.loads(path.read_text()) if path.exists() else {"starts": 0, "last_step": 0}
    return max(0, counted["starts"] - is_running) if step <= counted["last_step"] else 0


def _age(checkpoint: epath.Path, now: float) -> float:
    """Seconds since it was sealed; an earlier version's has no seal."""
    seal = checkpoint / CHECKSUMS
    return now - (seal if seal.exists() else checkpoint).stat().mtime


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
