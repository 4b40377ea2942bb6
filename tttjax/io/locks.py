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
BEAT_SECONDS = 3.0
WATCH_SECONDS = 20.0  # some beats, also where a shared disk tells of changes late
Say = Callable[[str], None]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Lock:
    """A lock that is held, as far as this process knows."""

    def __init__(self, place: Path) -> None:
        self.place, self.lost = place, threading.Event()

    def check(self) -> None:
        """UserError if another process took the lock over, as from a process that was suspended."""
        if self.lost.is_set():
            raise UserError(
                f"another process took over {self.place} while this one gave no sign of life; "
                "this one ends, and the other goes on."
            )


@contextlib.contextmanager
def hold(
    place: str | os.PathLike,
    *,
    beside: bool = False,
    ends_on_sigterm: bool = True,
    say: Say = _say,
    beat_s: float = BEAT_SECONDS,
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
    place = Path(place)
    target = place.absolute()
    if not beside and target.exists() and not target.is_dir():
        raise UserError(f"{place} is a file; name a folder.")
    path = target.with_name(f".{target.name}.lock") if beside else target / FOLDER_LOCK
    me, lock, stop = _Holder.me(), Lock(place), threading.Event()
    with _made(path.parent), _unwound_by_sigterm() if ends_on_sigterm else contextlib.nullcontext():
        try:
            _acquire(path, me, place, watch_s, say)
            beat = (path, me.token, beat_s, stop, lock.lost)
            threading.Thread(target=_beat, args=beat, daemon=True).start()
            yield lock
        finally:
            stop.set()
            _release(path, me.token)


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
        host, boot, namespace = _here()
        started = _state_and_start("self")[1]
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        return cls(host, boot, namespace, os.getpid(), started, since, secrets.token_hex(8))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def is_here(self) -> bool:
        """Whether this process can ask for it."""
        return (self.host, self.boot, self.namespace) == _here()

    def is_alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's
        state, started = _state_and_start(str(self.pid))
        is_another = bool(started and self.started) and started != self.started
        return state not in ("Z", "X") and not is_another


def _here() -> tuple[str, str, str]:
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


class _Seen(NamedTuple):
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


def _look(path: Path) -> _Seen | None:
    try:
        with path.open("rb") as file:  # opened anew, as a shared disk caches what it told before
            return _Seen(file.read(), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


# Taking and leaving it ---------------------------------------------------------------------------


def _acquire(path: Path, me: _Holder, place: Path, watch_s: float, say: Say) -> None:
    while not _create(path, me):
        seen = _look(path)
        if seen is None:
            continue
        holder = seen.holder
        if holder and holder.is_here():
            if holder.is_alive():
                raise _refusal(place, holder)
        else:
            say(
                f"note: {place} is marked as being written by {holder or 'another process'}; "
                f"looking for {watch_s:g} s whether it still is"
            )
            now = _watch(path, seen, watch_s)
            if now is None or now.content != seen.content:
                continue
            if now != seen:
                raise _refusal(place, holder)
        if _take_over(path, seen, me):
            say(f"note: taking over {place} from {holder or 'another process'}, which is gone")
            return


def _refusal(place: Path, holder: _Holder | None) -> UserError:
    return UserError(
        f"{place} is being written by another command ({holder or 'a process'}); wait until that "
        "has ended, stop it, or name another place."
    )


def _create(path: Path, me: _Holder) -> bool:
    """Whether the file was not there, and now is this process's."""
    path.parent.mkdir(parents=True, exist_ok=True)  # another holder may have removed it again
    try:
        with path.open("xb") as file:
            try:
                file.write(_content(me))
                file.flush()
            except OSError:  # no space: an empty lock would be waited for
                path.unlink(missing_ok=True)
                raise
    except (FileExistsError, FileNotFoundError):
        return False
    return True


def _content(me: _Holder) -> bytes:
    return json.dumps(asdict(me)).encode()


def _watch(path: Path, seen: _Seen, watch_s: float) -> _Seen | None:
    """The file when it has changed, or as it is after that time."""
    end, now = time.monotonic() + watch_s, _look(path)
    while now == seen and time.monotonic() < end:
        time.sleep(min(0.5, watch_s / 10))
        now = _look(path)
    return now


def _take_over(path: Path, seen: _Seen, me: _Holder) -> bool:
    """Replaces the file if it still is as it was seen; one newcomer of several succeeds."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a disk without locks: whoever is last has it, and
            fcntl.flock(folder, fcntl.LOCK_EX)  # the others notice by their next sign of life
        if _look(path) != seen:
            return False
        temporary = path.with_name(f"{path.name}.{me.token}")
        temporary.write_bytes(_content(me))
        os.replace(temporary, path)
        return True
    finally:
        os.close(folder)


def _beat(
    path: Path, token: str, beat_s: float, stop: threading.Event, lost: threading.Event
) -> None:
    """Renews the file's time of change until told to stop; notes if it is another's by now."""
    while not stop.wait(beat_s):
        with contextlib.suppress(OSError):  # a disk that does not answer for a while
            seen = _look(path)
            if seen and seen.holder and seen.holder.token != token:
                lost.set()
                return
            os.utime(path)


def _release(path: Path, token: str) -> None:
    with contextlib.suppress(OSError):
        seen = _look(path)
        if seen and seen.holder and seen.holder.token == token:
            path.unlink()


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
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
def _unwound_by_sigterm() -> Iterator[None]:
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
