"""Figures of the hosts of a run: devices at the start, then times and memory.

Every process gives its figures to process 0 with its heartbeats (`parallel.heartbeats`), at most
every two seconds, from their thread. A process without others knows its own.

All hosts take the same time for a step, since each waits in it for the others. The one that they
wait for is seen by what it does outside of the step: waiting for a batch, and other work of the
loop. A device that is slow itself is not seen here, but in a profile.
"""

import json
import math
import socket
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import groupby
from typing import Any

import jax

from tttjax.parallel.agreement import gather
from tttjax.parallel.pod import current_pod
from tttjax.runtime.memory import memory_use
from tttjax.training.start_account import StartAccount

WINDOW_SECONDS, WINDOW_STEPS = 10.0, 2  # figures are means over at least so much
SLOWER = 0.2  # a straggler's share of its time, above the median
PAUSE_SECONDS = 300.0  # between two lines about one straggler
OLD_SECONDS = 10.0  # the age of a figure from which on it is shown
BROADCAST_SECONDS = 6.0  # three heartbeats, after which all processes have a message
MOST_LINES = 16  # of hosts; more are grouped


@dataclass(frozen=True)
class Host:
    """A host at the start of a run. name: of the machine. devices: `4 x NVIDIA H100`."""

    name: str
    devices: str
    tttjax: str
    jax: str


@dataclass(frozen=True)
class HostFigures:
    """A host's last seconds in the loop. age: of these figures (s).

    step: its last finished one. step_seconds: mean; None if no step has ended. input, other:
    shares of the seconds, waiting for batches and in other work than steps. input_of_start: that
    share of all seconds of the start in the loop. memory_bytes, peak_bytes: of the fullest device,
    or of the process (memory_of).
    """

    step: int
    seconds: float
    step_seconds: float | None
    input: float
    other: float
    input_of_start: float
    memory_bytes: int
    peak_bytes: int
    memory_of: str
    age: float = 0.0


