"""Start of a multi-process run."""

import jax
from jax._src.distributed import global_state

from tttjax.errors import UserError
from tttjax.parallel.coordinator import (
    await_coordinator,
    check_port,
    exit_on_timeout,
    split_address,
)
from tttjax.runtime.progress import report_activity

JOIN_SECONDS = 300  # timeout of processes waiting for each other at the start
_JOIN_TIMEOUT_ERROR = (
    "the other processes of the run did not join in time: check that each was started, with the "
    "same --coordinator and --process-count and its own --process-id"
)


def start_distributed(
    coordinator: str | None = None, process_id: int | None = None, process_count: int | None = None
) -> None:
    """Joins this process to a multi-process run; call it before JAX touches a device.

    Without arguments, JAX detects them from the cluster (TPU pod, Slurm, Open MPI, Kubernetes).

    Raises:
      UserError: only some of the three are given, the address is invalid, its port is in use,
        nothing answers there, or joining fails. If other processes do not join in time, this
        process prints an error and exits with code 2.
    """
    arguments = {
        "--coordinator": coordinator,
        "--process-id": process_id,
        "--process-count": process_count,
    }
    missing = [name for name, value in arguments.items() if value is None]
    if 0 < len(missing) < len(arguments):
        raise UserError(
            f"a multi-process run needs {', '.join(arguments)} together; {', '.join(missing)} is "
            "missing (or leave out all three on a cluster that JAX detects)"
        )
    if coordinator is not None and process_id is not None and process_count is not None:
        _check_address(coordinator, process_id, process_count)
    try:
        with (
            report_activity("waiting for the other processes of the run"),
            exit_on_timeout(JOIN_SECONDS, _JOIN_TIMEOUT_ERROR),
        ):
            jax.distributed.initialize(
                *(coordinator, process_count, process_id),
                initialization_timeout=2 * JOIN_SECONDS,  # must exceed our own timeout
            )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"joining the multi-process run failed ({str(error).splitlines()[0]}): check that "
            "--coordinator=HOST:PORT is process 0's address, that every process is started, and "
            "that each has its own --process-id below --process-count"
        ) from error


def process_id() -> int:
    """This process's number, without opening the devices, as `jax.process_index()` does."""
    return global_state.process_id


def process_count() -> int:
    """The number of processes, without opening the devices."""
    return global_state.num_processes


def _check_address(coordinator: str, process_id: int, process_count: int) -> None:
    """Raises UserError for arguments that abort or hang JAX's runtime; waits for process 0."""
    if not 0 <= process_id < process_count:
        raise UserError(
            f"--process-id={process_id} must be from 0 to {process_count - 1}, below "
            f"--process-count={process_count}"
        )
    host, port = split_address(coordinator)
    if process_id == 0:
        check_port(port)
        return
    with report_activity(f"waiting for process 0 at {coordinator}"):
        await_coordinator(host, port, JOIN_SECONDS)
