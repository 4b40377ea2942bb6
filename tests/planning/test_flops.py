"""FLOPs by formula against counts by hand, and the table of peaks."""

import dataclasses
from dataclasses import replace

import pytest

from tttjax.config import InnerConfig, ModelConfig
from tttjax.models.gated_deltanet.config import GatedDeltaNetConfig
from tttjax.models.mamba2.config import Mamba2Config
from tttjax.models.ttt_layer.config import TTTLayerConfig
from tttjax.planning import flops

MODEL = ModelConfig(
    vocab_size=64,
    embed_dim=8,
    num_layers=3,
    num_heads=2,
    mlp_dim=16,
    window_size=8,
    suffix_layers=2,
    fast_mlp=True,
)
INNER = InnerConfig(chunk_size=4)
PROJECTIONS, MLP, HEAD = 8 * 8 * 8, 6 * 8 * 16, 2 * 8 * 64
SCORES = 4 * 8 * (1 + 2 + 3 + 4 + 5 + 6 + 7 + 9 * 8) / 16  # 16 tokens, window 8
OWN = 4 * 8 * 2.5  # 4 queries of a chunk attend to 1, 2, 3, 4 of its keys


def test_forward_flops_by_hand():
    by_hand = 3 * (PROJECTIONS + SCORES + MLP) + 2 * MLP + HEAD
    assert flops.forward_flops_per_token(MODEL, INNER, 16) == pytest.approx(by_hand)


def test_fewer_kv_heads_shrink_projections_not_scores():
    grouped = replace(MODEL, num_kv_heads=1)
    difference = flops.forward_flops_per_token(MODEL, INNER, 16) - flops.forward_flops_per_token(
        grouped, INNER, 16
    )
    assert difference == pytest.approx(3 * PROJECTIONS / 4)  # half of two matrices out of four


def test_train_flops_by_hand():
    forward = flops.forward_flops_per_token(MODEL, INNER, 16)
    inner_backward = (
        (MLP + MLP / 3)  # lowest fast MLP: its gradients, and back through w2
        + MLP  # its block's static MLP
        + (PROJECTIONS + SCORES + OWN)  # the second block
        + 2 * MLP
        + MLP
        + HEAD
    )
    exact = flops.train_flops_per_token(MODEL, INNER, 16)
    assert exact == pytest.approx(3 * forward + 3 * inner_backward * 3 / 4)

    def with_inner(**kwargs):
        inner = dataclasses.replace(INNER, **kwargs)
        return flops.train_flops_per_token(MODEL, inner, 16)

    assert with_inner(meta_gradient="none") == pytest.approx(3 * forward)
    assert with_inner(meta_gradient="first_order") == pytest.approx(
        3 * forward + inner_backward * 3 / 4
    )
    assert with_inner(meta_gradient="truncated", truncate_chunks=2) == pytest.approx(
        3 * forward + inner_backward * (3 + 2) / 4
    )
    assert with_inner(meta_gradient="truncated", truncate_chunks=4) == pytest.approx(exact)


def test_the_parts_of_a_train_step():
    exact = flops.train_flops_by_part(MODEL, INNER, 16)
    assert exact.total == flops.train_flops_per_token(MODEL, INNER, 16)
    assert exact.prefix == pytest.approx(PROJECTIONS + SCORES + MLP)
    assert exact.suffix == pytest.approx(2 * (PROJECTIONS + SCORES + 2 * MLP) + HEAD)
    assert exact.outer == pytest.approx(2 * (exact.prefix + exact.suffix + exact.inner_backward))
    static = flops.train_flops_by_part(MODEL, replace(INNER, meta_gradient="none"), 16)
    assert (static.prefix, static.suffix) == (exact.prefix, exact.suffix)
    assert static.inner_backward == 0
    assert static.outer == pytest.approx(2 * (exact.prefix + exact.suffix))


def test_static_train_flops_are_three_forward_passes():
    model = dataclasses.replace(MODEL, suffix_layers=0, fast_mlp=False, mixers=("full",))
    forward = flops.forward_flops_per_token(model, INNER, 16)
    full = 3 * (PROJECTIONS + 4 * 8 * 8.5 + MLP) + HEAD
    assert forward == pytest.approx(full)
    assert flops.train_flops_per_token(model, INNER, 16) == pytest.approx(3 * full)


