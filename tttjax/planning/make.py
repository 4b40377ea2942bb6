"""Planning: memory, FLOPs, collectives, time and cost of one recipe on one pod."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tttjax.config import Config, check_mesh, parameter_count
from tttjax.parallel.mesh import MESH_AXES
from tttjax.planning.bounds import Bounds, RecipeCost, make_bounds, make_cost, wire_bytes
from tttjax.planning.count import Transfer
from tttjax.planning.flops import TrainFlops, train_flops_by_part
from tttjax.planning.memory import Memory
from tttjax.planning.program import CompiledStep, Program, compile_program, trace
from tttjax.planning.propose import find_fitting
from tttjax.planning.topologies import Topology
from tttjax.runtime import progress
from tttjax.training.attention_kernels import describe_kernels


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

    fits: None if the memory capacity is unknown. needed: bytes; more than memory.total if the
    compiler ran out of memory. flops: of the method, by part. program_flops: of the program.
    attention: the kernels used, and why. bounds, cost: None for devices not in the table.
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
    bounds: Bounds | None
    cost: RecipeCost | None
    trace_seconds: float
    compile_seconds: float | None
    notes: tuple[str, ...]
    changes: dict[str, str]
    proposal: "Plan | None" = None

    def to_dict(self) -> dict[str, Any]:
        """The plan as values for JSON, with totals and the limiting bound."""
        values = asdict(self) | {"proposal": self.proposal and self.proposal.to_dict()}
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

    needed = _with_total_needed(plan)
    candidate = find_fitting(config, topology.devices, needed, plan.capacity, fits)
    if candidate is None:
        return plan
    proposal = replace(plans[candidate.config], changes=candidate.changes)
    return replace(plan, proposal=proposal)


def _with_total_needed(plan: Plan) -> Memory:
    """The memory by kind, with the difference to `plan.needed` added to `temporary`."""
    difference = max(plan.needed - plan.memory.total, -plan.memory.temporary)
    return replace(plan.memory, temporary=plan.memory.temporary + difference)


def _plan(
    config: Config, topology: Topology, name: str, mfu: float, changes: dict[str, str]
) -> Plan:
    kernels = describe_kernels(config, topology.platform, compile_locally=topology.compiles)
    progress.rename_activity(f"tracing the train step for {topology.name}")
    program = trace(config, topology)
    progress.rename_activity(f"compiling the train step for {topology.name}")
    compiled = compile_program(program) if topology.compiles else None
    memory = compiled.memory if compiled and compiled.memory else program.memory
    transfers = program.count.transfers
    if compiled and compiled.memory:
        transfers = compiled.transfers
    fits, needed, capacity = _fit(topology, memory, compiled)
    mesh = check_mesh(config, topology.devices)
    tokens = config.train.batch_size * config.train.seq_len
    per_token = train_flops_by_part(config.model, config.inner, config.train.seq_len)
    flops = TrainFlops(*(value * tokens for value in asdict(per_token).values()))
    bounds = cost = None
    if topology.accelerator:
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
        attention=kernels,
        fits=fits,
        needed=needed,
        capacity=capacity,
        memory=memory,
        flops=flops,
        program_flops=program.count.flops,
        traffic=_traffic(transfers),
        bounds=bounds,
        cost=cost,
        trace_seconds=program.seconds,
        compile_seconds=compiled.seconds if compiled else None,
        notes=tuple(_notes(config, program, compiled)),
        changes=changes,
    )


def _fit(
    topology: Topology, memory: Memory, compiled: CompiledStep | None
) -> tuple[bool | None, float, float]:
    """(fits, bytes needed, bytes available) on one device."""
    accelerator = topology.accelerator
    capacity = accelerator.memory / accelerator.devices if accelerator else 0.0
    if compiled and compiled.memory is None:
        return False, compiled.needed or memory.total, compiled.available or capacity
    if not capacity:
        return None, memory.total, 0.0
    return memory.total <= capacity, memory.total, capacity


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


def _notes(config: Config, program: Program, compiled: CompiledStep | None) -> list[str]:
    """Caveats of the numbers."""
    notes = []
    if compiled is None:
        notes.append(
            "memory and collectives are estimated from the traced program, because there is no "
            "compiler for this accelerator here"
        )
        if config.mesh.tensor > 1:
            notes.append(
                "the estimate does not include the sharding of layers by mesh.tensor and its "
                "collectives"
            )
    elif compiled.memory is None:
        notes.append("the compiler ran out of memory: bytes by kind and collectives are estimates")
    if program.count.unknown_loops:
        notes.append(
            f"{program.count.unknown_loops} loops of unknown length are counted once: the FLOPs of "
            "the program are a lower bound"
        )
    if compiled and compiled.unknown_loops:
        notes.append(
            f"collectives in {compiled.unknown_loops} loops of unknown length are counted once"
        )
    return notes
