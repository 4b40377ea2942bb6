"""Size of one sequence's decode state."""

import math
from typing import Any

import jax

from tttjax.config import InnerConfig
from tttjax.evaluation.report.entries import Member
from tttjax.models.transformer import Transformer
from tttjax.parallel.precision import x64_if_configured
from tttjax.runs.eval_setup import build_eval_model
from tttjax.ttt.outer_loss import make_inner_loop


def state_bytes(member: Member, length: int) -> int:
    """Bytes of the decode state after `length` tokens of one sequence.

    Counts buffered keys and values, recurrent states and, with TTT, the sequence's fast weights
    with the state of their update rule. Shared weights are not counted.
    """
    with x64_if_configured(member.config):
        model, inner = build_eval_model(member.run, member.mode, member.learning)
        shapes = [jax.eval_shape(lambda: model.init_state(length))]
        if member.mode != "off":
            shapes.append(jax.eval_shape(lambda: _fast_state(model, inner)))
    leaves = jax.tree.leaves(shapes)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _fast_state(model: Transformer, inner: InnerConfig) -> tuple[Any, Any]:
    loop = make_inner_loop(inner)
    fast = model.init(jax.random.key(0)).fast
    fast = jax.tree.map(lambda w: w.astype(loop.fast_dtype), fast)
    return fast, loop.rule.init(fast)
