"""What a compiled program launches on a GPU: kernels, library calls, copies and collectives."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from tttjax.planning.hlo import HloProgram, Instruction
from tttjax.planning.hlo_runs import Runs

# Instructions that only name, arrange or call others; also those that end with -done.
NO_LAUNCH = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("while", "conditional", "call", "async-start", "async-update", "opt-barrier"),
}


@dataclass(frozen=True)
class Kernel:
    """One instruction that launches something. kind: its library or custom call, or its HLO
    operation. times: per step."""

    name: str
    kind: str
    times: int


def kernels(program: HloProgram, runs: Runs) -> tuple[Kernel, ...]:
    """Everything that one device launches in a step."""
    fused = _fused(program)
    return tuple(
        Kernel(instruction.name, _kind(instruction), runs.times[name])
        for name, computation in program.computations.items()
        if name not in fused and runs.times[name]
        for instruction in computation.instructions
        if instruction.opcode not in NO_LAUNCH and not instruction.opcode.endswith("-done")
    )


def count_launches(launched: Iterable[Kernel]) -> dict[str, int]:
    """Launches in a step by kind, the most frequent first."""
    total: Counter[str] = Counter()
    for kernel in launched:
        total[kernel.kind] += kernel.times
    return dict(total.most_common())


def _fused(program: HloProgram) -> set[str]:
    """Computations that are part of one kernel."""
    return {
        called
        for computation in program.computations.values()
        for instruction in computation.instructions
        if instruction.opcode == "fusion"
        for called in instruction.called["calls"]
    }


def _kind(instruction: Instruction) -> str:
    if instruction.opcode == "custom-call":
        return instruction.attribute(r'custom_call_target="([^"]+)"')
    if instruction.opcode == "fusion":
        return instruction.attribute(r'"kind":"(__[a-z_]+)"') or "fusion"
    return re.sub("-start$", "", instruction.opcode)