# Per token, for one mixer of width 8: matrices, convolution taps, recurrence.
MAMBA2 = 2 * 8 * (2 * 16 + 2 * 2 * 3 + 4) + 2 * 16 * 8 + 2 * 4 * (16 + 2 * 2 * 3) + 4 * 4 * 4 * 3
DELTA = 2 * 8 * (2 * 4 + 2 * 12 + 2 * 2) + 2 * 12 * 8 + 2 * 4 * (2 * 4 + 12) + 6 * 2 * 4 * 6
KDA = 2 * 8 * (3 * 8 + 2 + 2 * 4) + 2 * 4 * 16 + 2 * 8 * 8 + 2 * 4 * 3 * 8 + 6 * 2 * 4 * 4
RATES, CONV = 2 * 8 * 2, 2 * 4 * 8
# Two heads of 4: on the key and in the gradient 2 x 16 each, on the query again.
TTT_LINEAR = 4 * 2 * 64 + RATES + 2 * CONV + 2 * 3 * 2 * 16
# Two heads of 4 to 16 to 4: both matrices on key, gradient and query; the second one backwards.
TTT_MLP = 4 * 2 * 64 + RATES + 2 * (3 * 2 * 64 + 64) * 2
TTT_MLP_KEY = 3 * 2 * 64 + RATES + 2 * (2 * 2 * 64 + 64) * 2
RECURRENT = replace(
    MODEL,
    num_layers=1,
    suffix_layers=0,
    fast_mlp=False,
    mamba2=Mamba2Config(head_dim=4, state_size=3, groups=2),
    gated_deltanet=GatedDeltaNetConfig(key_heads=1, value_heads=2, key_dim=4, value_dim=6),
)
BY_MIXER = {
    "mamba2": (MAMBA2, {}),
    "gated_deltanet": (DELTA, {}),
    "kda": (KDA, {}),
    "ttt_linear": (TTT_LINEAR, {}),
    "ttt_mlp": (TTT_MLP, {"ttt_layer": TTTLayerConfig(backbone="plain")}),
    "ttt_mlp, key": (TTT_MLP_KEY, {"ttt_layer": TTTLayerConfig(backbone="plain", output="key")}),
}


@pytest.mark.parametrize("name", BY_MIXER)
def test_recurrent_mixers_by_hand(name):
    mixer, fields = BY_MIXER[name]
    kind = name.partition(",")[0]

    def forward(**changes):
        model = replace(RECURRENT, mixers=(kind,), **fields)
        return flops.forward_flops_per_token(replace(model, **changes), INNER, 16)

    assert forward() == pytest.approx(mixer + MLP + HEAD)
    assert forward(mlp_dim=0) == pytest.approx(mixer + HEAD)
    assert forward(pre_conv=True, conv_size=4) == pytest.approx(mixer + CONV + MLP + HEAD)
    joined = forward(mixers=(f"{kind}+window",))
    assert joined == pytest.approx(mixer + PROJECTIONS + SCORES + MLP + HEAD)


def test_recurrent_mixers_cost_the_same_at_any_length():
    model = replace(RECURRENT, mixers=("mamba2+gated_deltanet",))
    assert flops.forward_flops_per_token(model, INNER, 4096) == pytest.approx(
        MAMBA2 + DELTA + MLP + HEAD
    )


def test_the_inner_backward_pass_counts_recurrences_twice():
    """Each product has two factors that depend on the fast weights."""
    model = replace(
        RECURRENT, num_layers=2, suffix_layers=2, fast_mlp=True, mixers=("mamba2+window",)
    )
    forward = flops.forward_flops_per_token(model, INNER, 16)
    recurrence = 4 * 4 * 4 * 3
    inner_backward = (
        (MLP + MLP / 3)
        + MLP
        + (MAMBA2 + recurrence)  # its matrices once, its recurrence twice
        + (PROJECTIONS + SCORES + OWN)
        + 2 * MLP
        + MLP
        + HEAD
    )
    assert flops.train_flops_per_token(model, INNER, 16) == pytest.approx(
        3 * forward + 3 * inner_backward * 3 / 4
    )


def test_multi_head_fast_mlps_by_hand():
    model = replace(RECURRENT, suffix_layers=1, fast_mlp=True, fast_mlp_heads=2, mixers=("window",))
    heads = 2 * 2 * (4 * 16 + 16 * 4)  # two heads of 4 to 16 to 4
    forward = PROJECTIONS + SCORES + heads + MLP + HEAD
    assert flops.forward_flops_per_token(model, INNER, 16) == pytest.approx(forward)
    inner_backward = heads + heads / 2 + MLP + HEAD
    assert flops.train_flops_per_token(model, INNER, 16) == pytest.approx(
        3 * forward + 3 * inner_backward * 3 / 4
    )


def test_inner_backward_pass_ends_at_fast_mixer():
    model = replace(RECURRENT, suffix_layers=1, mixers=("mamba2",))
    inner = replace(INNER, fast_paths=("suffix/**/mixer/wo",))
    wo = 2 * 16 * 8
    inner_backward = wo + wo + 2 * 4 * 4 * 4 * 3 + MLP + HEAD
    assert flops.train_flops_per_token(model, inner, 16) == pytest.approx(
        3 * flops.forward_flops_per_token(model, inner, 16) + 3 * inner_backward * 3 / 4
    )


def test_peaks_prefer_the_longest_name():
    @dataclasses.dataclass
    class Device:
        device_kind: str
        platform: str = "gpu"

    assert flops.device_peak([Device("NVIDIA H100 80GB HBM3")] * 2).flops_per_second == 2 * 989e12
    assert flops.device_peak([Device("NVIDIA H100 PCIe")]).flops_per_second == 756e12
    assert flops.device_peak([Device("TPU v5 lite", "tpu")]).flops_per_second == 197e12
    assert flops.device_peak([Device("unheard of")]) is None


def test_cpu_peak_is_measured_and_says_so():
    peak = flops.device_peak()
    assert peak.flops_per_second > 1e9
    assert "measured" in peak.source
