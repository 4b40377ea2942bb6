"""Optimised HLO, the text of `compiled.as_text()`, as computations of instructions."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

BYTES = {"pred": 1, "c64": 8, "c128": 16}  # other types have their number of bits in the name

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$", re.DOTALL)
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)"
    r"=(\{[^}]*\}|%?[\w.\-]+)"
)


class ArrayType(NamedTuple):
    """kind: as in `bf16`. width: bytes of an element."""

    kind: str
    width: float
    shape: tuple[int, ...]

    @property
    def bytes(self) -> float:
        return self.width * math.prod(self.shape)


@dataclass(frozen=True)
class Instruction:
    """One line. type: its text, with layout. rest: the text after the opening parenthesis, operands
    and attributes."""

    name: str
    type: str
    opcode: str
    rest: str
    is_root: bool = False

    @cached_property
    def operands(self) -> list[str]:
        """Names of the instructions that it reads."""
        return _NAME.findall(self.rest.partition(")")[0])

    @cached_property
    def called(self) -> dict[str, list[str]]:
        """Names of the computations that it calls, by attribute."""
        return {k: _NAME.findall(v) or [v] for k, v in _CALLED.findall(self.rest)}

    @cached_property
    def arrays(self) -> list[ArrayType]:
        """Of its result; of all parts of a tuple."""
        return parse_type(self.type)

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)

    @property
    def elements(self) -> int:
        return sum(math.prod(array.shape) for array in self.arrays)

    def attribute(self, pattern: str) -> str:
        """The first group of a regular expression in `rest`; "" without a match."""
        match = re.search(pattern, self.rest)
        return match[1] if match else ""


@dataclass(frozen=True)
class Computation:
    """A list of instructions, operands before their users."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @cached_property
    def root(self) -> Instruction:
        marked = (i for i in reversed(self.instructions) if i.is_root)
        return next(marked, self.instructions[-1])

    def operand_bytes(self, instruction: Instruction) -> float:
        """Bytes of what an instruction reads."""
        return sum(self.by_name[n].bytes for n in instruction.operands if n in self.by_name)


@dataclass(frozen=True)
class HloProgram:
    """The computations of a program; entry: the name of the first that runs."""

    computations: dict[str, Computation]
    entry: str


def parse_hlo(text: str) -> HloProgram:
    """The program of a text."""
    computations = {}
    entry = ""
    for name, is_entry, lines in _bodies(text):
        parsed = map(_instruction, lines)
        computations[name] = Computation(name, tuple(i for i in parsed if i is not None))
        entry = name if is_entry else entry
    return HloProgram(computations, entry)


def parse_type(text: str) -> list[ArrayType]:
    """The arrays of a type, without layouts."""
    result = []
    for kind, dimensions in _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", text)):
        bits = re.match(r"[a-z]+(\d+)", kind)
        width = BYTES.get(kind) or (int(bits[1]) / 8 if bits else 0)
        result.append(ArrayType(kind, width, tuple(int(n) for n in dimensions.split(",") if n)))
    return result


def _instruction(line: str) -> Instruction | None:
    match = _LINE.match(line)
    if match is None:
        return None
    root, name, type_text, opcode, rest = match.groups()
    return Instruction(name, type_text, opcode, rest, bool(root))


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
