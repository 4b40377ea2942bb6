"""Start of a multi-process run."""

import contextlib
from collections.abc import Callable, Iterator

import jax

from tttjax.errors import UserError
from tttjax.parallel import store
from tttjax.parallel.coordinator import call_roll, split_address
from tttjax.parallel.pod import Pod, TimeLimits
from tttjax.runtime.progress import report_activity


def _no_sentence(error: BaseException) -> str | None:
    return str(error) if isinstance(error, UserError) else None


@contextlib.contextmanager
def start_distributed(
    coordinator: str | None = None,
    process_id: int | None = None,
    process_count: int | None = None,
    limits: TimeLimits = TimeLimits(),  # noqa: B008 (frozen)
    describe: Callable[[BaseException], str | None] = _no_sentence,
) -> Iterator[Pod]:
    """A multi-process run: joins this process to it, and ends it with the others.

    Enter it before JAX touches a device. Without arguments, JAX detects them from the cluster (TPU
    pod, Slurm, Open MPI, Kubernetes). What the block raises ends all processes (`parallel.pod`);
    at the end of the block they wait for each other.

    Arguments:
      describe: the sentence of an error that the user can mend; None for a bug.

    Raises:
      UserError: only some of the three are given, the address is invalid, its port is in use,
        nothing answers there, or processes are missing, differ in their count or share an id.
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
        split_address(coordinator)
        if not 0 <= process_id < process_count:
            raise UserError(
                f"--process-id={process_id} must be from 0 to {process_count - 1}, below "
                f"--process-count={process_count}"
            )
    hosts: list[str] = []
    pod: Pod | None = None

    def roll_call(address: str, process_id: int, process_count: int) -> None:
        hosts.extend(call_roll(address, process_id, process_count, limits.init))

    def runtime_failed() -> None:
        if pod is not None:
            pod.runtime_failed()

    try:
        with report_activity("connecting the processes of the run"):
            connected = store.connect(
                (coordinator, process_count, process_id),
                roll_call,
                runtime_failed,
                init_seconds=limits.init,
                heartbeat_seconds=limits.heartbeat,
                shutdown_seconds=limits.shutdown,
            )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"joining the multi-process run failed ({str(error).splitlines()[0]}): check that "
            "--coordinator=HOST:PORT is process 0's address, that every process is started, and "
            "that each has its own --process-id below --process-count"
        ) from error
    pod = Pod(connected, hosts, limits, describe)
    with pod.watching():
        yield pod
    jax.distributed.shutdown()
