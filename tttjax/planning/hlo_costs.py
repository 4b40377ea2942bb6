"""FLOPs and bytes of one launch of a compiled program, from the shapes in its text.

Matrix products count, at 2 FLOPs per multiply-add, and attention by cuDNN its visible pairs
(`primitives.py`). A launch reads its operands and writes its results once; of arrays that it
slices, or updates in place, only the slices.
"""

from collections.abc import Iterator
from typing import NamedTuple

from tttjax.planning.flops import mean_keys
from tttjax.planning.hlo import Computation, HloProgram, Instruction
from tttjax.planning.primitives import FLASH_ATTENTION

CUDNN_ATTENTION = dict(
    zip(
        ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"),
        FLASH_ATTENTION.values(),
        strict=True,
    )
)  # products of each
SLICES = ("dynamic-slice", "slice", "gather")
UPDATE = "dynamic-update-slice"


class LaunchCost(NamedTuple):
    """flops: 0 of a Pallas kernel, which hides them. wide_flops: those of float32 operands."""

    flops: float
    wide_flops: float
    bytes: float


def cost_of(program: HloProgram, computation: Computation, instruction: Instruction) -> LaunchCost:
    """Of one run of an instruction that launches something."""
    target = instruction.attribute(r'custom_call_target="([^"]+)"')
    moved = _moved(program, computation, instruction)
    if target in CUDNN_ATTENTION:
        return LaunchCost(_attention(computation, instruction, target), 0.0, moved)
    products = list(_products(program, computation, instruction))
    wide = sum(flops for flops, kind in products if kind == "f32")
    return LaunchCost(sum(flops for flops, _ in products), wide, moved)


def _attention(computation: Computation, instruction: Instruction, target: str) -> float:
    query = computation.by_name[instruction.operands[0]]
    ((_, _, (batch, length, heads, head_dim)),) = query.arrays
    window = int(instruction.attribute(r'"sliding_window_length": ?"?(\d+)')) or length
    pairs = batch * heads * length * mean_keys(length, window)
    return CUDNN_ATTENTION[target] * 2 * pairs * head_dim


def _products(
    program: HloProgram, computation: Computation, instruction: Instruction
) -> Iterator[tuple[float, str]]:
    """(FLOPs, kind of the left operand) of the matrix products of an instruction."""
    if instruction.opcode == "dot":
        left = computation.by_name[instruction.operands[0]].arrays[0]
        axes = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}").split(",")
        flops = 2.0 * instruction.elements
        for axis in filter(None, axes):
            flops *= left.shape[int(axis)]
        yield flops, left.kind
    elif instruction.opcode == "fusion":
        (called,) = instruction.called["calls"]
        inner = program.computations[called]
        for part in inner.instructions:
            yield from _products(program, inner, part)


def _moved(program: HloProgram, computation: Computation, instruction: Instruction) -> float:
    operands = [computation.by_name.get(name) for name in instruction.operands]
    if instruction.opcode in SLICES:
        return 2 * instruction.bytes
    if instruction.opcode == UPDATE:
        return 2 * operands[1].bytes if operands[1] else 0.0
    if instruction.opcode != "fusion":
        return instruction.bytes + sum(operand.bytes for operand in operands if operand)
    (called,) = instruction.called["calls"]
    inner = program.computations[called]
    parameters = (part for part in inner.instructions if part.opcode == "parameter")
    return sum(_read(inner, parameter) for parameter in parameters) + _written(inner)


def _read(computation: Computation, parameter: Instruction) -> float:
    """Bytes that a fusion reads of a parameter."""
    total = 0.0
    for user in _users(computation, parameter.name):
        is_source = user.operands[0] == parameter.name
        if user.opcode in SLICES and is_source:
            total += user.bytes
        elif not (user.opcode == UPDATE and is_source):
            return parameter.bytes
    return min(total, parameter.bytes)


def _users(computation: Computation, name: str) -> Iterator[Instruction]:
    return (i for i in computation.instructions if name in i.operands)


def _written(computation: Computation) -> float:
    """Bytes that a fusion writes."""
    root = computation.root
    results = [root]
    if root.opcode == "tuple":
        results = [computation.by_name[name] for name in root.operands]
    total = 0.0
    for result in results:
        while result.opcode == "bitcast":
            result = computation.by_name[result.operands[0]]
        updates = result.opcode == UPDATE
        total += computation.by_name[result.operands[1]].bytes if updates else result.bytes
    return total
