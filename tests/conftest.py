"""Every test sees eight fake CPU devices, so that meshes are exercised without hardware.

The compiler spends little on making machine code fast: programs here run for milliseconds and
compile for seconds.
"""

import os

os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    )
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest


@pytest.fixture(scope="module")
def x64():
    """Everything in the module that asks for it, float64."""
    with jax.enable_x64(True):
        yield
