"""How often each computation of a compiled program runs.

A loop runs as often as the compiler states. Where it states nothing, the integers that the loop's
condition depends on are computed from the program's constants, step by step, as in
`constant_folding` for jaxprs: bounds of loops over tiles follow from a chunk's position. What
depends on data is not known: such a loop counts once, a conditional as its longest branch.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tttjax.planning.hlo import Computation, HloProgram, Instruction
from tttjax.planning.hlo_integers import Value, evaluate, is_small

CONTROL = ("parameter", "while", "conditional", "call")
MAX_TRIP_COUNT = 100_000  # of a loop that is run step by step

_STATED = r"known_trip_count\W+n\W+(\d+)"


@dataclass(frozen=True)
class Runs:
    """times: runs of each computation in a step. unknown: bodies of loops that count once, because
    their length is not known."""

    times: Counter[str]
    unknown: frozenset[str]


def count_runs(program: HloProgram) -> Runs:
    """Counts from the entry; a fusion's computation runs as often as the fusion."""
    runner = _Runner(program)
    times, _ = runner.run(program.entry, ())
    return Runs(times, frozenset(runner.unknown))


@dataclass
class _Runner:
    program: HloProgram
    unknown: set[str] = field(default_factory=set)
    _results: dict[Any, tuple[Counter[str], Value]] = field(default_factory=dict)
    _prepared: dict[str, tuple[Counter[str], list[Instruction]]] = field(default_factory=dict)
    _has_open_loops: dict[str, bool] = field(default_factory=dict)

    def run(self, name: str, arguments: Sequence[Value]) -> tuple[Counter[str], Value]:
        """(runs of the computation and all that it calls, its result)."""
        key = name, _freeze(arguments)
        if key not in self._results:
            self._results[key] = self._run(self.program.computations[name], arguments)
        return self._results[key]

    def _run(
        self, computation: Computation, arguments: Sequence[Value]
    ) -> tuple[Counter[str], Value]:
        fixed, steps = self.prepare(computation)
        times = Counter(fixed)
        known: dict[str, Value] = {}
        for instruction in steps:
            inputs = [known.get(name) for name in instruction.operands]
            if instruction.opcode == "parameter":
                index = int(instruction.rest.partition(")")[0])
                value = arguments[index] if index < len(arguments) else None
            elif instruction.opcode == "while":
                inner, value = self._loop(instruction, inputs[0])
                times.update(inner)
            elif instruction.opcode == "conditional":
                inner, value = self._branch(instruction, inputs)
                times.update(inner)
            elif (called := self._callee(instruction)) is not None:
                inner, value = self.run(called, inputs)
                times.update(inner)
            else:
                value = evaluate(instruction, inputs)
            if value is not None:
                known[instruction.name] = value
        return times, known.get(computation.root.name)

    def prepare(self, computation: Computation) -> tuple[Counter[str], list[Instruction]]:
        """(runs that do not depend on arguments, the instructions that may)."""
        if computation.name not in self._prepared:
            times: Counter[str] = Counter({computation.name: 1})
            steps = []
            for instruction in computation.instructions:
                called = self._callee(instruction)
                if instruction.opcode in CONTROL or is_small(instruction):
                    steps.append(instruction)
                elif called is not None:
                    times.update(self.run(called, ())[0])
            self._prepared[computation.name] = times, steps
        return self._prepared[computation.name]

    def _callee(self, instruction: Instruction) -> str | None:
        """The computation that a call, fusion or asynchronous start runs once."""
        called = instruction.called.get("calls")
        if instruction.opcode == "call":
            called = instruction.called.get("to_apply", called)
        known = called and called[0] in self.program.computations
        return called[0] if called and known else None

    def _loop(self, instruction: Instruction, initial: Value) -> tuple[Counter[str], Value]:
        (body,), (condition,) = instruction.called["body"], instruction.called["condition"]
        stated = int(instruction.attribute(_STATED) or 0)
        if stated and not self.has_open_loops(body):
            return _scaled(self.run(body, ())[0], stated), None
        times: Counter[str] = Counter()
        carry = initial
        for _ in range(stated or MAX_TRIP_COUNT):
            if not stated:
                inner, goes_on = self.run(condition, [carry])
                if goes_on is None:
                    return self._guess_loop(body, condition), None
                times.update(inner)
                if not goes_on:
                    return times, carry
            inner, carry = self.run(body, [carry])
            times.update(inner)
        return (times, carry) if stated else (self._guess_loop(body, condition), None)

    def _guess_loop(self, body: str, condition: str) -> Counter[str]:
        """The runs of a loop of unknown length, by the only constant of its condition, or once."""
        limit = self._only_constant(condition)
        if not limit:
            self.unknown.add(body)
        return _scaled(self.run(body, [])[0], limit or 1)

    def _only_constant(self, condition: str) -> int:
        """The only integer constant of a condition, which is its limit; 0 if there are others, or
        it is where a loop counts down to."""
        computation = self.program.computations[condition]
        names = [name for i in computation.instructions if (name := self._callee(i))]
        parts = [computation, *(self.program.computations[name] for name in names)]
        constants = {
            int(match[0])
            for part in parts
            for i in part.instructions
            if i.opcode == "constant" and re.match(r"[su]32\[\]", i.type)
            if (match := re.match(r"-?\d+", i.rest))
        }
        return max(constants.pop(), 0) if len(constants) == 1 else 0

    def _branch(
        self, instruction: Instruction, inputs: Sequence[Value]
    ) -> tuple[Counter[str], Value]:
        called = instruction.called
        names = called.get("branch_computations") or [
            *called["false_computation"],
            *called["true_computation"],
        ]
        index, arguments = inputs[0], list(inputs[1:])
        if "branch_computations" not in called:
            arguments.reverse()
        if index is not None:
            chosen = min(max(int(index), 0), len(names) - 1)
            return self.run(names[chosen], [arguments[chosen]])
        runs = [self.run(name, [a])[0] for name, a in zip(names, arguments, strict=True)]
        return max(runs, key=self._length), None

    def _length(self, times: Counter[str]) -> float:
        computations = self.program.computations
        return sum(n * len(computations[name].instructions) for name, n in times.items())

    def has_open_loops(self, name: str) -> bool:
        """Whether a loop of no stated length, or a conditional, is nested in a computation."""
        if name not in self._has_open_loops:
            self._has_open_loops[name] = any(
                i.opcode == "conditional"
                or (i.opcode == "while" and not i.attribute(_STATED))
                or any(
                    self.has_open_loops(called)
                    for key in ("calls", "body", "to_apply")
                    for called in i.called.get(key, [])
                    if called in self.program.computations
                )
                for i in self.program.computations[name].instructions
            )
        return self._has_open_loops[name]


def _scaled(times: Counter[str], factor: int) -> Counter[str]:
    return Counter({name: n * factor for name, n in times.items()})


def _freeze(value: Value) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_freeze, value))
    return None if value is None else (value.shape, value.dtype.str, value.tobytes())
