"""The compilation cache: its folder, and bit-identical results of cached programs."""

import os
import subprocess
import sys

import pytest

from tttjax.cli import main
from tttjax.runtime import compilation_cache
from tttjax.runtime.compilation_cache import enable_compilation_cache, last_seconds, record_seconds

PROGRAM = """
from tttjax.runtime.compilation_cache import enable_compilation_cache
enable_compilation_cache()
import jax, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
x = jax.random.normal(jax.random.key(0), (64, 64))
y = jax.jit(jax.grad(lambda x: jnp.sum(jnp.tanh(x @ x) ** 3)))(x)
print(sum("cache_hits" in name for name in hits) > 0, y.tobytes().hex()[:4000])
"""


@pytest.fixture
def no_jax(monkeypatch, tmp_path):
    """As at the start of a program: JAX is not imported, and no cache is configured."""
    monkeypatch.delitem(sys.modules, "jax")
    for name in list(os.environ):
        if name.startswith(("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE", "TTTJAX_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    before = dict(os.environ)
    yield tmp_path
    for name in set(os.environ) - set(before):
        del os.environ[name]


def test_cached_programs_are_bit_identical(tmp_path):
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("JAX_")},
        compilation_cache.VARIABLE: str(tmp_path),
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    runs = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
        )
        for _ in range(2)
    ]
    assert [run.stderr for run in runs] == ["", ""]
    first, second = (run.stdout.split() for run in runs)
    assert (first[0], second[0]) == ("False", "True")
    assert first[1] == second[1]


def test_default_folder_is_the_users_cache(no_jax):
    folder = enable_compilation_cache()
    assert folder.parent == no_jax / "home" / "tttjax" / "compiled"
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    assert int(os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"]) == compilation_cache.MAX_BYTES


@pytest.mark.parametrize("value", ["off", "OFF", "0"])
def test_variable_turns_it_off(no_jax, monkeypatch, value):
    monkeypatch.setenv(compilation_cache.VARIABLE, value)
    assert enable_compilation_cache() is None
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_jax_variable_wins(no_jax, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    assert enable_compilation_cache() is None
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"


def test_unwritable_folder_disables_the_cache(no_jax, monkeypatch):
    (no_jax / "file").write_text("")
    monkeypatch.setenv(compilation_cache.VARIABLE, str(no_jax / "file"))
    assert enable_compilation_cache() is None


def test_user_without_a_home_has_no_cache(no_jax, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for an unknown user
    assert enable_compilation_cache() is None


@pytest.mark.parametrize("value", ["gs://bucket/cache", "~nobody-of-that-name/cache"])
def test_remote_or_unknown_folder_is_rejected(no_jax, monkeypatch, value):
    monkeypatch.chdir(no_jax)
    monkeypatch.setenv(compilation_cache.VARIABLE, value)
    assert main.main(["--version"]) == main.USER_ERROR
    assert not list(no_jax.iterdir())


def test_seconds_are_remembered_by_program(no_jax, monkeypatch):
    assert last_seconds("a") is None
    record_seconds("a", 3.0)  # nowhere
    enable_compilation_cache()
    record_seconds("a", 41.23)
    assert (last_seconds("a"), last_seconds("b")) == (41.2, None)
