"""The key-value store of a multi-process run. The only file that touches JAX's private names.

JAX connects all processes to a service in process 0 (`jax.distributed`), whose store its public API
does not offer. The store lives as long as process 0.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed

# JAX's own heartbeats only guard against a process whose threads here have ended.
_SLOWER_HEARTBEAT = 60
_STOP_NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # the key of JAX's preemption service


def process_id() -> int:
    """This process's number, without opening the devices, as `jax.process_index()` does."""
    return distributed.global_state.process_id


def process_count() -> int:
    """The number of processes, without opening the devices."""
    return distributed.global_state.num_processes


class StoreLostError(Exception):
    """The store does not answer: process 0 is lost, or the connection to it."""


class Store:
    """Strings by key, shared by all processes. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._client: Any = distributed.global_state.client
        self.process_id, self.process_count = process_id(), process_count()

    def put(self, key: str, value: str) -> None:
        """Sets a key, new or not."""
        _call(self._client.key_value_set, key, value, allow_overwrite=True)

    def put_first(self, key: str, value: str) -> bool:
        """Sets a key if nobody has; whether it did."""
        return _call(_is_new, self._client, key, value)

    def get(self, key: str, seconds: float) -> str | None:
        """Waits for a key; None if nobody sets it in time.

        JAX's service keeps every wait that timed out in memory until the key is set, so call this
        with long times rather than often.
        """
        return _call(self._client.blocking_key_value_get, key, _milliseconds(seconds))

    def items(self, folder: str) -> dict[str, str]:
        """What has been set below a folder, by the rest of the key."""
        pairs = _call(self._client.key_value_dir_get, f"{folder}/") or []
        return {key.removeprefix(f"{folder}/"): value for key, value in pairs}

    def peek(self, key: str) -> str | None:
        """The value of a key; None if nobody has set it. Does not wait."""
        return _call(_value, self._client, key)

    def stop_notice(self) -> bool:
        """Whether JAX's preemption service has told the processes that one got SIGTERM."""
        return self.peek(_STOP_NOTICE) is not None

    def wait_for_all(self, barrier: str, seconds: float) -> bool:
        """Waits until every process has called this; False if they do not in time."""
        return _call(_pass, self._client, barrier, _milliseconds(seconds)) is not None


def connect(
    arguments: tuple[str | None, int | None, int | None],
    call_roll: Callable[[str, int, int], None],
    on_runtime_error: Callable[[], None],
    *,
    init_seconds: int,
    heartbeat_seconds: int,
    shutdown_seconds: int,
) -> Store:
    """`jax.distributed.initialize` with hooks; touches no device.

    arguments: coordinator, process count and id; None where JAX detects them.
    call_roll: called with (coordinator, process id, process count) before JAX opens its service or
      connects to it, since JAX aborts or hangs if processes are missing or an id is used twice.
    on_runtime_error: called in a thread of JAX's if the service is lost; must not return.
    """
    make_service = distributed._jax.get_distributed_runtime_service
    make_client = distributed._jax.get_distributed_runtime_client

    def service(address: str, count: int, **options: Any) -> Any:
        call_roll(distributed.global_state.coordinator_address or address, 0, count)
        return make_service(address, count, **options)

    def client(address: str, process_id: int, **options: Any) -> Any:
        if process_id:
            call_roll(address, process_id, distributed.global_state.num_processes)
        # The default callback prints C++ frames and aborts. JAX cannot convert the status for a
        # callback in Python and raises in C++, which ends in `on_terminate` or a RuntimeError.
        options |= {"missed_heartbeat_callback": lambda status: on_runtime_error()}
        return make_client(address, process_id, shutdown_on_destruction=False, **options)

    _on_terminate(on_runtime_error)
    with (
        _replaced("get_distributed_runtime_service", service),
        _replaced("get_distributed_runtime_client", client),
    ):
        jax.distributed.initialize(
            *arguments,
            initialization_timeout=init_seconds,
            heartbeat_timeout_seconds=2 * heartbeat_seconds + _SLOWER_HEARTBEAT,
            shutdown_timeout_seconds=shutdown_seconds,
        )
    return Store()


@contextlib.contextmanager
def _replaced(name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = getattr(distributed._jax, name)
    setattr(distributed._jax, name, function)
    try:
        yield
    finally:
        setattr(distributed._jax, name, original)


@functools.cache
def _on_terminate(handler: Callable[[], None]) -> Any:
    """Has C++ call this instead of aborting at an exception that nothing catches."""
    c_handler = ctypes.CFUNCTYPE(None)(handler)
    with contextlib.suppress(OSError, AttributeError):  # a system with another C++ library
        ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE(c_handler)
    return c_handler  # the cache keeps it alive


def _milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1000))


def _is_new(client: Any, key: str, value: str) -> bool:
    try:
        client.key_value_set(key, value)
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("ALREADY_EXISTS"):
            raise
        return False
    return True


def _value(client: Any, key: str) -> str | None:
    try:
        return client.key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("NOT_FOUND"):
            raise
        return None


def _pass(client: Any, barrier: str, milliseconds: int) -> bool:
    client.wait_at_barrier(barrier, milliseconds)
    return True


def _call(method: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The method's result; None if it timed out. Raises StoreLostError."""
    try:
        return method(*args, **options)
    except jax.errors.JaxRuntimeError as error:
        if str(error).startswith("DEADLINE_EXCEEDED"):
            return None
        raise StoreLostError(str(error).partition("\n")[0]) from error
