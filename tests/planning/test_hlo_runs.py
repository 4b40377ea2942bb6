"""How often computations of compiled programs run, their loop bounds computed or stated."""

import jax
import jax.numpy as jnp
import pytest

from tttjax.planning.hlo import parse_hlo
from tttjax.planning.hlo_runs import count_runs

X = jnp.ones((8, 8))


def runs_of(opcode: str, text: str) -> tuple[float, int]:
    """(times that instructions of this kind run, loops of unknown length)."""
    program = parse_hlo(text)
    runs = count_runs(program)
    times = sum(
        runs.times[name] * sum(i.opcode == opcode for i in computation.instructions)
        for name, computation in program.computations.items()
    )
    return times, len(runs.unknown)


def compiled(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


def sines(x, start, stop):
    return jax.lax.fori_loop(start, stop, lambda _, x: jnp.sin(x), x)


def test_bounds_that_follow_from_a_counter_are_computed():
    """Tiles of causal attention: chunk i of a scan reads tiles i // 4 .. i // 2."""

    def chunks(x):
        def step(x, i):
            return sines(x, i // 4, jnp.minimum(i // 2 + 1, 3)), None

        return jax.lax.scan(step, x, jnp.arange(8))[0]

    expected = sum(min(i // 2 + 1, 3) - i // 4 for i in range(8))
    assert runs_of("sine", compiled(chunks, X)) == (expected, 0)


def test_a_backward_loop_uses_integers_of_the_forward():
    def loss(x):
        def step(x, i):
            stop = (i * 5) % 3 + 1
            return jax.lax.scan(
                lambda x, j: (jnp.where(j < stop, x @ x, x), None), x, jnp.arange(3)
            )[0], None

        return jnp.sum(jax.lax.scan(jax.checkpoint(step), x, jnp.arange(4))[0])

    times, unknown = runs_of("dot", compiled(jax.grad(loss), X))
    assert unknown == 0
    assert times >= 4 * 3 * 3


def test_conditionals_take_the_branch_of_their_counter():
    def chunks(x):
        def step(x, i):
            return jax.lax.cond(i > 2, lambda x: sines(x, 0, i), lambda x: x, x), None

        return jax.lax.scan(step, x, jnp.arange(6))[0]

    assert runs_of("sine", compiled(chunks, X)) == (3 + 4 + 5, 0)


def test_bounds_that_depend_on_data_are_reported():
    def down(x, n):
        return jax.lax.while_loop(lambda c: c[0] > -2, lambda c: (c[0] - 1, jnp.sin(c[1])), (n, x))

    assert runs_of("sine", compiled(lambda x, n: sines(x, 0, n), X, 5)) == (1, 1)
    assert runs_of("sine", compiled(down, X, 5)) == (1, 1)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("s32[] add(%a, %b)", 7 + -2),
        ("s32[] divide(%b, %three)", 0),
        ("s32[] remainder(%a, %three)", 1),
        ("s32[] clamp(%b, %a, %three)", 3),
        ("s32[] select(%yes, %b, %a)", -2),
        ("s32[] reshape(%last)", 30),
        ("s32[] bitcast(%second)", 20),
        ("s32[] shift-right-arithmetic(%b, %one)", -1),
        ("s32[] shift-right-logical(%a, %one)", 3),
    ],
)
def test_integers_by_hand(operation, expected):
    """As the limit of a loop."""
    text = f"""\
HloModule step

%condition (c: (s32[], s32[])) -> pred[] {{
  %c = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[] get-tuple-element(%c), index=1
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}}

%body (p: (s32[], s32[])) -> (s32[], s32[]) {{
  %p = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%p), index=0
  %limit.1 = s32[] get-tuple-element(%p), index=1
  %one.1 = s32[] constant(1)
  %next = s32[] add(%j, %one.1)
  ROOT %pair = (s32[], s32[]) tuple(%next, %limit.1)
}}

ENTRY %main () -> (s32[], s32[]) {{
  %a = s32[] constant(7)
  %b = s32[] constant(-2)
  %one = s32[] constant(1)
  %three = s32[] constant(3)
  %yes = pred[] constant(true)
  %list = s32[3]{{0}} constant({{10, 20, 30}})
  %last = s32[1]{{0}} dynamic-slice(%list, %a), dynamic_slice_sizes={{1}}
  %second = s32[1]{{0}} slice(%list), slice={{[1:2]}}
  %result = {operation}
  %first = s32[] constant(-3)
  %start = (s32[], s32[]) tuple(%first, %result)
  ROOT %loop = (s32[], s32[]) while(%start), condition=%condition, body=%body
}}
"""
    runs = count_runs(parse_hlo(text))
    assert (runs.times["body"], runs.unknown) == (expected + 3, frozenset())
