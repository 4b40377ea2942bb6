"""What a compiled program launches on a GPU, and a roofline of each launch.

Kernels, library calls, copies and collectives are launches. Each takes at least the longest of

    compute       its matrix products / bfloat16 peak; those of float32 operands run at half of it
    memory        bytes that it reads and writes / memory bandwidth
    interconnect  bytes that a collective sends / outgoing bandwidth
    launch        LAUNCH_SECONDS

Their sum is the time of a step in which every kernel is as fast as the chip allows and nothing
overlaps. A Pallas kernel hides its products: those kernels together get what the traced program has
more than the other launches.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from tttjax.planning.bounds import wire_bytes
from tttjax.planning.collectives import KINDS, read_transfer
from tttjax.planning.hlo import Computation, HloProgram, Instruction
from tttjax.planning.hlo_costs import cost_of
from tttjax.planning.hlo_runs import Runs
from tttjax.planning.topologies import Topology

# Between the starts of two empty kernels of one stream, without CUDA graphs; a round figure for
# NVIDIA GPUs of these generations, not measured here.
LAUNCH_SECONDS = 2.5e-6

PALLAS = ("__gpu$xla.gpu.triton", "triton_kernel_call_ffi")  # by version of JAX
LIMITS = ("compute", "memory", "interconnect", "launch")

# Instructions that only name, arrange or call others; also those that end with -done.
NO_LAUNCH = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("while", "conditional", "call", "async-start", "async-update", "opt-barrier"),
}


@dataclass(frozen=True)
class Kernel:
    """Launches of one kind for one operation. kind: its library or custom call, or its HLO
    operation. operation: JAX's name, with einsum's letters. times: per step.

    flops, bytes, sent: of all launches of a step; flops 0 of Pallas kernels until they are known.
    wide_flops: FLOPs of float32 operands. group_size: devices of a collective.
    """

    kind: str
    operation: str
    times: int
    flops: float = 0.0
    wide_flops: float = 0.0
    bytes: float = 0.0
    sent: float = 0.0
    group_size: int = 1


@dataclass(frozen=True)
class KernelTime:
    """The roofline of a kernel: seconds per step by limit."""

    kernel: Kernel
    compute: float
    memory: float
    interconnect: float
    launch: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.interconnect, self.launch)

    @property
    def limit(self) -> str:
        """Name of the longest."""
        return max(LIMITS, key=lambda name: getattr(self, name))

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        return asdict(self.kernel) | {"seconds": self.seconds, "limit": self.limit}


def kernels(program: HloProgram, runs: Runs) -> tuple[Kernel, ...]:
    """Everything that one device launches in a step, equal kinds of equal cost together."""
    fused = _fused(program)
    times: Counter[Kernel] = Counter()
    for name, computation in program.computations.items():
        if name in fused or not runs.times[name]:
            continue
        for instruction in computation.instructions:
            if instruction.opcode in NO_LAUNCH or instruction.opcode.endswith("-done"):
                continue
            times[_kernel(program, computation, instruction)] += runs.times[name]
    return tuple(
        replace(
            kernel,
            times=n,
            flops=n * kernel.flops,
            wide_flops=n * kernel.wide_flops,
            bytes=n * kernel.bytes,
            sent=n * kernel.sent,
        )
        for kernel, n in times.items()
    )


def count_launches(launched: Iterable[Kernel]) -> dict[str, int]:
    """Launches in a step by kind, the most frequent first."""
    total: Counter[str] = Counter()
    for kernel in launched:
        total[kernel.kind] += kernel.times
    return dict(total.most_common())


def roofline(
    launched: Iterable[Kernel], topology: Topology, program_flops: float
) -> tuple[KernelTime, ...]:
    """The time of every kernel, the longest first. program_flops: of a step, one device."""
    known = sum(kernel.flops for kernel in launched)
    hidden = max(program_flops - known, 0.0)
    pallas_bytes = sum(kernel.bytes for kernel in launched if kernel.kind in PALLAS)
    accelerator = topology.accelerator
    assert accelerator is not None
    result = []
    for kernel in launched:
        if kernel.kind in PALLAS:
            kernel = replace(kernel, flops=hidden * kernel.bytes / pallas_bytes)
        result.append(
            KernelTime(
                kernel,
                compute=(kernel.flops + kernel.wide_flops) / accelerator.flops,
                memory=kernel.bytes / accelerator.bandwidth,
                interconnect=kernel.sent / topology.link(kernel.group_size),
                launch=kernel.times * LAUNCH_SECONDS,
            )
        )
    return tuple(sorted(result, key=lambda time: -time.seconds))


def by_operation(times: Iterable[KernelTime]) -> list[list[KernelTime]]:
    """The kernels of each kind and operation, those that take longest first."""
    groups: defaultdict[tuple[str, str], list[KernelTime]] = defaultdict(list)
    for time in times:
        groups[time.kernel.kind, time.kernel.operation].append(time)
    return sorted(groups.values(), key=lambda group: -sum(time.seconds for time in group))


def _fused(program: HloProgram) -> set[str]:
    """Computations that are part of one kernel."""
    return {
        called
        for computation in program.computations.values()
        for instruction in computation.instructions
        if instruction.opcode == "fusion"
        for called in instruction.called["calls"]
    }


def _kernel(program: HloProgram, computation: Computation, instruction: Instruction) -> Kernel:
    """One launch."""
    kind, operation = _kind(instruction), _operation(instruction)
    if kind in KINDS:
        transfer = read_transfer(instruction, computation.operand_bytes(instruction))
        sent = wire_bytes(transfer)
        return Kernel(kind, operation, 1, sent=sent, group_size=transfer.group_size)
    cost = cost_of(program, computation, instruction)
    return Kernel(kind, operation, 1, cost.flops, cost.wide_flops, cost.bytes)


def _operation(instruction: Instruction) -> str:
    """The last parts of JAX's name: `td,dhk->thk/dot_general`."""
    parts = instruction.attribute(r'op_name="([^"]*)"').split("/")
    return "/".join(parts[-2:] if "->" in parts[-2:][0] else parts[-1:])


def _kind(instruction: Instruction) -> str:
    if instruction.opcode == "custom-call":
        return instruction.attribute(r'custom_call_target="([^"]+)"')
    if instruction.opcode == "fusion":
        return instruction.attribute(r'"kind":"(__[a-z_]+)"') or "fusion"
    return re.sub("-start$", "", instruction.opcode)
