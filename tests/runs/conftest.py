"""One run with fast weights and one compiled model for the commands that generate and read."""

import functools

import pytest

import tttjax.cli.generate
import tttjax.cli.read
import tttjax.cli.sessions
from tttjax.cli.model_arguments import load_from_args


@pytest.fixture(scope="session")
def run(make_run):
    """The work directory of a model with one layer, whose MLP is fast."""
    return str(make_run("runs", suffix_layers=1, fast_mlp=True, mixers=("window",)))


@pytest.fixture(scope="session")
def open_once():
    """As `load_from_args`, but models of the same options are the same, and compiled once."""

    class Arguments(dict):
        __getattr__ = dict.__getitem__

    @functools.cache
    def load(arguments, trace_updates):
        return load_from_args(Arguments(arguments), trace_updates=trace_updates)

    names = ("workdir", "learn", "mode", "tokenizer", "max_length")
    return lambda args, trace_updates=False: load(
        tuple((name, getattr(args, name)) for name in names), trace_updates
    )


@pytest.fixture
def shared_models(monkeypatch, open_once):
    """The commands open models with `open_once`."""
    for module in (tttjax.cli.generate, tttjax.cli.read, tttjax.cli.sessions):
        monkeypatch.setattr(module, "load_from_args", open_once)
