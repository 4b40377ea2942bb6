"""Lock files with heartbeats: one writer of a file or folder at a time, also across hosts.

A lock file holds the host, process and start time of its holder, whose thread renews the file's
mtime every few seconds. A process on the same host asks the operating system whether the holder
lives. One on another host, or in another container, watches whether the mtime changes. It compares
two observations of the file, never a clock, because clocks of hosts differ.

In a bucket the lock is an object, created only if there is none, and the heartbeat writes a count
into it.

Not a library, because operating-system locks do not reach other hosts on many shared disks, and
filelock's file-based locks stay for ever after a holder was killed.
"""

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from tttjax.errors import UserError
from tttjax.io.lock_holder import LockHolder
from tttjax.io.paths import is_bucket, storage_path
from tttjax.runtime.ending import at_sudden_end

FOLDER_LOCK = ".lock"
HEARTBEAT_SECONDS = 3.0
WATCH_SECONDS = 20.0  # several heartbeats, also on shared disks that report changes late
BUCKET_WATCH_SECONDS = 40.0  # as long as a request is tried again
SETTLE_SECONDS = 2.0  # after which of several processes that took a lock over all see whose it is
Log = Callable[[str], None]


def _log_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class LockHeldError(UserError):
    """Another process holds the lock."""


class Lock:
    """A held lock. lost: set once another process has taken it over."""

    def __init__(self, path: Path) -> None:
        self.path, self.lost = path, threading.Event()

    def check(self) -> None:
        """Raises UserError if another process took the lock over, as after a suspension."""
        if self.lost.is_set():
            raise UserError(
                f"another process took over the lock of {self.path} while this one did not "
                "respond; this one exits."
            )


@contextlib.contextmanager
def hold(
    path: str | os.PathLike,
    *,
    beside: bool = False,
    exit_on_sigterm: bool = True,
    log: Log = _log_to_stderr,
    heartbeat_s: float = HEARTBEAT_SECONDS,
    watch_s: float | None = None,
) -> Iterator[Lock]:
    """Holds the lock of a folder, or with `beside` that of a file or folder.

    The lock file is in the folder, or with `beside` next to the path. Missing folders are created,
    and removed at the end if empty.
    exit_on_sigterm: SIGTERM raises SystemExit(143), which removes the lock and partial output.
    log: called with a line about waiting, or about taking over from a process that has ended.
    heartbeat_s: seconds between heartbeats. watch_s: how long to watch for those of another host
    (default: WATCH_SECONDS, in a bucket BUCKET_WATCH_SECONDS).
    Raises LockHeldError that names the holder, if there is one; UserError if a file is at a
    folder's path.
    """
    path = storage_path(path)
    target = path.absolute()
    if watch_s is None:
        watch_s = _watch_seconds(path)
    if not (beside or is_bucket(target)) and target.exists() and not target.is_dir():
        raise UserError(f"{path} is a file; name a folder.")
    lock_path = target.with_name(f".{target.name}.lock") if beside else target / FOLDER_LOCK
    me, lock, stop = LockHolder.me(), Lock(path), threading.Event()
    heartbeat_args = (lock_path, me.token, heartbeat_s, stop, lock.lost)
    thread = threading.Thread(target=_heartbeat, args=heartbeat_args, daemon=True)
    with (
        _folder_for_lock(lock_path.parent),
        _sigterm_as_exit() if exit_on_sigterm else contextlib.nullcontext(),
    ):
        try:
            _acquire(lock_path, me, path, watch_s, log)
            thread.start()
            with at_sudden_end(lambda _: _release(lock_path, me.token)):
                yield lock
        finally:
            stop.set()
            if thread.is_alive():  # it must not write a heartbeat after the release
                thread.join(2 * heartbeat_s)
            _release(lock_path, me.token)


def living_holder(folder: str | os.PathLike, watch_s: float | None = None) -> str | None:
    """The process that holds a folder's lock, if it lives; one of another host is watched first.

    watch_s: as for `hold`.
    """
    lock_path = storage_path(folder) / FOLDER_LOCK
    if watch_s is None:
        watch_s = _watch_seconds(lock_path)
    state = _read_lock(lock_path)
    if state is None:
        return None
    if state.holder and state.holder.is_on_this_host():
        return str(state.holder) if state.holder.is_alive() else None
    current = _watch(lock_path, state, watch_s)
    return str(current.holder or "a process") if current and current != state else None


def _watch_seconds(path: Path) -> float:
    return BUCKET_WATCH_SECONDS if is_bucket(path) else WATCH_SECONDS


class _LockState(NamedTuple):
    """Content and mtime (ns; 0 in a bucket) of a lock file, read together."""

    content: bytes
    mtime_ns: int

    @property
    def holder(self) -> LockHolder | None:
        """None if the file is incomplete or damaged."""
        try:
            holder = LockHolder(**json.loads(self.content))
            return holder if isinstance(holder.pid, int) and holder.pid > 0 else None
        except (ValueError, TypeError):
            return None


