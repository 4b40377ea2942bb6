"""Collectives of a compiled program, read from its text, with the lengths of the loops around them.

`compiled.as_text()` is one computation after the other; this walks them from the entry, into the
bodies of loops, fusions and calls. A loop's rounds are those that the compiler states, or else the
one number that its condition compares with.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from tttjax.planning.count import Transfer

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "c64": 8, "c128": 16}  # the others carry their number of bits in the name

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
    """transfers: its own. calls: (name of another, rounds or None if unknown)."""

    transfers: list[Transfer] = field(default_factory=list)
    calls: list[tuple[str, float]] = field(default_factory=list)
    constants: list[int] = field(default_factory=list)
    starts_async: bool = False
    loops: list[tuple[str, str, int]] = field(default_factory=list)  # body, condition, stated


@dataclass(frozen=True)
class Collectives:
    """What one device takes part in each step.

    unknown_loops: loops around collectives whose length is not in the text, counted once.
    """

    transfers: tuple[Transfer, ...]
    unknown_loops: int = 0


def collectives(text: str) -> Collectives:
    """The collectives of an optimised program, as `compiled.as_text()` gives it."""
    computations, entry = _read(text)
    found: defaultdict[Transfer, float] = defaultdict(float)
    unknown = 0

    def visit(name: str, times: float) -> bool:
        """Adds what is in a computation; whether there is anything."""
        nonlocal unknown
        here = computations[name]
        for transfer in here.transfers:
            found[transfer] += times
        any_inside = bool(here.transfers)
        for called, rounds in here.calls:
            if called in computations:
                any_inside |= visit(called, times * rounds)
        for body, condition, stated in here.loops:
            rounds = stated or _rounds(computations, condition)
            inside = visit(body, times * (rounds or 1))
            unknown += inside and not rounds
            any_inside |= inside
        return any_inside

    visit(entry, 1.0)
    totals = tuple(Transfer(t.kind, t.bytes, t.group, times) for t, times in found.items())
    return Collectives(totals, unknown)


def _rounds(computations: dict[str, _Computation], condition: str) -> int:
    """The number that a condition compares its counter with; 0 if it is not one number."""
    here = computations[condition]
    numbers = set(here.constants)
    for called, _ in here.calls:
        if called in computations:
            numbers |= set(computations[called].constants)
    return numbers.pop() if len(numbers) == 1 else 0


def _read(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry = ""
    for name, is_entry, lines in _bodies(text):
        computations[name] = _computation(lines)
        entry = name if is_entry else entry
    return computations, entry


def _bodies(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """(name, whether it is the entry, lines) of every computation.

    The settings of a kernel may break its line, and go on at the left edge.
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
    pieces: list[Transfer] = []
    for line in lines:
        match = _LINE.match(line)
        if match is None:
            continue
        name, type_text, operation, rest = match.groups()
        sizes[name] = _bytes(type_text)
        if operation == "constant" and re.match(r"[su]32\[\]", type_text):
            result.constants.append(int(re.match(r"-?\d+", rest)[0]))  # type: ignore[index]
        elif operation == "while":
            called = dict(_CALLED.findall(rest))
            stated = _STATED.search(rest)
            names = (called["body"].lstrip("%"), called["condition"].lstrip("%"))
            result.loops.append((*names, int(stated[1]) if stated else 0))
        elif operation.removesuffix("-start") in KINDS:
            transfer = _transfer(operation, type_text, rest, sizes)
            # TPUs do a collective piece by piece inside other fusions; the first piece counts.
            (pieces if "chain_id=" in rest else result.transfers).append(transfer)
        else:
            for key, value in _CALLED.findall(rest):
                if key != "to_apply" or operation == "call":
                    names_called = _NAME.findall(value) or [value]
                    result.calls += [(called_name, 1.0) for called_name in names_called]
        result.starts_async |= "AsyncCollectiveStart" in rest
    if result.starts_async:
        result.transfers += pieces
    return result


def _transfer(operation: str, type_text: str, rest: str, sizes: dict[str, float]) -> Transfer:
    given = sum(sizes.get(name, 0.0) for name in _NAME.findall(rest.partition(")")[0]))
    got = _bytes(type_text)
    if operation.endswith("-start") and type_text.startswith("("):
        got = max(got - given, 0.0)  # the tuple holds the operands too
    return Transfer(operation.removesuffix("-start"), max(given, got), _group(rest))


def _group(rest: str) -> int:
    """Devices that talk to each other: listed, by a rule, or by axes of a mesh (or parts of them,
    as in `'data':(2)4`: four, two apart)."""
    if listed := _LISTED.search(rest):
        return len(listed[1].split(","))
    if iota := _IOTA.search(rest):
        return int(iota[2])
    if on_mesh := _ON_MESH.search(rest):
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
