"""The address where the processes of a run meet: checked before JAX's runtime takes it.

The runtime ends the whole program, without an exception, where a port is taken, and waits for
minutes without a word where nobody answers.
"""

import contextlib
import errno
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator

from tttjax.errors import UserError

FIRST_REPORT_SECONDS, REPORT_SECONDS = 2.0, 10.0  # seconds


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT, the host of IPv6 in brackets. UserError if it is no such thing."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:\s]+):([0-9]{1,5})", address, re.ASCII)
    port = int(match[2]) if match else 0
    if match is None or not 1 <= port <= 65535:
        raise UserError(
            f"--coordinator={address} must be HOST:PORT, the address of process 0 and a port from "
            "1 to 65535 that is free there, such as node1:8476"
        )
    return match[1].strip("[]"), port


def check_port(port: int) -> None:
    """UserError if process 0, which is this one, cannot open the port on this host."""
    has_ipv6 = socket.has_dualstack_ipv6()
    family, host = (socket.AF_INET6, "::") if has_ipv6 else (socket.AF_INET, "")
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what lingers is no matter
        if has_ipv6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(
                    f"port {port} of this host, where --coordinator is, is taken by another "
                    "program (or by a start of this run that has not ended): end that, or give "
                    "all processes another port"
                ) from error
            raise UserError(
                f"port {port} of --coordinator cannot be opened on this host ({error.strerror}): "
                "give all processes another, above 1023"
            ) from error


def await_coordinator(host: str, port: int, seconds: float) -> None:
    """Until process 0 accepts connections. UserError if the host is unknown, or it never does."""
    end, problem = time.monotonic() + seconds, ""
    while time.monotonic() < end:
        try:
            socket.create_connection((host, port), timeout=min(2.0, seconds)).close()
            return
        except socket.gaierror as error:
            raise UserError(
                f"there is no host {host!r} ({error.strerror}): --coordinator=HOST:PORT is process "
                "0's address, as this host knows it"
            ) from error
        except OSError as error:
            problem = error.strerror or str(error)
            time.sleep(min(0.2, seconds))
    raise UserError(
        f"nothing answered at --coordinator={host}:{port} for {seconds:.0f} s ({problem}): check "
        "that process 0 has been started, that this is its address, and that no firewall is "
        "between"
    )


@contextlib.contextmanager
def report_waiting(what: str, seconds: float, timeout_error: str = "") -> Iterator[None]:
    """Prints a line to stderr now and then while the block takes its time.

    otherwise: what is wrong if it takes longer than `seconds`; then the process ends with this
    sentence and exit code 2, from here, because JAX's runtime, which the block may be in, can be
    neither interrupted nor made to return (it would end the process by a crash).
    """
    done = threading.Event()

    def report() -> None:
        started, pause = time.monotonic(), FIRST_REPORT_SECONDS
        while not done.wait(pause):
            waited = time.monotonic() - started
            if timeout_error and waited >= seconds:
                print(f"error: {timeout_error}", file=sys.stderr, flush=True)
                os._exit(2)
            print(f"waiting for {what} ({waited:.0f} of {seconds:.0f} s)", file=sys.stderr)
            pause = max(0.0, min(REPORT_SECONDS, seconds - waited)) or REPORT_SECONDS

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
