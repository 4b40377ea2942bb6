"""The attention kernels that training and plans report."""

import pytest
from helpers.small import small_config

from tttjax.parallel.mesh import make_mesh
from tttjax.training import attention_kernels
from tttjax.training.attention_kernels import (
    KernelChoice,
    choose_chunk_kernels,
    choose_kernels,
    describe_kernels,
    platform_of,
)

MODEL = {"embed_dim": 128, "compute_dtype": "bfloat16", "num_layers": 3}
EVERY = {"mixers": ("full", "window")}
LONG = {"seq_len": 256}


def config_with(kernel="auto", **model):
    return small_config(model={**MODEL, "attention_kernel": kernel, **model}, train=LONG)


@pytest.fixture
def every_library(monkeypatch):
    """Simulates a machine that can compile for every platform."""
    monkeypatch.setattr(attention_kernels, "unsupported_reason_on_backend", lambda *_: "")


def test_cpu_uses_xla():
    assert platform_of(make_mesh()) == "cpu"
    chosen = choose_kernels(config_with(), "cpu")
    assert chosen == {"window": KernelChoice("XLA", "there is no library kernel for cpu")}
    assert describe_kernels(config_with(), "cpu") == (
        "attention over whole sequences: window by XLA (there is no library kernel for cpu)"
    )


def test_kernels_of_other_platforms(every_library):
    chosen = choose_kernels(config_with(**EVERY), "cuda")
    assert {kind: choice.kernel for kind, choice in chosen.items()} == {
        "full": "cuDNN",
        "window": "cuDNN",
    }
    assert describe_kernels(config_with(), "tpu") == (
        "attention over whole sequences: window by splash attention"
    )


def test_missing_local_library_is_the_reason():
    chosen = choose_kernels(config_with(), "cuda")
    assert chosen["window"] == KernelChoice("XLA", "cuDNN is not detected")


def test_xla_can_be_forced(every_library):
    chosen = choose_kernels(config_with("xla"), "tpu")
    assert chosen["window"] == KernelChoice("XLA", 'model.attention_kernel = "xla"')


def test_model_without_attention_has_no_kernels():
    assert describe_kernels(config_with(mixers=("mamba2",)), "tpu") == ""


CHUNKS = {"suffix_layers": 2, "window_size": 512, "head_dim": 64}


def chunked(inner=None, **model):
    return small_config(
        model={**MODEL, **CHUNKS, **model},
        inner={"chunk_size": 128, **(inner or {})},
        train=LONG,
    )


def test_chunk_kernels_by_platform():
    for platform in ("tpu", "cuda"):
        assert choose_chunk_kernels(chunked(), platform) == {"window": KernelChoice("Pallas")}
    assert describe_kernels(chunked(mixers=("window+mamba2",)), "cpu").endswith(
        "; over chunks: window by XLA (kernels are only interpreted on a CPU)"
    )
    short = choose_chunk_kernels(chunked(window_size=32, inner={"chunk_size": 32}), "tpu")
    assert (
        short["window"].fallback_reason
        == "64 keys are fewer than the 256 at which kernels are used"
    )
    assert choose_chunk_kernels(chunked(attention_kernel="xla"), "tpu")["window"].kernel == "XLA"


@pytest.mark.parametrize(
    "changes",
    [
        {"suffix_layers": 1},  # its attention is in the parallel part
        {"inner": {"form": "reference"}},
        {"inner": {"meta_gradient": "none"}},
        {"mixers": ("full",)},
    ],
)
def test_no_chunk_kernels_without_suffix_window_attention(changes):
    assert choose_chunk_kernels(chunked(**changes), "tpu") == {}
