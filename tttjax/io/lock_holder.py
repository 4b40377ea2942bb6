"""The process that holds a lock, as its lock file names it, and whether it lives."""

import contextlib
import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LockHolder:
    """Pids are comparable where boot and namespace are equal.

    started: in clock ticks since boot, to detect a reused pid. Fields are "" where unknown.
    beats: heartbeats so far, of a lock in a bucket.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str
    since: str
    token: str
    beats: int = 0

    @classmethod
    def me(cls) -> "LockHolder":
        host, boot, namespace = _host_identity()
        started = _state_and_start("self")[1]
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        return cls(host, boot, namespace, os.getpid(), started, since, secrets.token_hex(8))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def is_on_this_host(self) -> bool:
        """Whether its pid is one of this host and pid namespace."""
        return (self.host, self.boot, self.namespace) == _host_identity()

    def is_alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # process of another user
        state, started = _state_and_start(str(self.pid))
        is_reused = bool(started and self.started) and started != self.started
        return state not in ("Z", "X") and not is_reused


def _host_identity() -> tuple[str, str, str]:
    """(host name, boot id, pid namespace); containers may share host names."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return socket.gethostname(), boot, namespace


def _state_and_start(pid: str) -> tuple[str, str]:
    """(state letter, start time in clock ticks) of a process; "" where unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]
