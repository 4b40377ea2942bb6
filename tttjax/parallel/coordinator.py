"""The roll call of a multi-process run, before JAX connects the processes.

Every process connects to the coordinator's port and tells process 0 its id; when all are there,
process 0 tells them so and JAX's service takes the port. JAX itself aborts the program without an
exception if the port is in use or an id is used twice, and cannot tell who is missing.
"""

import contextlib
import errno
import json
import re
import selectors
import socket
import time
from collections.abc import Collection, Iterator
from typing import Any

from tttjax.errors import AbsentProcessError, UserError
from tttjax.runtime.progress import rename_activity, report_activity

_LONGEST_LINE = 4096  # bytes of a greeting; longer ones are of other programs
_PAUSE = 0.2  # seconds between attempts to connect
_GRACE = 3.0  # more seconds for the word of process 0, which knows who is missing


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT; IPv6 hosts in brackets. Raises UserError for anything else."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:\s]+):([0-9]{1,5})", address, re.ASCII)
    port = int(match[2]) if match else 0
    if match is None or not 1 <= port <= 65535:
        raise UserError(
            f"--coordinator={address} must be HOST:PORT: the address of process 0 and a free port "
            "on it from 1 to 65535, such as node1:8476"
        )
    return match[1].strip("[]"), port


def call_roll(address: str, process_id: int, process_count: int, seconds: float) -> list[str]:
    """Waits until all processes of the run have called this; the host names, by process id.

    Raises UserError, on every process that can be reached: an id is used twice, process counts
    differ, or processes are missing after `seconds`. Also if the port is in use, or the address
    leads nowhere.
    """
    host, port = split_address(address)
    me = {"process": process_id, "count": process_count, "host": socket.gethostname()}
    with report_activity(f"waiting for process 0 at {address}"):
        if process_id == 0:
            with _listen(port) as listener:
                return _RollCall(listener, me, seconds).run()
        return _join(host, port, me, seconds)


def name_processes(ids: Collection[int]) -> str:
    """`process 1`, `processes 1, 2, 5`; at most ten of them."""
    shown = ", ".join(map(str, sorted(ids)[:10])) + (", ..." if len(ids) > 10 else "")
    return f"process{'es' if len(ids) > 1 else ''} {shown}"


# Process 0 ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _listen(port: int) -> Iterator[socket.socket]:
    """Opens the port of this process, process 0. Raises UserError if it cannot."""
    has_ipv6 = socket.has_dualstack_ipv6()
    family, host = (socket.AF_INET6, "::") if has_ipv6 else (socket.AF_INET, "")
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore TIME_WAIT
        if has_ipv6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            listener.bind((host, port))
            listener.listen(1024)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(
                    f"--coordinator: port {port} of this host is used by another program (or by an "
                    "earlier start of this run that has not ended): end it, or give all processes "
                    "another port"
                ) from error
            raise UserError(
                f"--coordinator: port {port} cannot be opened on this host ({error.strerror}): "
                "give all processes another port above 1023"
            ) from error
        yield listener


