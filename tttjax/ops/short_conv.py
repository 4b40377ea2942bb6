"""Causal depthwise convolution over a few tokens, with a recurrent state for decoding.

A kernel of J taps (usually 4) is J shifted multiply-adds: simpler and, on CPUs, faster than a
grouped convolution with one group per channel.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tttjax.types import Array


def short_conv(
    x_TC: Array, kernel_JC: Array, bias_C: Array | None, state_JC: Array | None
) -> tuple[Array, Array | None]:
    """y[t] = bias + sum_j kernel[j] x[t - (J - 1) + j]: the last tap is at the current token.

    C stands for any number of channel axes, the same in all arguments. `state_JC` holds the J-1
    inputs before x, oldest first; zeros, or no state, at the start of a sequence. Any T >= 0.
    Returns y [T, ...], summed in float32 at least and in the dtype of x, and the last J-1 inputs
    in the dtype of the state (None where none was given).
    """
    taps = kernel_JC.shape[0]
    if state_JC is None:
        previous_JC = jnp.zeros((taps - 1, *x_TC.shape[1:]), x_TC.dtype)
    else:
        previous_JC = state_JC.astype(x_TC.dtype)
    x_SC = jnp.concatenate([previous_JC, x_TC])
    y_TC = _shifted_sum(x_SC, kernel_JC, bias_C)
    return y_TC, None if state_JC is None else x_SC[x_TC.shape[0] :].astype(state_JC.dtype)


# Rematerialised: otherwise the backward pass would store J copies of x.
@partial(jax.checkpoint, prevent_cse=False)
def _shifted_sum(x_SC: Array, kernel_JC: Array, bias_C: Array | None) -> Array:
    """The valid convolution: [J-1+T, ...] -> [T, ...]."""
    wide = jnp.promote_types(x_SC.dtype, jnp.float32)
    taps = kernel_JC.shape[0]
    length = x_SC.shape[0] - (taps - 1)
    kernel_JC = kernel_JC.astype(wide)
    y_TC = kernel_JC[0] * x_SC[:length].astype(wide)
    for tap in range(1, taps):
        y_TC += kernel_JC[tap] * x_SC[tap : tap + length].astype(wide)
    if bias_C is not None:
        y_TC += bias_C.astype(wide)
    return y_TC.astype(x_SC.dtype)
