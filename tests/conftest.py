"""Every test sees eight fake CPU devices, so that meshes are exercised without hardware.

The compiler spends little on making machine code fast: programs here run for milliseconds and
compile for seconds.
"""

import atexit
import gc
import os
import shutil
import tempfile

# What a test process compiles, it and its subprocesses read again. JAX looks here at its import.
# Each process of pytest-xdist has a folder of its own: JAX writes entries without a lock.
MADE = "tttjax-tests-"
if MADE in os.environ.get("JAX_COMPILATION_CACHE_DIR", MADE):
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix=MADE)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest

from tttjax.runtime import progress

pytest_plugins = ["helpers.tiny_runs", "helpers.scripts"]  # `data` and `make_run`; `shell`

FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
FLAGS.append("--xla_cpu_parallel_codegen_split_count=1")  # small programs are not worth more
if jax.__version_info__ < (0, 11):  # XLA stops at a flag that it does not know
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # a third of the time to compile

# Read when the first device is asked for, not at import; subprocesses of tests inherit them.
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TTTJAX_COMPILATION_CACHE"] = "off"  # the user's own stays as it is
# A process has one place for the code of models that transformers loads, and none of the user's.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
progress.QUIET_SECONDS = 3600.0  # what tests capture does not depend on the machine's speed


# Traced programs are many small objects that live on: looking through them finds no garbage.
gc.freeze()
gc.set_threshold(100_000, 20, 20)


LONGEST = (
    *("test_meta_gradient.py", "test_reference.py", "test_mixers.py", "test_meshes.py"),
    "test_notebooks.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long modules first, so that all test processes end at about the same time."""

    def order(item: pytest.Item) -> tuple[bool, bool]:
        return item.path.name not in LONGEST, item.get_closest_marker("slow") is None

    items.sort(key=order)


@pytest.fixture(scope="session")
def buckets(tmp_path_factory):
    """Emulators of gs:// and s3://, which this process and its subprocesses use from now on."""
    from helpers.bucket_emulators import Emulators

    with Emulators() as emulators:
        os.environ |= emulators.environment
        os.environ["TTTJAX_DATA_CACHE"] = str(tmp_path_factory.mktemp("cache") / "data")
        yield emulators


@pytest.fixture(params=["gs", "s3"])
def bucket(request, buckets, tmp_path):
    """A folder in a bucket of its own."""
    return f"{request.param}://bkt/{tmp_path.name}"


@pytest.fixture(scope="module")
def x64():
    """Everything in the module that asks for it, float64."""
    with jax.enable_x64(True):
        yield
