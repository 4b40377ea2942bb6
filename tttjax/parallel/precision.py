"""float64, which JAX computes in float32 unless it is asked for."""

import contextlib

import jax

from tttjax.config import Config


def x64_if_configured(config: Config) -> contextlib.AbstractContextManager:
    """A context in which float64 is float64, if any dtype of the configuration is that."""
    model, inner = config.model, config.inner
    requested = "float64" in (model.param_dtype, model.compute_dtype, inner.fast_dtype)
    return jax.enable_x64(True) if requested else contextlib.nullcontext()
