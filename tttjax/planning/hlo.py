"""Collectives of a compiled program, parsed from its HLO text, with loop trip counts.

The parser visits the computations of `compiled.as_text()` from the entry into loop bodies, fusions
and calls. The trip count of a loop is the one that the compiler states, or else the only constant
of its condition.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from tttjax.planning.count import Transfer

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "c64": 8, "c128": 16}  # other types have their number of bits in the name

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_ON_MESH = re.compile(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}")
_STATED = re.compile(r"known_trip_count\W+n\W+(\d+)")


@dataclass
class _Computation:
    """transfers: its own. calls: names of computations that it calls once."""

    transfers: list[Transfer] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    constants: list[int] = field(default_factory=list)
    starts_async: bool = False
    loops: list[tuple[str, str, int]] = field(
        default_factory=list
    )  # body, condition, trip count (0 if not stated)


@dataclass(frozen=True)
class Collectives:
    """The collectives of one device in a step.

    unknown_loops: loops with collectives whose trip count is not in the text, counted once.
    """

    transfers: tuple[Transfer, ...]
    unknown_loops: int = 0


def collectives(text: str) -> Collectives:
    """The collectives of an optimised program; text: of `compiled.as_text()`."""
    computations, entry = _parse(text)
    total_times: defaultdict[Transfer, float] = defaultdict(float)
    unknown = 0

    def visit(name: str, times: float) -> bool:
        """Adds the collectives of a computation; returns whether there are any."""
        nonlocal unknown
        computation = computations[name]
        for transfer in computation.transfers:
            total_times[transfer] += times
        has_any = bool(computation.transfers)
        for called in computation.calls:
            if called in computations:
                has_any |= visit(called, times)
        for body, condition, stated in computation.loops:
            trip_count = stated or _trip_count(computations, condition)
            body_has_any = visit(body, times * (trip_count or 1))
            unknown += body_has_any and not trip_count
            has_any |= body_has_any
        return has_any

    visit(entry, 1.0)
    totals = tuple(
        Transfer(t.kind, t.bytes, t.group_size, times) for t, times in total_times.items()
    )
    return Collectives(totals, unknown)


def _trip_count(computations: dict[str, _Computation], condition: str) -> int:
    """The only integer constant of a loop condition; 0 if there is not exactly one."""
    constants = set(computations[condition].constants)
    for called in computations[condition].calls:
        if called in computations:
            constants |= set(computations[called].constants)
    return constants.pop() if len(constants) == 1 else 0


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry = ""
    for name, is_entry, lines in _bodies(text):
        computations[name] = _computation(lines)
        entry = name if is_entry else entry
    return computations, entry


def _bodies(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """(name, whether it is the entry, lines) of every computation.

    The backend config of a kernel may contain line breaks, also before unindented text.
    """
    name, is_entry = "", False
    lines: list[str] = []
    for line in text.splitlines():
        if (head := _HEAD.match(line)) and not line.startswith(("HloModule", " ")):
            name, is_entry, lines = head[2], bool(head[1]), []
        elif name and (line == "}" or line.startswith("}, execution_thread")):
            yield name, is_entry, lines
            name = ""
        elif name:
            lines.append(line)


def _computation(lines: list[str]) -> _Computation:
    result = _Computation()
    sizes: dict[str, float] = {}
    async_parts: list[Transfer] = []
    for line in lines:
        match = _LINE.match(line)
        if match is None:
            continue
        name, type_text, operation, operands = match.groups()
        sizes[name] = _bytes(type_text)
        if operation == "constant" and re.match(r"[su]32\[\]", type_text):
            result.constants.append(int(re.match(r"-?\d+", operands)[0]))  # type: ignore[index]
        elif operation == "while":
            called = dict(_CALLED.findall(operands))
            stated = _STATED.search(operands)
            names = (called["body"].lstrip("%"), called["condition"].lstrip("%"))
            result.loops.append((*names, int(stated[1]) if stated else 0))
        elif operation.removesuffix("-start") in KINDS:
            transfer = _transfer(operation, type_text, operands, sizes)
            # TPUs split an async collective over several fusions; only its start counts.
            (async_parts if "chain_id=" in operands else result.transfers).append(transfer)
        else:
            for key, value in _CALLED.findall(operands):
                if key != "to_apply" or operation == "call":
                    result.calls += _NAME.findall(value) or [value]
        result.starts_async |= "AsyncCollectiveStart" in operands
    if result.starts_async:
        result.transfers += async_parts
    return result


def _transfer(operation: str, type_text: str, operands: str, sizes: dict[str, float]) -> Transfer:
    operand_bytes = sum(sizes.get(name, 0.0) for name in _NAME.findall(operands.partition(")")[0]))
    result_bytes = _bytes(type_text)
    if operation.endswith("-start") and type_text.startswith("("):
        result_bytes = max(result_bytes - operand_bytes, 0.0)  # the tuple includes the operands
    size = max(operand_bytes, result_bytes)
    return Transfer(operation.removesuffix("-start"), size, _group_size(operands))


def _group_size(operands: str) -> int:
    """Devices of a replica group: a list, an iota, or mesh axes (or parts of axes: `'data':(2)4` is
    four devices, two apart)."""
    if listed := _LISTED.search(operands):
        return len(listed[1].split(","))
    if iota := _IOTA.search(operands):
        return int(iota[2])
    if on_mesh := _ON_MESH.search(operands):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", on_mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", on_mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 2


def _bytes(type_text: str) -> float:
    total = 0.0
    for kind, dimensions in _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", type_text)):
        bits = re.match(r"[a-z]+(\d+)", kind)
        width = BYTES.get(kind) or (int(bits[1]) / 8 if bits else 0)
        total += width * math.prod(int(n) for n in dimensions.split(",") if n)
    return total