def _read_lock(lock_path: Path) -> _LockState | None:
    try:
        if is_bucket(lock_path):
            return _LockState(lock_path.read_bytes(), 0)
        with lock_path.open("rb") as file:  # reopened, because shared disks cache attributes
            return _LockState(file.read(), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


# Acquire and release -----------------------------------------------------------------------------


def _acquire(lock_path: Path, me: LockHolder, path: Path, watch_s: float, log: Log) -> None:
    while not _create(lock_path, me):
        state = _read_lock(lock_path)
        if state is None:
            continue
        holder = state.holder
        if holder and holder.token == me.token:  # of a request whose answer was lost
            return
        if holder and holder.is_on_this_host():
            if holder.is_alive():
                raise _held_error(path, holder)
        else:
            log(
                f"note: {path} is locked by {holder or 'another process'}; "
                f"looking for {watch_s:g} s whether it is alive"
            )
            current = _watch(lock_path, state, watch_s)
            if current is None or _token(current) != _token(state):
                continue
            if current != state:
                raise _held_error(path, holder)
        if _take_over(lock_path, state, me):
            log(f"note: taking over {path} from {holder or 'another process'}, which has ended")
            return


def _held_error(path: Path, holder: LockHolder | None) -> LockHeldError:
    return LockHeldError(
        f"{path} is being written by another command ({holder or 'a process'}); wait until it "
        "ends, stop it, or choose another path."
    )


def _create(lock_path: Path, me: LockHolder) -> bool:
    """Creates the lock file; False if it exists."""
    if is_bucket(lock_path):
        from tttjax.io.buckets import create

        return create(lock_path, _content(me))
    lock_path.parent.mkdir(parents=True, exist_ok=True)  # another holder may have removed it
    try:
        with lock_path.open("xb") as file:
            try:
                file.write(_content(me))
                file.flush()
            except OSError:  # disk full: an empty lock would block others
                lock_path.unlink(missing_ok=True)
                raise
    except (FileExistsError, FileNotFoundError):
        return False
    return True


def _content(me: LockHolder) -> bytes:
    return json.dumps(asdict(me)).encode()


def _token(state: _LockState) -> str | bytes:
    return state.holder.token if state.holder else state.content


def _watch(lock_path: Path, state: _LockState, watch_s: float) -> _LockState | None:
    """The file's state once it differs from `state`, or after watch_s."""
    end, current = time.monotonic() + watch_s, _read_lock(lock_path)
    while current == state and time.monotonic() < end:
        time.sleep(min(0.5, watch_s / 10))
        current = _read_lock(lock_path)
    return current


def _take_over(lock_path: Path, state: _LockState, me: LockHolder) -> bool:
    """Replaces the file if its state is unchanged; of several processes one succeeds."""
    if is_bucket(lock_path):
        if _read_lock(lock_path) != state:
            return False
        lock_path.write_bytes(_content(me))
        time.sleep(SETTLE_SECONDS)
        return _read_lock(lock_path) == _LockState(_content(me), 0)
    folder = os.open(lock_path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # without flock the last one has it, and the others
            fcntl.flock(folder, fcntl.LOCK_EX)  # notice at their next heartbeat
        if _read_lock(lock_path) != state:
            return False
        temporary = lock_path.with_name(f"{lock_path.name}.{me.token}")
        temporary.write_bytes(_content(me))
        os.replace(temporary, lock_path)
        return True
    finally:
        os.close(folder)


def _heartbeat(
    lock_path: Path, token: str, heartbeat_s: float, stop: threading.Event, lost: threading.Event
) -> None:
    """Renews the file's mtime until `stop`; sets `lost` if another process took it over."""
    while not stop.wait(heartbeat_s):
        with contextlib.suppress(Exception):  # a disk or bucket that is temporarily unavailable
            state = _read_lock(lock_path)
            if state and state.holder and state.holder.token != token:
                lost.set()
                return
            if not is_bucket(lock_path):
                os.utime(lock_path)
            elif state and state.holder and not stop.is_set():
                lock_path.write_bytes(_content(replace(state.holder, beats=state.holder.beats + 1)))


def _release(lock_path: Path, token: str) -> None:
    with contextlib.suppress(Exception):
        state = _read_lock(lock_path)
        if state and state.holder and state.holder.token == token:
            lock_path.unlink()


@contextlib.contextmanager
def _folder_for_lock(folder: Path) -> Iterator[None]:
    """Creates the folder; removes the folders that it created if they are empty at the end."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)

    def remove() -> None:
        with contextlib.suppress(OSError):  # not empty, or removed already
            for path in missing:
                path.rmdir()

    try:
        with at_sudden_end(lambda _: remove()):
            yield
    finally:
        remove()


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Turns SIGTERM into SystemExit, unless another handler is installed."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
