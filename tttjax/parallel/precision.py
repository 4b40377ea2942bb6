"""float64 in JAX, which computes in float32 unless x64 is enabled."""

import contextlib

import jax

from tttjax.config import Config


def x64_if_configured(config: Config) -> contextlib.AbstractContextManager:
    """A context that enables x64 if any dtype of the configuration is float64."""
    model, inner = config.model, config.inner
    requested = "float64" in (model.param_dtype, model.compute_dtype, inner.fast_dtype)
    return jax.enable_x64(True) if requested else contextlib.nullcontext()
