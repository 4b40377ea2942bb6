"""Custom inner rules and losses of a recipe file, as the inner loop takes them, with checks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from tttjax.config.custom_code import CustomCode
from tttjax.config.schema import InnerConfig
from tttjax.errors import UserError
from tttjax.models.transformer import Transformer
from tttjax.ttt.chunk import InnerLoss, LossInputs
from tttjax.types import Array, PyTree

_CURE = "the fast form of the meta-gradient cannot differentiate it: set inner.form=reference"


def custom_rule(code: CustomCode, inner: InnerConfig) -> optax.GradientTransformation:
    """The file's `inner_rule` for a configuration. Raises UserError if it is no rule."""
    assert code.inner_rule is not None
    rule = code.inner_rule(inner)
    if not isinstance(rule, optax.GradientTransformation):
        raise UserError(
            f"inner_rule of {code.path} returned {type(rule).__name__}; return an optax "
            "transformation, such as optax.sgd(1.0)"
        )
    return rule


def custom_loss(code: CustomCode) -> InnerLoss:
    """The file's `inner_loss`, which raises UserError if the result is no scalar."""
    own = code.inner_loss
    assert own is not None

    def loss(inputs: LossInputs) -> Array:
        result = jnp.asarray(own(inputs))
        if result.shape or not jnp.issubdtype(result.dtype, jnp.floating):
            raise UserError(
                f"inner_loss of {code.path} returned {result.dtype}{list(result.shape)}; return a "
                "scalar, such as jnp.mean(chunk.nll_C, where=chunk.mask_C)"
            )
        return result

    return loss


def check_fast_rule(rule: optax.GradientTransformation, fast: PyTree) -> None:
    """Raises UserError for a rule that the fast form of the meta-gradient cannot differentiate.

    An update must not depend on the weights, as weight decay does: the fast form undoes updates
    before it knows the weights that they started from.
    """

    def changes(g: PyTree, state: PyTree, fast: PyTree) -> PyTree:
        return rule.update(g, state, fast)

    jaxpr = jax.make_jaxpr(changes)(fast, jax.eval_shape(rule.init, fast), fast)
    _refuse_traced_constants("rule", jaxpr)
    if _depends_on(jaxpr.jaxpr, len(jax.tree.leaves(fast))):
        raise UserError(f"the inner rule reads the fast weights (as weight decay does); {_CURE}")


def check_fast_loss(loss: InnerLoss, model: Transformer, chunk_size: int, fast: PyTree) -> None:
    """Raises UserError for a loss that the fast form cannot differentiate, forward then back."""
    C, D, V = chunk_size, model.config.embed_dim, model.config.vocab_size
    wide = jnp.promote_types(model.compute_dtype, jnp.float32)
    nll_C = jax.ShapeDtypeStruct((C,), wide)
    h_CD, head_DV = (jax.ShapeDtypeStruct(n, model.compute_dtype) for n in ((C, D), (D, V)))
    mask, target = np.ones(C, bool), np.zeros(C, np.int32)  # no traced values

    def change(nll_C: Array, h_CD: Array, head_DV: Array, fast: PyTree) -> Array:
        def value(nll_C: Array, h_CD: Array, head_DV: Array, fast: PyTree) -> Array:
            return loss(LossInputs(nll_C, mask, target, h_CD, head_DV, fast))

        inputs = nll_C, h_CD, head_DV, fast
        return jax.jvp(value, inputs, inputs)[1]

    try:
        jaxpr = jax.make_jaxpr(jax.grad(change))(nll_C, h_CD, head_DV, fast)
    except (TypeError, NotImplementedError) as error:
        raise UserError(
            f"the inner loss has no forward derivative, as with jax.custom_vjp ({error}); {_CURE}"
        ) from error
    _refuse_traced_constants("loss", jaxpr)


def _refuse_traced_constants(what: str, jaxpr: ClosedJaxpr) -> None:
    if any(isinstance(value, jax.core.Tracer) for value in jaxpr.consts):
        raise UserError(
            f"the inner {what} uses a traced value from outside of it, such as a weight; {_CURE}, "
            "or learn the rates by inner.learn_lr"
        )


def _depends_on(jaxpr: Jaxpr, last: int) -> bool:
    """Whether an output may depend on one of the `last` inputs: not if it is multiplied by 0."""
    tainted = set(jaxpr.invars[len(jaxpr.invars) - last :])
    for equation in jaxpr.eqns:
        literals = [x.val for x in equation.invars if isinstance(x, Literal)]
        is_zero = equation.primitive.name == "mul" and any(np.all(x == 0) for x in literals)
        variables = [x for x in equation.invars if not isinstance(x, Literal)]
        if not is_zero and tainted.intersection(variables):
            tainted.update(equation.outvars)
    return any(not isinstance(x, Literal) and x in tainted for x in jaxpr.outvars)
