"""Roofline bounds on the time of a train step, and the cost of a run at an expected MFU.

Each of the three bounds assumes that everything overlaps and the other two cost nothing:

    compute       matrix products of the program / bfloat16 peak of all chips
    memory        parameters and optimizer state, and residuals of the forward pass, each read and
                  written once / memory bandwidth
    interconnect  bytes that collectives send through a chip's links / outgoing bandwidth of all
                  links of a chip: 2 (n-1)/n of an all-reduce among n, (n-1)/n of the others

The longest is a lower bound on the step time and gives an upper bound on MFU, model FLOPs / (step
time x peak). Real steps are slower: `make_cost` computes a run's length at an expected MFU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tttjax.config import Config
from tttjax.planning.memory import Memory
from tttjax.planning.primitives import Transfer
from tttjax.planning.topologies import Topology

DAY = 24 * 3600.0


@dataclass(frozen=True)
class Bounds:
    """Lower bounds on the seconds of a step, and the upper bound on MFU."""

    compute: float
    memory: float
    interconnect: float
    mfu: float

    @property
    def step(self) -> float:
        return max(self.compute, self.memory, self.interconnect)

    @property
    def limit(self) -> str:
        """Name of the longest bound."""
        times = {name: getattr(self, name) for name in ("compute", "memory", "interconnect")}
        return max(times, key=times.__getitem__)


@dataclass(frozen=True)
class RecipeCost:
    """Time and chip-hours of a whole run at one MFU."""

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
    """program_flops, model_flops: of a step, all devices. memory, transfers: of one device."""
    accelerator = topology.accelerator
    assert accelerator is not None
    peak = accelerator.flops * topology.num_chips
    bytes_moved = 2 * memory.state + 2 * (memory.trajectory + memory.activations)
    compute = program_flops / peak
    memory_time = bytes_moved * accelerator.devices / accelerator.bandwidth
    link_time = sum(t.times * wire_bytes(t) / topology.link(t.group_size) for t in transfers)
    step = max(compute, memory_time, link_time)
    return Bounds(compute, memory_time, link_time, model_flops / (step * peak))


def wire_bytes(transfer: Transfer) -> float:
    """Bytes that one device sends in a collective."""
    n = transfer.group_size
    if transfer.kind == "collective-permute":
        return transfer.bytes
    return transfer.bytes * (n - 1) / n * (2 if transfer.kind == "all-reduce" else 1)


def make_cost(config: Config, topology: Topology, model_flops: float, mfu: float) -> RecipeCost:
    """The cost of `train.steps` steps at an MFU."""
    assert topology.accelerator is not None
    seconds = model_flops / (mfu * topology.accelerator.flops * topology.num_chips)
    tokens = config.train.batch_size * config.train.seq_len
    days = config.train.steps * seconds / DAY
    return RecipeCost(
        mfu=mfu,
        step_seconds=seconds,
        tokens_per_day=tokens * DAY / seconds,
        days=days,
        chip_hours=days * 24 * topology.num_chips,
    )
