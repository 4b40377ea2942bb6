"""The ledger of a run: a small file per start, which says where its time went and how it ended.

Process 0 writes `starts/NUMBER.json` in the work directory, whole, every few seconds and at the
end, so that a start that was killed is known up to its last seconds. All times of a run follow:
those of its starts and, between them, "down" (`goodput`).
"""

import contextlib
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax

from tttjax.errors import UserError, is_out_of_memory
from tttjax.exit_codes import FAILED, INTERRUPTED, USER_ERROR
from tttjax.io.atomic import atomic_write
from tttjax.io.locks import Lock
from tttjax.io.paths import if_reachable
from tttjax.runtime.ending import at_sudden_end
from tttjax.training.hosts import Hosts
from tttjax.training.metrics_file import last_record

STARTS = "starts"
WRITE_SECONDS = 5.0
USES = ("start", "compile", "restore", "input", "steps", "lost", "save", "evaluate", "other")


@dataclass(frozen=True)
class RunStart:
    """One start of a run, as its file says.

    began: Unix time. seconds: until the file was written. phase: at that time. recorded_before:
    the last step in the metrics when it began. furthest: the last one of all earlier starts.
    steps_before, step: those done before it and in the end; None and 0 before it came to training.
    steps: those of the whole run. spent: seconds by USES. hosts: names, devices and last figures.
    code: exit code; None while it runs, if it was killed, or where only the error is known.
    """

    number: int
    began: float
    seconds: float
    phase: str
    recorded_before: int
    furthest: int
    steps_before: int | None
    step: int
    steps: int
    spent: dict[str, float]
    hosts: list[dict[str, Any]] = field(default_factory=list)
    code: int | None = None
    error: str = ""

    @property
    def ended(self) -> float:
        """Unix time of its last sign of life."""
        return self.began + self.seconds

    @property
    def lost_steps(self) -> int:
        """Steps of earlier starts that this one computed again."""
        if self.steps_before is None:
            return 0
        return max(0, min(self.step, self.furthest) - self.steps_before)


class Ledger:
    """A context for a start, which writes its file; does nothing in processes but the first.

    code: the exit code to be written at an end without an exception.
    """

    def __init__(self, workdir: Path, lock: Lock, steps: int, hosts: Hosts):
        self._folder, self._lock, self._steps = workdir / STARTS, lock, steps
        self._hosts, self._account = hosts, hosts.account
        self._is_writer = jax.process_index() == 0
        self._writing, self._closed = threading.Lock(), threading.Event()
        self._exit_stack = contextlib.ExitStack()
        self.code: int | None = None
        if self._is_writer:
            earlier = _newest(self._folder)
            self._number = earlier.number + 1 if earlier else 1
            self._path = self._folder / f"{self._number:04}.json"
            self._recorded = last_record(workdir).get("step", 0)
            self._account.furthest = max(self._recorded, earlier.furthest if earlier else 0)

    def __enter__(self) -> "Ledger":
        if self._is_writer:
            self._exit_stack.enter_context(at_sudden_end(self._end))
            self._write()
            threading.Thread(target=self._write_often, name="ledger", daemon=True).start()
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        self._exit_stack.close()
        if self._is_writer:
            self._end(self.code if error is None else _exit_code(error), error)

    def _write_often(self) -> None:
        while not self._closed.wait(WRITE_SECONDS):
            self._write()

    def _end(self, code: int | None, error: BaseException | None = None) -> None:
        """Writes how this start ended. One that the user has to mend leaves none without a step."""
        self._closed.set()
        has_steps = self._account.step > (self._account.steps_before or 0)
        if code in (USER_ERROR, INTERRUPTED) and not has_steps:
            self._remove()
        else:
            self._write(code=code, error="" if error is None else type(error).__name__)

    def _write(self, **end: Any) -> None:
        # A disk or bucket that is full, or away for some time, is for what needs it to report.
        with self._writing, contextlib.suppress(OSError, UserError):
            if self._lock.lost.is_set() or (self._closed.is_set() and not end):
                return
            self._folder.mkdir(exist_ok=True)
            with atomic_write(self._path) as temporary:
                temporary.write_text(json.dumps(asdict(self._start(**end)), indent=1) + "\n")

    def _remove(self) -> None:
        with self._writing, if_reachable(self._folder):
            if not self._lock.lost.is_set():
                self._path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # files of other starts
                    self._folder.rmdir()

    def _start(self, **end: Any) -> RunStart:
        account, figures = self._account, self._hosts.figures()
        spent = account.spent(has_ended=bool(end))
        # The other hosts wait in their steps while one waits for input.
        loop = spent["input"] + spent["steps"]
        others = [figure for i, figure in enumerate(figures) if i != self._hosts.me]
        shares = [figure.input_of_start for figure in others if figure]
        spent["input"] = max([spent["input"], *(share * loop for share in shares)])
        spent["steps"] = loop - spent["input"]
        return RunStart(
            number=self._number,
            began=account.began,
            seconds=sum(spent.values()),
            phase=account.current,
            recorded_before=self._recorded,
            furthest=account.furthest,
            steps_before=account.steps_before,
            step=account.step,
            steps=self._steps,
            spent=spent,
            hosts=[
                asdict(host) | (asdict(figure) if figure else {})
                for host, figure in zip(self._hosts.hosts, figures, strict=False)
            ],
            **end,
        )


def _exit_code(error: BaseException) -> int | None:
    """The code with which a command ends; None where that depends on the error's text."""
    if isinstance(error, UserError) or is_out_of_memory(error):
        return USER_ERROR
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED
    return None if isinstance(error, OSError) else FAILED


# Reading -----------------------------------------------------------------------------------------


def read_starts(workdir: Path) -> list[RunStart]:
    """All starts, in order; [] for a run of an earlier version. Raises UserError for damage.

    What a killed one had recorded after its file was written is known from the next one, or from
    the metrics.
    """
    starts = [_read(path) for path in _files(workdir / STARTS)]
    after = [start.recorded_before for start in starts] + [last_record(workdir).get("step", 0)]
    return [
        start if start.steps_before is None else replace(start, step=max(start.step, step))
        for start, step in zip(starts, after[1:], strict=True)
    ]


def goodput(starts: Sequence[RunStart]) -> dict[str, float]:
    """Seconds by USES and "down", from the beginning of the first start to the end of the last."""
    total = {name: sum(start.spent[name] for start in starts) for name in USES} | {"down": 0.0}
    for start, after in pairwise(starts):
        total["down"] += max(0.0, after.began - start.ended)
    return total


def _newest(folder: Path) -> RunStart | None:
    files = _files(folder)
    return _read(files[-1]) if files else None


def _files(folder: Path) -> list[Path]:
    paths = folder.glob("*.json") if folder.is_dir() else ()
    return sorted(
        (path for path in paths if path.stem.isdecimal()), key=lambda path: int(path.stem)
    )


def _read(path: Path) -> RunStart:
    try:
        start = RunStart(**json.loads(path.read_text(encoding="utf-8")))
        # These raise for a value of another type.
        sum([start.number, start.recorded_before, start.furthest, start.steps_before or 0])
        sum([start.step, start.steps, start.began, start.seconds])
        sum(start.spent[name] for name in USES)
        [dict(host) for host in start.hosts]
        return start
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, or restore it") from None
