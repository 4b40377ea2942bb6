"""Checks of the coordinator address of a multi-process run, before JAX's runtime uses it.

The runtime aborts the program, without an exception, if the port is in use, and waits silently for
minutes if nothing answers.
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


def check_port(port: int) -> None:
    """Raises UserError if this process, process 0, cannot open the port."""
    has_ipv6 = socket.has_dualstack_ipv6()
    family, host = (socket.AF_INET6, "::") if has_ipv6 else (socket.AF_INET, "")
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore TIME_WAIT
        if has_ipv6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            probe.bind((host, port))
            probe.listen()
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


def await_coordinator(host: str, port: int, seconds: float) -> None:
    """Waits until process 0 accepts connections. Raises UserError at timeout or unknown host."""
    end, problem = time.monotonic() + seconds, ""
    while time.monotonic() < end:
        try:
            socket.create_connection((host, port), timeout=min(2.0, seconds)).close()
            return
        except socket.gaierror as error:
            raise UserError(
                f"there is no host {host!r} ({error.strerror}): --coordinator=HOST:PORT must be "
                "the address of process 0, resolvable on this host"
            ) from error
        except OSError as error:
            problem = error.strerror or str(error)
            time.sleep(min(0.2, seconds))
    raise UserError(
        f"nothing answered at --coordinator={host}:{port} for {seconds:.0f} s ({problem}): check "
        "that process 0 is started, that this is its address, and that no firewall blocks it"
    )


@contextlib.contextmanager
def exit_on_timeout(seconds: float, error: str) -> Iterator[None]:
    """Prints `error` and ends the process with exit code 2 if the block takes longer.

    A thread does this, because JAX's runtime cannot be interrupted and would crash the process.
    """

    def end() -> None:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
