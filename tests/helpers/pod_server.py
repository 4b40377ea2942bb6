"""Starts processes of `tttjax train` by forking, so that a test pays for the imports once.

Reads one JSON object per line: {"rank", "fault", "cwd", "words", "env", "stdout", "stderr"}
starts a process. Prints one per line: {"rank", "pid"} of a process that has started, {"rank",
"code"} of one that has ended; a negative code is a signal.
"""

import contextlib
import json
import os
import select
import sys
import time
import types
import warnings
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # as `tttjax train` does, before JAX is imported

import jax
import pod_faults

import tttjax.training.loop
import tttjax.training.start_facts  # noqa: F401 (here, since forks need not import it again)
from tttjax.errors import UserError
from tttjax.exit_codes import LOST
from tttjax.parallel.pod import end_run


def main() -> None:
    running: dict[int, int] = {}
    buffer = b""
    say(ready=True)
    while True:
        if select.select([0], [], [], 0.02)[0]:
            data = os.read(0, 1 << 16)
            if not data:
                os._exit(0)
            *lines, buffer = (buffer + data).split(b"\n")
            for order in map(json.loads, lines):
                running[start(order)] = order["rank"]
        with contextlib.suppress(ChildProcessError):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                say(rank=running.pop(pid), code=os.waitstatus_to_exitcode(status))


def start(order: dict) -> int:
    with warnings.catch_warnings(action="ignore"):  # JAX's about fork: no thread runs yet
        pid = os.fork()
    if pid == 0:
        become(order)
    say(rank=order["rank"], pid=pid)
    return pid


def say(**message: object) -> None:
    print(json.dumps(message), flush=True)


def become(order: dict) -> None:
    """Turns this fork into a process of a run."""
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    from tttjax.cli.main import main as run

    inject(order["fault"])
    try:
        code = run(order["words"])
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def inject(fault: str) -> None:
    """Makes this process see other files, or do something else instead of training.

    `FAULT at a batch` trains, and fails when it takes the first batch; `sleeps` at the seventh.
    `slow` and `slow, ...` are those of `pod_faults.py`.
    """
    if fault.startswith("slow"):
        return pod_faults.at_step(fault)
    from tttjax.data.pipeline import TrainStream
    from tttjax.training import loop, start_facts

    name = fault.removesuffix(" at a batch")
    if name == "other code":
        start_facts._code_content = lambda package: "0123"
    if name.startswith("other data "):
        folder = Path(name.removeprefix("other data "))
        read = start_facts.read_manifest
        start_facts.read_manifest = lambda _: read(folder)
    if name == "stale disk":
        start_facts.completed_checkpoints = lambda folder: []
    if fault == "sleeps":
        take, taken = TrainStream.__next__, []

        def sleeping_next(stream):
            taken.append(1)
            if len(taken) == 7:
                print("sleeping", flush=True)
                time.sleep(1000)
            return take(stream)

        TrainStream.__next__ = sleeping_next
    elif fault.endswith(" at a batch"):
        TrainStream.__next__ = lambda self: INSTEAD[name]()
    elif fault:
        loop.train = lambda *args, **options: train_instead(INSTEAD.get(name, INSTEAD["waits"]))


def train_instead(action):
    print("all agree", flush=True)
    return action()


def fail(error: BaseException):
    def action() -> None:
        raise error

    return action


FULL = "RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"
INSTEAD = {
    "waits": lambda: time.sleep(1000),
    "done": lambda: types.SimpleNamespace(interrupted=False),
    "saved": lambda: types.SimpleNamespace(interrupted=True),
    "hangs": lambda: end_run(LOST, "no step for 60 s"),
    "bug": fail(ValueError("the planned bug")),
    "user error": fail(UserError("the planned sentence")),
    "full device": fail(jax.errors.JaxRuntimeError(FULL)),
    "error of JAX": fail(ValueError("UNKNOWN: Gloo failed: the planned error")),
    "Ctrl-C": fail(KeyboardInterrupt()),
}


if __name__ == "__main__":
    main()