class Hosts:
    """The hosts of a run, by process; known where `jax.process_index()` is 0, which prints."""

    def __init__(self, account: StartAccount, clock: Callable[[], float] = time.monotonic):
        self.hosts: list[Host] = []
        self.account, self._clock, self._pod = account, clock, current_pod()
        self.me = self._pod.store.process_id if self._pod else 0
        self._samples: deque[tuple[float, int, tuple[float, ...]]] = deque(maxlen=1000)
        self._next_look = 0.0
        self._named: dict[int, float] = {}  # when a straggler was last named

    def exchange_devices(self) -> list[str]:
        """Exchanges devices and versions, and begins to send figures; lines for process 0."""
        devices = jax.local_devices()
        me = Host(
            name=socket.gethostname(),
            devices=f"{len(devices)} x {devices[0].device_kind}",
            **{package: metadata.version(package) for package in ("tttjax", "jax")},
        )
        if self._pod is None:
            self.hosts = [me]
            return []
        is_first = jax.process_index() == 0  # on TPUs not always the store's process 0
        self._pod.heartbeats.collects |= is_first
        texts = gather(self._pod, "devices", json.dumps(asdict(me)), is_first)
        self.hosts = [Host(**json.loads(text)) for text in texts]
        self._pod.heartbeats.payload = self.own_figures
        return describe_hosts(self.hosts)

    def own_figures(self) -> dict[str, Any]:
        """This process's figures; {} until the first step has ended. From one thread only."""
        samples, account = self._samples, self.account
        if account.step == (account.steps_before or 0):
            return {}
        now = (self._clock(), account.step, account.loop_seconds())
        samples.append(now)
        while (
            len(samples) > 2
            and now[0] - samples[1][0] >= WINDOW_SECONDS
            and now[1] - samples[1][1] >= WINDOW_STEPS
        ):
            samples.popleft()
        waited, device, host = (b - a for a, b in zip(samples[0][2], now[2], strict=True))
        total, steps = waited + device + host, now[1] - samples[0][1]
        if total <= 0:
            return {}
        try:
            memory = memory_use()
        except jax.errors.JaxRuntimeError:  # of a lost device, which the loop reports
            return {}
        return asdict(
            HostFigures(
                step=now[1],
                seconds=total,
                step_seconds=total / steps if steps else None,
                input=waited / total,
                other=host / total,
                input_of_start=now[2][0] / sum(now[2]),
                memory_bytes=memory.now,
                peak_bytes=memory.peak,
                memory_of=memory.where,
            )
        )

    def figures(self) -> list[HostFigures | None]:
        """Of all hosts, by process; None of one that has not sent any."""
        if self._pod is None:
            values = self.own_figures()
            return [HostFigures(**values) if values else None]
        return [
            HostFigures(**{k: v for k, v in values.items() if k != "beat"} | {"age": age})
            if "step" in values
            else None
            for values, age in self._pod.heartbeats.received()
        ]

    def next_step(self, seconds: float) -> int:
        """A step that begins after about so many seconds, or the next one."""
        own = self.figures()[self.me]
        step_seconds = own.step_seconds if own and own.step_seconds else seconds
        return self.account.step + 2 + math.ceil(seconds / max(step_seconds, 1e-3))

    def worst_input(self, own: float) -> tuple[float, str]:
        """The largest share of input, and of whom: (0.99, " (host 1)"), "" if it is this one.

        own: the share of this process.
        """
        worst, of = own, ""
        if self._pod is not None:
            for process, (values, age) in enumerate(self._pod.heartbeats.received()):
                if process != self.me and (share := values.get("input", 0.0)) > worst + 0.005:
                    old = f", {age:.0f} s ago" if age > OLD_SECONDS else ""
                    worst, of = share, f" (host {process}{old})"
        return worst, of

    def stragglers(self) -> list[str]:
        """A line for each host that the others wait for; none twice in PAUSE_SECONDS.

        Looks once in WINDOW_SECONDS, in which the figures of many hosts take less than 1 ms.
        """
        if self._clock() < self._next_look:
            return []
        self._next_look = self._clock() + WINDOW_SECONDS
        figures = {} if self._pod is None else dict(enumerate(self.figures()))
        recent = {
            i: f
            for i, f in figures.items()
            if f is not None and f.age < OLD_SECONDS and f.seconds > WINDOW_SECONDS / 2
        }
        now, lines = self._clock(), []
        for i, text in describe_stragglers(recent).items():
            if now - self._named.get(i, -PAUSE_SECONDS) >= PAUSE_SECONDS:
                self._named[i] = now
                lines.append(f"host {i} ({self.hosts[i].name}) {text}")
        return lines


def describe_stragglers(figures: dict[int, HostFigures]) -> dict[int, str]:
    """By process, why the others wait for it."""
    if len(figures) < 2:
        return {}
    typical = statistics.median_low(f.input + f.other for f in figures.values())
    return {
        process: f"holds up the others: of its time, {f.input:.0%} is waiting for input and "
        f"{f.other:.0%} other work outside of steps (both: median of all hosts {typical:.0%})"
        for process, f in figures.items()
        if f.input + f.other > typical + SLOWER
    }


def describe_hosts(hosts: Sequence[Host]) -> list[str]:
    """A line for each host; for more than MOST_LINES, for each group of equal neighbours."""
    if len(hosts) <= MOST_LINES:
        groups = [[(i, host)] for i, host in enumerate(hosts)]
    else:
        by_kind = groupby(enumerate(hosts), key=lambda item: replace(item[1], name=""))
        groups = [list(items) for _, items in by_kind]
    lines = []
    for group in groups:
        (first, host), (last, other) = group[0], group[-1]
        who = (
            f"host {first} ({host.name})"
            if first == last
            else f"hosts {first}-{last} ({host.name} to {other.name})"
        )
        each = "" if first == last else " each"
        lines.append(f"{who}: {host.devices}{each}; tttjax {host.tttjax}, jax {host.jax}")
    return lines