class _RollCall:
    """The processes that have joined, as process 0 sees them."""

    def __init__(self, listener: socket.socket, me: dict[str, Any], seconds: float):
        self._listener, self._me, self._seconds = listener, me, seconds
        self._selector = selectors.DefaultSelector()
        self._received: dict[socket.socket, bytes] = {}
        self._joined: dict[socket.socket, dict[str, Any]] = {}

    def run(self) -> list[str]:
        end, told_at, told = time.monotonic() + self._seconds, 0.0, None
        self._selector.register(self._listener, selectors.EVENT_READ)
        try:
            while missing := self._missing():
                now = time.monotonic()
                if now > end:
                    self._refuse(
                        f"{name_processes(missing)} of {self._me['count']} did not join within "
                        f"{self._seconds:g} s: start the same command on every host, each with its "
                        "own --process-id",
                        AbsentProcessError,
                    )
                if missing != told and now > told_at + 1:
                    told, told_at = missing, now
                    rename_activity(f"waiting for {name_processes(missing)}")
                    self._tell({"missing": missing})
                for key, _ in self._selector.select(min(1.0, max(0.0, end - now))):
                    assert isinstance(key.fileobj, socket.socket)
                    self._read(key.fileobj)
            hosts = {entry["process"]: entry["host"] for entry in self._entries()}
            self._tell({"hosts": [hosts[i] for i in range(len(hosts))]})
            return [hosts[i] for i in range(len(hosts))]
        finally:
            for connection in self._received:
                connection.close()
            self._selector.close()

    def _entries(self) -> list[dict[str, Any]]:
        return [self._me, *self._joined.values()]

    def _missing(self) -> list[int]:
        present = {entry["process"] for entry in self._entries()}
        return [i for i in range(self._me["count"]) if i not in present]

    def _read(self, connection: socket.socket) -> None:
        if connection is self._listener:
            connection = self._listener.accept()[0]
            connection.settimeout(5.0)
            self._received[connection] = b""
            self._selector.register(connection, selectors.EVENT_READ)
            return
        try:
            data = connection.recv(_LONGEST_LINE)
        except OSError:
            data = b""
        text = self._received[connection] = self._received[connection] + data
        if data and b"\n" in text and connection not in self._joined:
            entry = _parse(text)
            if "process" in entry:
                self._add(connection, entry)
                return
            data = b""
        if not data or len(text) > _LONGEST_LINE:  # it has ended, or is another program
            self._selector.unregister(connection)
            self._joined.pop(connection, None)
            del self._received[connection]
            connection.close()

    def _add(self, connection: socket.socket, entry: dict[str, Any]) -> None:
        process, count, host = entry["process"], entry["count"], entry["host"]
        same = next((e["host"] for e in self._entries() if e["process"] == process), None)
        self._joined[connection] = entry
        if count != self._me["count"]:
            self._refuse(
                f"process {process} on {host} was started with --process-count={count}, and "
                f"process 0 on {self._me['host']} with --process-count={self._me['count']}: give "
                "all processes the same"
            )
        if same is not None:
            self._refuse(
                f"--process-id={process} was given twice, on {same} and on {host}: give every "
                "process its own"
            )

    def _tell(self, message: dict[str, Any]) -> None:
        for connection in self._joined:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(message).encode() + b"\n")

    def _refuse(self, sentence: str, kind: type[UserError] = UserError) -> None:
        self._tell({"error": sentence, "is_absent": kind is AbsentProcessError})
        raise kind(sentence)


def _parse(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; empty for anything else."""
    with contextlib.suppress(ValueError):
        value = json.loads(line.partition(b"\n")[0])
        return value if isinstance(value, dict) else {}
    return {}


# The other processes -----------------------------------------------------------------------------


def _join(host: str, port: int, me: dict[str, Any], seconds: float) -> list[str]:
    end, problem, missing = time.monotonic() + seconds, "", [0]
    while time.monotonic() < end:
        try:
            with socket.create_connection((host, port), timeout=min(2.0, seconds)) as connection:
                connection.sendall(json.dumps(me).encode() + b"\n")
                for message in _messages(connection, end + _GRACE):
                    if "hosts" in message:
                        return message["hosts"]
                    if "error" in message:
                        kind = AbsentProcessError if message.get("is_absent") else UserError
                        raise kind(message["error"])
                    missing = message.get("missing", [])
                    rename_activity(
                        f"waiting for {name_processes(missing)}"
                        if missing
                        else f"waiting, as {host}:{port} belongs to another program or start"
                    )
                    if not missing:
                        problem = (
                            "another program answers, or a run that goes on without this process, "
                            "as when its --process-id is used twice"
                        )
                        break
        except socket.gaierror as error:
            raise UserError(
                f"there is no host {host!r} ({error.strerror}): --coordinator=HOST:PORT must be "
                "the address of process 0, resolvable on this host"
            ) from error
        except OSError as error:
            problem = problem or error.strerror or str(error)
        time.sleep(min(_PAUSE, seconds))
    if missing and missing != [0]:
        raise AbsentProcessError(
            f"{name_processes(missing)} of {me['count']} did not join within {seconds:g} s: start "
            "the same command on every host, each with its own --process-id"
        )
    raise AbsentProcessError(
        f"no process 0 answered at --coordinator={host}:{port} for {seconds:g} s ({problem}): "
        "check that process 0 is started, that this is its address, and that no firewall blocks it"
    )


def _messages(connection: socket.socket, end: float) -> Iterator[dict[str, Any]]:
    """What process 0 says until `end`, or until it goes away; {} if it is another program."""
    buffer = b""
    connection.settimeout(0.5)
    while time.monotonic() < end:
        try:
            data = connection.recv(1 << 16)
        except TimeoutError:
            continue
        if not data:
            return
        *lines, buffer = (buffer + data).split(b"\n")
        if not lines and not buffer.startswith(b"{"):
            yield {}
        for line in lines:
            yield _parse(line)
