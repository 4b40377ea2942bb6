"""Fixtures of a tiny run: configuration, data, compilation cache."""

import os
from pathlib import Path

import pytest
from helpers.paths import TINY

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
def tiny(data):
    """tiny(*overrides, arg="static") -> configuration of `tiny_run.py`."""

    def make(*overrides, arg="static"):
        return load_config(f"{TINY}:{arg}", [f"data.sources={data}", *overrides])

    return make
