"""The shortest time that a step can take on a pod, and what a run of such steps costs.

Three bounds, each as if the other two cost nothing and everything overlapped:

    compute       matrix products of the program / bfloat16 peak of all chips
    memory        weights and optimizer read and written once, what is kept for the backward pass
                  written and read once / bandwidth to memory
    interconnect  bytes that a collective must move through a chip's links / what all links of a
                  chip carry together: 2 (n-1)/n of an all-reduce among n, (n-1)/n of the others

The longest of them bounds the step from below and MFU, model FLOPs / (step time x peak), from
above. No real step reaches it: `days_at` gives a run's length at an MFU that you expect.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tttjax.config import Config
from tttjax.planning.count import Transfer
from tttjax.planning.memory import Memory
from tttjax.planning.topologies import Topology

DAY = 24 * 3600.0


@dataclass(frozen=True)
class Bounds:
    """Seconds of a step by what bounds it, and what follows."""

    compute: float
    memory: float
    interconnect: float
    mfu: float

    @property
    def step(self) -> float:
        return max(self.compute, self.memory, self.interconnect)

    @property
    def limit(self) -> str:
        """Which of the three is the longest."""
        times = {name: getattr(self, name) for name in ("compute", "memory", "interconnect")}
        return max(times, key=times.__getitem__)


@dataclass(frozen=True)
class StepBound:
    """A run of the whole recipe at one MFU."""

    mfu: float
    step_seconds: float
    tokens_per_day: float
    days: float
    chip_hours: float


def make_bounds(
    topology: Topology,
    program_flops: float,
    model_flops: float,
    memory: Memory,
    transfers: Sequence[Transfer],
) -> Bounds:
    """program_flops, model_flops: of a step over all devices. The rest is of one device."""
    chip = topology.chip
    assert chip is not None
    peak = chip.flops * topology.chips
    moved = 2 * memory.state + 2 * (memory.trajectory + memory.activations)
    compute = program_flops / peak
    memory_time = moved * chip.devices / chip.bandwidth
    link_time = sum(t.times * wire_bytes(t) / topology.link(t.group) for t in transfers)
    step = max(compute, memory_time, link_time)
    return Bounds(compute, memory_time, link_time, model_flops / (step * peak))


def wire_bytes(transfer: Transfer) -> float:
    """Bytes that one device must send in a collective."""
    n = transfer.group
    if transfer.kind == "collective-permute":
        return transfer.bytes
    return transfer.bytes * (n - 1) / n * (2 if transfer.kind == "all-reduce" else 1)


def make_cost(config: Config, topology: Topology, model_flops: float, mfu: float) -> StepBound:
    """The recipe's `train.steps` at an MFU."""
    assert topology.chip is not None
    seconds = model_flops / (mfu * topology.chip.flops * topology.chips)
    tokens = config.train.batch_size * config.train.seq_len
    days = config.train.steps * seconds / DAY
    return StepBound(
        mfu=mfu,
        step_seconds=seconds,
        tokens_per_day=tokens * DAY / seconds,
        days=days,
        chip_hours=days * 24 * topology.chips,
    )
