"""One failure ends all processes of a run, at once and with its sentence.

The first failure is written to the store. A thread of every process waits for it, prints it and
ends its process, even if the main thread is in a collective or a compilation. Every process gives a
sign of life in the store; process 0 watches those of the others, and the others watch the store.
With it goes a payload of the process (`parallel.heartbeats`).

Without a pod (one process, or a program that joined the processes itself) the functions below are
those of one process.
"""

import contextlib
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tttjax.errors import UnreachableError, UserError, is_out_of_memory, is_runtime_error
from tttjax.exit_codes import FAILED, INTERRUPTED, LOST, USER_ERROR
from tttjax.io.paths import storage_path
from tttjax.parallel.heartbeats import Heartbeats
from tttjax.parallel.store import Store, StoreLostError
from tttjax.runtime.ending import end_process
from tttjax.runtime.stacks import write_stacks

_FAILURE, _LEFT = "failure", "left"
_WEEK = 7 * 24 * 3600.0
_STORE_SECONDS = 2.0  # for one write of a failing process
_LAST_SECONDS = 3.0  # that process 0 keeps the store open for the others to read the failure

_pod: "Pod | None" = None


def current_pod() -> "Pod | None":
    """The processes that this one belongs to; None if it is alone."""
    return _pod


def end_run(code: int, sentence: str, *, stacks: Path | None = None) -> NoReturn:
    """Ends this process and all others of the run, from any thread, with code and sentence.

    The sentence is printed everywhere, after "error: process 1 on HOST: ". Of several failures the
    first one counts, on every process.

    stacks: a folder in which every process writes the stacks of its threads, and to stderr.
    """
    if _pod is not None:
        _pod.end(code, sentence, stacks=stacks)
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    if stacks:
        write_stacks(stacks, 0)
    end_process(code)


def stop_requested() -> bool:
    """Whether a process of the pod has got SIGTERM; False without a pod."""
    return _pod is not None and _pod.stop_requested


def share_failure(error: BaseException) -> None:
    """Ends all processes because of an error of this one; returns if there is no pod.

    Call it before anything that waits for other processes, such as closing a checkpointer. User
    errors end all with USER_ERROR. A bug ends this process with its traceback and FAILED, and the
    others with LOST. An error of JAX's runtime may be the consequence of another's end, which is
    waited for.
    """
    if _pod is not None and not isinstance(error, SystemExit | GeneratorExit):
        _pod.share(error)


@contextlib.contextmanager
def sharing_failures() -> Iterator[None]:
    """`share_failure` for what the block raises."""
    try:
        yield
    except BaseException as error:
        share_failure(error)
        raise


@dataclass(frozen=True)
class TimeLimits:
    """Seconds that a process waits for others: to join, for signs of life, to end."""

    init: int = 300
    heartbeat: int = 100
    shutdown: int = 300

    def __post_init__(self) -> None:
        for name in ("init", "heartbeat", "shutdown"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}-timeout={getattr(self, name)} must be 1 s or more")


