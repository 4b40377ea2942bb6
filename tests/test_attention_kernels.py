"""Which kernel training and plans say that they use."""

import pytest
from small import small_config

from tttjax.attention_kernels import Choice, choose_kernels, describe_kernels, platform_of
from tttjax.errors import UserError
from tttjax.sharding import make_mesh

MODEL = {"embed_dim": 128, "compute_dtype": "bfloat16", "num_layers": 3}
EVERY = {"mixers": ("full", "window", "local")}
LONG = {"seq_len": 256}


def config_with(kernel="auto", **model):
    return small_config(model={**MODEL, "attention_kernel": kernel, **model}, train=LONG)


def test_this_machine():
    assert platform_of(make_mesh()) == "cpu"
    chosen = choose_kernels(config_with(), "cpu")
    assert chosen == {"window": Choice("XLA", "there is no library kernel for cpu")}
    assert describe_kernels(chosen) == (
        "attention over whole sequences: window by XLA (there is no library kernel for cpu)"
    )


def test_a_gpu_and_a_tpu_elsewhere():
    chosen = choose_kernels(config_with(**EVERY), "cuda", here=False)
    assert {kind: choice.kernel for kind, choice in chosen.items()} == {
        "full": "cuDNN",
        "window": "cuDNN",
        "local": "XLA",
    }
    assert chosen["local"].why == "cuDNN has no attention within blocks"
    assert describe_kernels(choose_kernels(config_with(), "tpu", here=False)) == (
        "attention over whole sequences: window by splash attention"
    )


def test_what_this_machine_lacks_is_the_reason():
    chosen = choose_kernels(config_with(), "cuda")
    assert chosen["window"] == Choice("XLA", "cuDNN is not detected")


def test_xla_alone():
    chosen = choose_kernels(config_with("xla"), "tpu", here=False)
    assert chosen["window"] == Choice("XLA", 'model.attention_kernel = "xla"')


def test_a_model_without_attention_says_nothing():
    assert describe_kernels(choose_kernels(config_with(mixers=("mamba2",)), "tpu")) == ""


@pytest.mark.parametrize(
    ("model", "platform", "says"),
    [
        ({}, "cpu", "there is no library kernel for cpu"),
        ({"compute_dtype": "float32"}, "cuda", "not in float32"),
        (
            {"mixers": ("local",)},
            "tpu",
            "local attention: splash attention has no attention within",
        ),
    ],
)
def test_insisting_on_the_library_where_it_does_not_apply(model, platform, says):
    with pytest.raises(UserError, match=f'model.attention_kernel = "library" .*{says}') as caught:
        choose_kernels(config_with("library", **model), platform, here=False)
    assert "\n" not in str(caught.value)
