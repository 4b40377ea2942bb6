"""Agreement of all processes before the first step: same command, code, data and work directory.

A difference trains a model that nobody asked for, or hangs in the first collective.
"""

import contextlib
import json
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tttjax.errors import UserError
from tttjax.io.paths import if_reachable
from tttjax.parallel.coordinator import name_processes
from tttjax.parallel.pod import Pod
from tttjax.runtime.ending import at_sudden_end
from tttjax.runtime.progress import report_activity

_FACTS, _NONCE = "facts", ".start-"
_SHARED_SECONDS = 5.0  # until a file shows on all hosts of a shared disk


def differences(facts: Mapping[str, str], reference: Mapping[str, str]) -> list[str]:
    """The names whose values differ; a name that one side lacks differs."""
    names = dict.fromkeys((*reference, *facts))
    return [name for name in names if facts.get(name) != reference.get(name)]


def describe_differences(
    facts: Mapping[str, str], reference: Mapping[str, str], reference_process: str
) -> str | None:
    """A sentence with the first values that differ; None if all agree."""
    names = differences(facts, reference)
    if not names:
        return None
    shown = "; ".join(
        f"{name} is {facts.get(name, 'missing')} here and {reference.get(name, 'missing')} in "
        f"{reference_process}"
        for name in names[:3]
    ) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown}: start every process with the same command, code, data and environment"


def agree(pod: Pod, facts: Mapping[str, str], workdir: Path) -> None:
    """Returns when all processes have the same facts and the same work directory.

    Touches no device. Raises UserError in a process that differs from process 0; that ends the
    others too, as does one that has not come so far within `pod.limits.init`.
    """
    store, me, seconds = pod.store, pod.store.process_id, pod.limits.init
    with report_activity("comparing this process with the others"), contextlib.ExitStack() as stack:
        if me == 0:
            nonce = stack.enter_context(_nonce_file(workdir))
            store.put(f"{_FACTS}/0", json.dumps({"nonce": nonce, "facts": dict(facts)}))
        else:
            text = store.get(f"{_FACTS}/0", seconds)
            if text is None:
                raise UserError(f"{pod.name(0)} was not ready within {seconds} s")
            reference = json.loads(text)
            if sentence := describe_differences(facts, reference["facts"], pod.name(0)):
                raise UserError(sentence)
            _check_shared(workdir, reference["nonce"], pod.name(0))
            store.put(f"{_FACTS}/{me}", "")
        if not store.wait_for_all("agreed", seconds):
            missing = {*map(str, range(store.process_count))} - store.items(_FACTS).keys()
            names = name_processes([int(i) for i in missing]) if missing else "another process"
            raise UserError(f"{names} did not come to the first step within {seconds} s")


def gather(pod: Pod, name: str, value: str, receives: bool) -> list[str]:
    """Where it `receives`, the values of all processes, by id; [] elsewhere, without waiting.

    Raises UserError if one of them does not call this within `pod.limits.init`.
    """
    store, values = pod.store, []
    store.put(f"{name}/{store.process_id}", value)
    for process in range(store.process_count if receives else 0):
        text = store.get(f"{name}/{process}", pod.limits.init)
        if text is None:
            raise UserError(f"{pod.name(process)} has no {name} after {pod.limits.init} s")
        values.append(text)
    return values


@contextlib.contextmanager
def _nonce_file(workdir: Path) -> Iterator[str]:
    """A file in the work directory that only this start has; removed, with folders made for it."""
    nonce = secrets.token_hex(8)
    path = workdir / f"{_NONCE}{nonce}"
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]

    def remove() -> None:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process uses it
            for folder in made:
                folder.rmdir()

    with at_sudden_end(lambda _: remove()):
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
            yield nonce
        finally:
            with if_reachable(workdir):
                remove()


def _check_shared(workdir: Path, nonce: str, other: str) -> None:
    end = time.monotonic() + _SHARED_SECONDS
    while True:
        with contextlib.suppress(OSError):  # listed, since network disks remember missing names
            if f"{_NONCE}{nonce}" in [path.name for path in workdir.iterdir()]:
                return
        if time.monotonic() > end:
            raise UserError(
                f"--workdir={workdir} is not the folder that it is in {other}: all processes need "
                "one work directory, on a file system that all hosts share"
            )
        time.sleep(0.1)