class Pod:
    """The processes of a run. Make it with `start_distributed`.

    hosts: names by process id. describe: the sentence of an error that the user can mend; None for
    a bug.
    """

    def __init__(
        self,
        store: Store,
        hosts: list[str],
        limits: TimeLimits,
        describe: Callable[[BaseException], str | None],
    ):
        self.store, self.hosts, self.limits = store, hosts, limits
        self._describe, self._interval = describe, min(limits.heartbeat / 10, 2.0)
        self.stop_requested = False
        self._closed, self._ending = threading.Event(), threading.Lock()
        self.heartbeats = Heartbeats(store)
        self._lost: set[str] = set()  # processes that will not read the failure

    def name(self, process_id: int) -> str:
        """`process 1 on HOST`."""
        return f"process {process_id} on {self.hosts[process_id]}"

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Shares failures during the block. At its end all processes wait for each other."""
        global _pod
        _pod = self
        targets = (self._await_failure, self._beat, self._check_beats)
        threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in threads:
            thread.start()
        try:
            with sharing_failures():
                yield
                self._wait_for_end()
        finally:
            self._closed.set()
            for thread in threads:  # JAX crashes if its connection ends under a call
                thread.join(_LAST_SECONDS)
            _pod = None

    def _wait_for_end(self) -> None:
        seconds = self.limits.shutdown
        try:
            if self.store.wait_for_all("end", seconds):
                if self.store.process_id == 0:
                    self.store.put_first(_FAILURE, "null")  # ends the threads that wait for one
                return
        except StoreLostError:
            self._end_without_store()
        self.end(LOST, f"some of the other processes did not end within {seconds} s")

    # Ending ----------------------------------------------------------------------------------

    def end(
        self,
        code: int,
        sentence: str,
        *,
        own_code: int | None = None,
        details: str = "",
        stacks: Path | None = None,
    ) -> NoReturn:
        """As `end_run`. own_code, details: exit code and further lines of this process alone."""
        self._ending.acquire()  # and never released: one thread alone publishes and prints
        text = f"{self.name(self.store.process_id)}: {sentence}"
        failure = {"code": code, "sentence": text, "stacks": str(stacks or "")}
        self._leave(self._publish(failure), own_code, details)

    def share(self, error: BaseException) -> NoReturn:
        """As `share_failure`."""
        if isinstance(error, KeyboardInterrupt):
            self.end(LOST, "interrupted (Ctrl-C)", own_code=INTERRUPTED)
        if sentence := self._describe(error):
            self.end(LOST if isinstance(error, UnreachableError) else USER_ERROR, sentence)
        if is_runtime_error(error) and not is_out_of_memory(error):
            time.sleep(self.limits.heartbeat + 2 * self._interval)  # a thread ends this process
        lines = traceback.format_exception(error)
        text = f"failed, which is a bug or a broken machine ({lines[-1].strip()[:300]})"
        self.end(LOST, text, own_code=FAILED, details="".join(lines))

    def runtime_failed(self) -> NoReturn:
        """For JAX's runtime, which stops a process that cannot reach process 0."""
        time.sleep(_STORE_SECONDS / 2)  # for a thread that knows more
        self._end_without_store()

    def _publish(self, failure: dict) -> dict:
        """Writes the failure if it is the first one; the first one."""
        result = [failure]

        def write() -> None:  # in a thread, since nothing limits the time of a write
            with contextlib.suppress(StoreLostError):
                if not self.store.put_first(_FAILURE, json.dumps(failure)):
                    result.append(json.loads(self.store.get(_FAILURE, _STORE_SECONDS) or "null"))

        _run_within(_STORE_SECONDS, write)
        return result[-1] or failure

    def _leave(
        self,
        failure: dict,
        own_code: int | None = None,
        details: str = "",
        has_store: bool = True,
    ) -> NoReturn:
        """Prints why, lets the others read it, and ends this process. Acquire `_ending` before."""
        newline = "\n" if sys.stdout.isatty() else ""  # after the progress line
        text = f"{newline}error: {failure['sentence']}\n{details}"
        _run_within(_STORE_SECONDS, lambda: print(text, file=sys.stderr, end="", flush=True))
        if stacks := failure.get("stacks"):
            _run_within(
                _STORE_SECONDS, lambda: write_stacks(storage_path(stacks), self.store.process_id)
            )
        if has_store:
            _run_within(_LAST_SECONDS, self._let_others_read)
        end_process(own_code or failure["code"])

    def _let_others_read(self) -> None:
        me, count = self.store.process_id, self.store.process_count
        with contextlib.suppress(StoreLostError):
            if me:
                self.store.put(f"{_LEFT}/{me}", "")
                return
            while len(self.store.items(_LEFT).keys() | self._lost) < count - 1:
                time.sleep(0.05)

    def _end_without_store(self) -> NoReturn:
        self._ending.acquire()
        sentence = (
            f"{self.name(0)}: the store of the run does not answer"
            if self.store.process_id == 0
            else f"lost {self.name(0)}, through which the processes are connected"
        )
        sentence += "; start the same command again on every host"
        self._leave({"code": LOST, "sentence": sentence}, has_store=False)

    # Threads ---------------------------------------------------------------------------------

    def _await_failure(self) -> None:
        """Ends this process when the run's first failure is published, or the store is lost."""
        text = None
        while text is None and not self._closed.is_set():
            try:
                text = self.store.get(_FAILURE, _WEEK)
            except StoreLostError:
                if not self._closed.is_set():
                    self._end_without_store()
        if failure := json.loads(text or "null"):
            self._ending.acquire()
            self._leave(failure)

    def _beat(self) -> None:
        while not self._closed.wait(self._interval):
            with contextlib.suppress(StoreLostError):  # the thread above ends the process
                self.heartbeats.beat()
                self.stop_requested |= self.store.stop_notice()

    def _check_beats(self) -> None:
        previous = time.monotonic()
        while not self._closed.wait(self._interval):
            now = time.monotonic()
            if now - previous > self.limits.heartbeat:
                self.end(
                    LOST,
                    f"did not run for {now - previous:.0f} s, longer than --heartbeat-timeout, so "
                    "the others have given it up; start the same command again on every host",
                )
            previous = now
            if now - self.heartbeats.answered > self.limits.heartbeat:
                self._end_without_store()
            if self.store.process_id == 0:
                self._check_others()

    def _check_others(self) -> None:
        for process, (_, age) in enumerate(self.heartbeats.received()):
            if process and age > self.limits.heartbeat:
                self._lost.add(str(process))
                self.end(
                    LOST,
                    f"lost {self.name(process)}: no sign of life for {age:.0f} s; "
                    "start the same command again on every host",
                )


def _run_within(seconds: float, function: Callable[[], None]) -> None:
    """Runs a function in a thread; returns when it has, or after some seconds."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
