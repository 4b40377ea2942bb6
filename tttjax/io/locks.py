"""One writer at a time: a lock file names who writes a place, and shows that it still does.

The file holds host, process and start of the holder, whose thread renews its time of change every
few seconds. A newcomer on the same host asks the system for the process; one on another host, or
in another container, cannot, and watches whether the time changes. It compares what it sees with
what it saw, never with a clock, as those of two hosts may differ.

By hand, because libraries do half of it: locks of the operating system are not seen by other hosts
on many shared disks, and filelock's file-based ones stay for ever behind a holder that was killed.
"""

import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from tttjax.errors import UserError

FOLDER_LOCK = ".lock"
HEARTBEAT_SECONDS = 3.0
WATCH_SECONDS = 20.0  # some beats, also where a shared disk tells of changes late
Log = Callable[[str], None]


def _log_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Lock:
    """A lock that is held, as far as this process knows."""

    def __init__(self, path: Path) -> None:
        self.path, self.lost = path, threading.Event()

    def check(self) -> None:
        """UserError if another process took the lock over, as from a process that was suspended."""
        if self.lost.is_set():
            raise UserError(
                f"another process took over {self.path} while this one gave no sign of life; "
                "this one ends, and the other goes on."
            )


@contextlib.contextmanager
def hold(
    path: str | os.PathLike,
    *,
    beside: bool = False,
    exit_on_sigterm: bool = True,
    log: Log = _log_to_stderr,
    heartbeat_s: float = HEARTBEAT_SECONDS,
    watch_s: float = WATCH_SECONDS,
) -> Iterator[Lock]:
    """Keeps other holders away from a folder, or with `beside` from a file or folder of that name.

    The lock file lies in the folder, or beside the file. Folders that are not there are made, and
    go again if they are empty at the end. ends_on_sigterm: the signal unwinds as Ctrl-C does, so
    that the lock and what is half written go; exit code 143.
    say: takes a line about waiting, or about taking over from a process that is gone.
    beat_s: seconds between signs of life. watch_s: how long to look for those of another host.
    Raises UserError, with the holder, if there is one, and for a file that is to be a folder.
    """
    path = Path(path)
    target = path.absolute()
    if not beside and target.exists() and not target.is_dir():
        raise UserError(f"{path} is a file; name a folder.")
    lock_path = target.with_name(f".{target.name}.lock") if beside else target / FOLDER_LOCK
    me, lock, stop = _Holder.me(), Lock(path), threading.Event()
    with (
        _folder_for_lock(lock_path.parent),
        _sigterm_as_exit() if exit_on_sigterm else contextlib.nullcontext(),
    ):
        try:
            _acquire(lock_path, me, path, watch_s, log)
            heartbeat_args = (lock_path, me.token, heartbeat_s, stop, lock.lost)
            threading.Thread(target=_heartbeat, args=heartbeat_args, daemon=True).start()
            yield lock
        finally:
            stop.set()
            _release(lock_path, me.token)


# Who holds it ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Holder:
    """A process. boot, namespace: pids mean the same where both are the same; started: in clock
    ticks since the boot, so that a pid that was given again is recognised; "" where not known.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str
    since: str
    token: str

    @classmethod
    def me(cls) -> "_Holder":
        host, boot, namespace = _host_identity()
        started = _state_and_start("self")[1]
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        return cls(host, boot, namespace, os.getpid(), started, since, secrets.token_hex(8))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def is_on_this_host(self) -> bool:
        """Whether this process can ask for it."""
        return (self.host, self.boot, self.namespace) == _host_identity()

    def is_alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's
        state, started = _state_and_start(str(self.pid))
        is_reused = bool(started and self.started) and started != self.started
        return state not in ("Z", "X") and not is_reused


def _host_identity() -> tuple[str, str, str]:
    """Host, its boot, and the namespace of process numbers: containers repeat the first."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return socket.gethostname(), boot, namespace


