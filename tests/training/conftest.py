"""Fixtures of a tiny run: configuration, data, compilation cache."""

import os
from pathlib import Path

import jax
import pytest
from helpers.paths import TINY
from jax.experimental.compilation_cache import compilation_cache

from tttjax.config import load_config
from tttjax.data.preparation import prepare


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared data set of bytes: two files of the standard library."""
    folder = tmp_path_factory.mktemp("data") / "prepared"
    library = Path(os.__file__).parent
    prepare([str(library / f"{name}.py") for name in ("argparse", "ast")], folder, num_workers=1)
    return folder


@pytest.fixture(scope="module")
def tiny(data, compiled):
    """tiny(*overrides, arg="static") -> configuration of `tiny_run.py`."""

    def make(*overrides, arg="static"):
        return load_config(f"{TINY}:{arg}", [f"data.sources={data}", *overrides])

    return make


@pytest.fixture(scope="session")
def compiled_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", autouse=True)
def compiled(compiled_folder):
    """A shared compilation cache, since these tests run the same few programs many times."""
    settings = {
        "jax_compilation_cache_dir": str(compiled_folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield compiled_folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
