"""Planning: memory, FLOPs, collectives, time and cost of one recipe on one pod."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tttjax.config import Config, check_mesh, parameter_count
from tttjax.parallel.mesh import MESH_AXES
from tttjax.planning.bounds import Bounds, RecipeCost, make_bounds, make_cost, wire_bytes
from tttjax.planning.flops import TrainFlops, train_flops_by_part
from tttjax.planning.kernels import KernelTime, count_launches, roofline
from tttjax.planning.memory import Memory
from tttjax.planning.primitives import Transfer
from tttjax.planning.program import CompiledStep, Program, compile_program, trace
from tttjax.planning.propose import find_fitting
from tttjax.planning.topologies import Topology, open_mesh
from tttjax.runtime import progress
from tttjax.training.attention_kernels import describe_kernels

DEFAULT_SHARE = 0.75  # of a GPU's memory, which JAX's allocator takes


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in a step. bytes: of their arrays. sent: by one device."""

    kind: str
    count: int
    bytes: float
    sent: float


@dataclass(frozen=True)
class Plan:
    """One recipe on one pod. FLOPs are of a step over all devices, bytes of one device.

    fits: None if the memory capacity is unknown. needed: bytes, the total of memory. flops: of the
    method, by part. program_flops: of the program.
    attention: the kernels used, and why. launches: kernels, library calls, copies and collectives
    that a GPU is given in a step, by kind. kernels: the roofline of each, the longest first; empty
    but for GPUs. bounds, cost: None for devices not in the table.
    """

    name: str
    topology: str
    chips: int
    mesh: dict[str, int]
    recipe: dict[str, Any]
    parameters: int
    attention: str
    fits: bool | None
    needed: float
    capacity: float
    memory: Memory
    flops: TrainFlops
    program_flops: float
    traffic: tuple[Traffic, ...]
    launches: dict[str, int]
    kernels: tuple[KernelTime, ...]
    bounds: Bounds | None
    cost: RecipeCost | None
    trace_seconds: float
    compile_seconds: float
    notes: tuple[str, ...]
    changes: dict[str, str]
    proposal: "Plan | None" = None

    @property
    def kernel_seconds(self) -> float:
        """Seconds per step of all kernels, one after the other."""
        return sum(time.seconds for time in self.kernels)

    def to_dict(self, kernels: bool = False) -> dict[str, Any]:
        """The plan as values for JSON, with totals and the limiting bound.

        kernels: with the roofline of each.
        """
        values = asdict(self) | {"proposal": self.proposal and self.proposal.to_dict(kernels)}
        values["kernel_seconds"] = self.kernel_seconds
        values["kernels"] = [time.to_dict() for time in self.kernels] if kernels else []
        values["memory"]["total"] = self.memory.total
        values["flops"]["total"] = self.flops.total
        if self.bounds:
            values["bounds"] |= {"step": self.bounds.step, "limit": self.bounds.limit}
        return values


def make_plan(
    config: Config, topology: Topology, *, name: str = "", mfu: float = 0.4, propose: bool = True
) -> Plan:
    """Traces and compiles the train step for a pod, and derives what it needs and costs.

    mfu: expected MFU, for the cost of the run. propose: search for a recipe that fits if this one
    does not; every recipe tried is compiled.
    Raises UserError if the mesh does not fit, or libtpu is missing.
    """
    plan = _plan(config, topology, name, mfu, {})
    if plan.fits is not False or not propose:
        return plan
    plans: dict[Config, Plan] = {}

    def fits(changed: Config) -> bool:
        plans[changed] = _plan(changed, topology, name, mfu, {})
        return bool(plans[changed].fits)

    candidate = find_fitting(config, topology.devices, plan.memory, plan.capacity, fits)
    if candidate is None:
        return plan
    proposal = replace(plans[candidate.config], changes=candidate.changes)
    return replace(plan, proposal=proposal)


def _plan(
    config: Config, topology: Topology, name: str, mfu: float, changes: dict[str, str]
) -> Plan:
    mesh = check_mesh(config, topology.devices)
    devices = open_mesh(topology, mesh)
    attention = describe_kernels(config, topology.platform)
    progress.rename_activity(f"tracing the train step for {topology.name}")
    program = trace(config, topology, devices)
    progress.rename_activity(f"compiling the train step for {topology.name}")
    compiled = compile_program(program)
    memory, transfers = compiled.memory, compiled.transfers
    tokens = config.train.batch_size * config.train.seq_len
    per_token = train_flops_by_part(config.model, config.inner, config.train.seq_len)
    flops = TrainFlops(*(value * tokens for value in asdict(per_token).values()))
    bounds = cost = None
    kernels: tuple[KernelTime, ...] = ()
    if topology.accelerator:
        kernels = roofline(compiled.kernels, topology, program.count.flops / topology.devices)
        bounds = make_bounds(topology, program.count.flops, flops.total, memory, transfers)
        cost = make_cost(config, topology, flops.total, min(mfu, bounds.mfu))
    return Plan(
        name=name,
        topology=topology.name,
        chips=topology.num_chips,
        mesh={axis: getattr(mesh, axis) for axis in MESH_AXES},
        recipe={
            "batch_size": config.train.batch_size,
            "seq_len": config.train.seq_len,
            "accum_steps": config.train.accum_steps,
            "steps": config.train.steps,
        },
        parameters=parameter_count(config.model)["total"],
        attention=attention,
        fits=None if not compiled.available else _fits(compiled),
        needed=memory.total,
        capacity=compiled.available,
        memory=memory,
        flops=flops,
        program_flops=program.count.flops,
        traffic=_traffic(transfers),
        launches=count_launches(compiled.kernels),
        kernels=kernels,
        bounds=bounds,
        cost=cost,
        trace_seconds=program.seconds,
        compile_seconds=compiled.seconds,
        notes=tuple(_notes(topology, program, compiled)),
        changes=changes,
    )


def _fits(compiled: CompiledStep) -> bool:
    return not compiled.out_of_memory and compiled.memory.total <= compiled.available


def _traffic(transfers: Sequence[Transfer]) -> tuple[Traffic, ...]:
    by_kind: defaultdict[str, list[Transfer]] = defaultdict(list)
    for transfer in transfers:
        by_kind[transfer.kind].append(transfer)
    return tuple(
        Traffic(
            kind,
            count=round(sum(t.times for t in same_kind)),
            bytes=sum(t.times * t.bytes for t in same_kind),
            sent=sum(t.times * wire_bytes(t) for t in same_kind),
        )
        for kind, same_kind in sorted(by_kind.items())
    )


def _notes(topology: Topology, program: Program, compiled: CompiledStep) -> list[str]:
    """Caveats of the numbers."""
    notes = []
    if compiled.out_of_memory:
        notes.append("the compiler ran out of memory: collectives are those of the traced program")
    share = compiled.memory.total / compiled.available if compiled.available else 0.0
    if topology.platform == "cuda" and DEFAULT_SHARE < share <= 1:
        notes.append(
            f"by default JAX takes {DEFAULT_SHARE:.0%} of a GPU's memory; set "
            "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 for this recipe"
        )
    if program.count.unknown_loops:
        notes.append(
            f"{program.count.unknown_loops} loops of unknown length are counted once: the FLOPs of "
            "the program are a lower bound"
        )
    if compiled.unknown_loops:
        notes.append(
            f"{compiled.unknown_loops} loops of the compiled program, of unknown length, are "
            "counted once: their collectives and launches are a lower bound"
        )
    return notes