def _state_and_start(pid: str) -> tuple[str, str]:
    """A letter for the process's state, and when it started; "" where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


class _LockState(NamedTuple):
    """A lock file as it was at one moment."""

    content: bytes
    changed: int

    @property
    def holder(self) -> _Holder | None:
        """None while it is being written, or damaged."""
        try:
            holder = _Holder(**json.loads(self.content))
            return holder if isinstance(holder.pid, int) and holder.pid > 0 else None
        except (ValueError, TypeError):
            return None


def _read_lock(lock_path: Path) -> _LockState | None:
    try:
        with lock_path.open(
            "rb"
        ) as file:  # opened anew, as a shared disk caches what it told before
            return _LockState(file.read(), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


# Taking and leaving it ---------------------------------------------------------------------------


def _acquire(lock_path: Path, me: _Holder, path: Path, watch_s: float, log: Log) -> None:
    while not _create(lock_path, me):
        state = _read_lock(lock_path)
        if state is None:
            continue
        holder = state.holder
        if holder and holder.is_on_this_host():
            if holder.is_alive():
                raise _held_error(path, holder)
        else:
            log(
                f"note: {path} is marked as being written by {holder or 'another process'}; "
                f"looking for {watch_s:g} s whether it still is"
            )
            current = _watch(lock_path, state, watch_s)
            if current is None or current.content != state.content:
                continue
            if current != state:
                raise _held_error(path, holder)
        if _take_over(lock_path, state, me):
            log(f"note: taking over {path} from {holder or 'another process'}, which is gone")
            return


def _held_error(path: Path, holder: _Holder | None) -> UserError:
    return UserError(
        f"{path} is being written by another command ({holder or 'a process'}); wait until that "
        "has ended, stop it, or name another place."
    )


def _create(lock_path: Path, me: _Holder) -> bool:
    """Whether the file was not there, and now is this process's."""
    lock_path.parent.mkdir(parents=True, exist_ok=True)  # another holder may have removed it again
    try:
        with lock_path.open("xb") as file:
            try:
                file.write(_content(me))
                file.flush()
            except OSError:  # no space: an empty lock would be waited for
                lock_path.unlink(missing_ok=True)
                raise
    except (FileExistsError, FileNotFoundError):
        return False
    return True


def _content(me: _Holder) -> bytes:
    return json.dumps(asdict(me)).encode()


def _watch(lock_path: Path, state: _LockState, watch_s: float) -> _LockState | None:
    """The file when it has changed, or as it is after that time."""
    end, current = time.monotonic() + watch_s, _read_lock(lock_path)
    while current == state and time.monotonic() < end:
        time.sleep(min(0.5, watch_s / 10))
        current = _read_lock(lock_path)
    return current


def _take_over(lock_path: Path, state: _LockState, me: _Holder) -> bool:
    """Replaces the file if it still is as it was seen; one newcomer of several succeeds."""
    folder = os.open(lock_path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a disk without locks: whoever is last has it, and
            fcntl.flock(folder, fcntl.LOCK_EX)  # the others notice by their next sign of life
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
    """Renews the file's time of change until told to stop; notes if it is another's by now."""
    while not stop.wait(heartbeat_s):
        with contextlib.suppress(OSError):  # a disk that does not answer for a while
            state = _read_lock(lock_path)
            if state and state.holder and state.holder.token != token:
                lost.set()
                return
            os.utime(lock_path)


def _release(lock_path: Path, token: str) -> None:
    with contextlib.suppress(OSError):
        state = _read_lock(lock_path)
        if state and state.holder and state.holder.token == token:
            lock_path.unlink()


@contextlib.contextmanager
def _folder_for_lock(folder: Path) -> Iterator[None]:
    """The folder is there; those that were made for it go again if they are empty at the end."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty, or gone already
            for path in missing:
                path.rmdir()


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Lets SIGTERM leave all contexts, where nobody else has a handler for it."""
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
