"""Collectives of a compiled program, as often as they run in a step."""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, replace

from tttjax.planning.hlo import Computation, HloProgram, Instruction
from tttjax.planning.hlo_runs import Runs
from tttjax.planning.primitives import Transfer

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_ON_MESH = re.compile(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}")


@dataclass(frozen=True)
class Collectives:
    """The collectives of one device in a step.

    unknown_loops: loops with collectives whose trip count is not in the text, counted once.
    """

    transfers: tuple[Transfer, ...]
    unknown_loops: int = 0


def collectives(program: HloProgram, runs: Runs) -> Collectives:
    """The collectives of an optimised program."""
    totals: defaultdict[Transfer, float] = defaultdict(float)
    own = {name: _own_transfers(c) for name, c in program.computations.items()}
    for name, times in runs.times.items():
        for transfer in own[name]:
            totals[transfer] += times
    transfers = tuple(replace(transfer, times=times) for transfer, times in totals.items())
    return Collectives(transfers, sum(_reaches(program, own, body) for body in runs.unknown))


def _reaches(program: HloProgram, own: dict[str, list[Transfer]], name: str) -> bool:
    """Whether a computation, or one that it calls, has collectives."""
    if own[name]:
        return True
    instructions = program.computations[name].instructions
    called = {c for i in instructions for names in i.called.values() for c in names}
    return any(_reaches(program, own, c) for c in called if c in own)


def _own_transfers(computation: Computation) -> list[Transfer]:
    plain: list[Transfer] = []
    async_parts: list[Transfer] = []
    for instruction in computation.instructions:
        if instruction.opcode.removesuffix("-start") in KINDS:
            # TPUs split an async collective over several fusions; only its start counts.
            part_of_several = "chain_id=" in instruction.rest
            transfer = read_transfer(instruction, computation.operand_bytes(instruction))
            (async_parts if part_of_several else plain).append(transfer)
    starts_async = any("AsyncCollectiveStart" in i.rest for i in computation.instructions)
    return plain + (async_parts if starts_async else [])


def read_transfer(instruction: Instruction, operand_bytes: float) -> Transfer:
    """One collective; operand_bytes: of what it reads."""
    result_bytes = instruction.bytes
    if instruction.opcode.endswith("-start") and instruction.type.startswith("("):
        result_bytes = max(result_bytes - operand_bytes, 0.0)  # the tuple includes the operands
    size = max(operand_bytes, result_bytes)
    return Transfer(instruction.opcode.removesuffix("-start"), size, _group_size(instruction.rest))


def _group_size(attributes: str) -> int:
    """Devices of a replica group: a list, an iota, or mesh axes (or parts of axes: `'data':(2)4` is
    four devices, two apart)."""
    if listed := _LISTED.search(attributes):
        return len(listed[1].split(","))
    if iota := _IOTA.search(attributes):
        return int(iota[2])
    if on_mesh := _ON_MESH.search(attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", on_mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", on_mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 2
