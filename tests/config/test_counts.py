"""Parameter counts by formula against the official models' numbers and the arrays themselves."""

import dataclasses

import jax
import numpy as np
import pytest

from tttjax.config import (
    InnerConfig,
    ModelConfig,
    match_parameters,
    matched_model,
    parameter_count,
)
from tttjax.errors import UserError
from tttjax.models.gated_deltanet.config import GatedDeltaNetConfig
from tttjax.models.kda.config import KDAConfig
from tttjax.models.mamba2.config import Mamba2Config
from tttjax.models.transformer import build_model
from tttjax.models.ttt_layer.config import TTTLayerConfig

# Layers, embed, heads, MLP, suffix; total, without embedding, fast: of the official code.
OFFICIAL = {
    "125m e2e": (12, 768, 12, 1664, 3, 184363776, 85863168, 11501568),
    "125m fa": (12, 768, 12, 2048, 0, 183474432, 84973824, 0),
    "350m e2e": (24, 1024, 16, 2304, 6, 444448768, 313114624, 42467328),
    "350m fa": (24, 1024, 16, 2816, 0, 439717888, 308383744, 0),
    "760m e2e": (24, 1536, 16, 3328, 6, 883728384, 686727168, 92012544),
    "760m fa": (24, 1536, 16, 4096, 0, 876632064, 679630848, 0),
    "1b e2e": (24, 2048, 32, 4352, 6, 1467708416, 1205040128, 160432128),
    "1b fa": (24, 2048, 32, 5376, 0, 1458246656, 1195578368, 0),
    "3b e2e": (32, 2560, 32, 5632, 8, 2897722880, 2569387520, 346030080),
    "3b fa": (32, 2560, 32, 6912, 0, 2866224640, 2537889280, 0),
}


_SIZE_125M = {"num_layers": 12, "embed_dim": 768, "num_heads": 12, "mlp_dim": 2048}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_counts(name):
    layers, embed, heads, mlp, suffix, *counts = OFFICIAL[name]
    model = ModelConfig(
        vocab_size=128256,
        num_layers=layers,
        embed_dim=embed,
        num_heads=heads,
        mlp_dim=mlp,
        suffix_layers=suffix,
        fast_mlp=suffix > 0,
    )
    assert list(parameter_count(model).values()) == counts


# Vocabulary, layers, embed, heads, of keys, head, MLP, norms of queries and keys, tied; parameters.
PUBLISHED = {
    "Llama 3.1 8B": (128256, 32, 4096, 32, 8, 128, 14336, False, False, 8030261248),
    "Llama 3.2 1B": (128256, 16, 2048, 32, 8, 64, 8192, False, True, 1235814400),
    "Qwen 3 8B": (151936, 36, 4096, 32, 8, 128, 12288, True, False, 8190735360),
    "Qwen 3 0.6B": (151936, 28, 1024, 16, 8, 128, 3072, True, True, 596049920),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_stated_parameter_counts(name):
    vocab, layers, embed, heads, kv_heads, head, mlp, qk_norm, tied, count = PUBLISHED[name]
    model = ModelConfig(
        vocab_size=vocab,
        num_layers=layers,
        embed_dim=embed,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head,
        mlp_dim=mlp,
        qk_norm=qk_norm,
        post_norm=False,
        tie_embeddings=tied,
    )
    assert parameter_count(model)["total"] == count


def test_parts_that_are_left_out_do_not_count():
    model = ModelConfig(vocab_size=10, embed_dim=8, num_layers=2, num_heads=2, mlp_dim=3)
    whole = parameter_count(model)["total"]

    def saved(**values):
        return whole - parameter_count(dataclasses.replace(model, **values))["total"]

    assert saved(qk_norm=False) == 2 * 2 * 4
    assert saved(pre_norm=False) == saved(post_norm=False) == 2 * 2 * 8
    assert saved(tie_embeddings=False) == -10 * 8
    assert saved(mixers=("none", "window")) == 4 * 8 * 8 + 2 * 4 + 2 * 8
    assert saved(num_kv_heads=1) == 2 * 2 * (8 * 4)
    assert saved(head_dim=8) == -2 * (4 * 8 * 8 + 2 * 4)


@pytest.mark.parametrize("suffix", [1, 2, 4])
def test_matched_models_are_equally_large(suffix):
    fast = ModelConfig(suffix_layers=suffix, fast_mlp=True)
    target = parameter_count(fast)["total"]
    width = match_parameters(ModelConfig(), target, multiple_of=4)
    control = dataclasses.replace(ModelConfig(), mlp_dim=width)
    wider = dataclasses.replace(ModelConfig(), mlp_dim=width + 4)
    step = parameter_count(wider)["total"] - parameter_count(control)["total"]
    assert abs(parameter_count(control)["total"] - target) <= step / 2
    assert width % 4 == 0


def test_model_that_cannot_be_that_small_is_refused():
    with pytest.raises(UserError, match="No mlp_dim gives 1000 parameters"):
        match_parameters(ModelConfig(), 1000)


SMALL = ModelConfig(vocab_size=10, embed_dim=16, num_layers=3, num_heads=2, mlp_dim=6)
MAMBA = {"mamba2": Mamba2Config(head_dim=4, state_size=3, groups=2), "conv_size": 3}
DELTA = {"gated_deltanet": GatedDeltaNetConfig(key_heads=2, value_heads=4, key_dim=3, value_dim=5)}
TTT_SIZES = {"heads": 4, "chunk_size": 5}
TTT = {"ttt_layer": TTTLayerConfig(**TTT_SIZES), "conv_size": 3}
PLAIN = {"ttt_layer": TTTLayerConfig(**TTT_SIZES, backbone="plain"), "conv_size": 3}
VARIANTS = [
    {"mixers": ("mamba2",), **MAMBA},
    {"mixers": ("mamba2",), "mamba2": Mamba2Config(expand=3, head_dim=8), "mlp_dim": 0},
    {"mixers": ("gated_deltanet",)},
    {"mixers": ("gated_deltanet", "full"), **DELTA, "conv_size": 2},
    {"mixers": ("kda",)},
    {"mixers": ("kda", "full"), "kda": KDAConfig(heads=3, key_dim=4, value_dim=5), "conv_size": 2},
    {"mixers": ("ttt_linear",), **TTT},
    {"mixers": ("ttt_linear",), **PLAIN},
    {"mixers": ("ttt_mlp",), **TTT},
    {"mixers": ("ttt_mlp",), **PLAIN},
    {"mixers": ("ttt_mlp",), "ttt_layer": TTTLayerConfig(output="key")},
    {"mixers": ("ttt_mlp",), "ttt_layer": TTTLayerConfig(output="key", backbone="plain")},
    {
        "mixers": ("window+ttt_mlp",),
        "ttt_layer": TTTLayerConfig(backbone="plain"),
        "post_norm": False,
    },
    {"mixers": ("none", "mamba2+gated_deltanet", "window"), **MAMBA, **DELTA, "pre_norm": False},
    {"num_kv_heads": 1, "suffix_layers": 1, "fast_mlp": True, "qk_norm": False},
    {"mixers": ("ttt_linear", "window"), "pre_conv": True, "conv_size": 3, "mlp_dim": 0},
    {**MAMBA, "mixers": ("mamba2",), "suffix_layers": 2, "fast_mlp": True, "fast_mlp_heads": 4},
    {"suffix_layers": 3, "fast_mlp": True, "fast_mlp_heads": 2, "mlp_dim": 0},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_counts_are_those_of_the_arrays(fields):
    model = dataclasses.replace(SMALL, **fields)
    params = build_model(model, InnerConfig()).abstract_params()

    def size(tree):
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))

    count = parameter_count(model)
    assert size(params) == count["total"]
    assert size(params.fast) == count["fast"]
    assert count["non_embedding"] == count["total"] - 10 * 16


LARGE = ModelConfig(vocab_size=100, embed_dim=256, num_layers=8, num_heads=4, mlp_dim=512)


@pytest.mark.parametrize("count", ["total", "non_embedding"])
@pytest.mark.parametrize("mixers", [("mamba2+window",), ("gated_deltanet",), ("none", "full")])
def test_width_of_mlps_makes_up_for_other_mixers(mixers, count):
    target = parameter_count(dataclasses.replace(LARGE, mlp_dim=1024))[count]
    model = matched_model(dataclasses.replace(LARGE, mixers=mixers), target, count=count)
    assert parameter_count(model)[count] == pytest.approx(target, rel=0.02)
    assert (model.num_layers, model.mixers, model.mlp_dim % 8) == (8, mixers, 0)


def test_models_without_mlps_get_their_depth():
    """As the official Mamba-2: about two blocks for each one of a Transformer."""
    target = parameter_count(ModelConfig(**_SIZE_125M, mixers=("full",)))["non_embedding"]
    pure = ModelConfig(**_SIZE_125M, mixers=("mamba2",), post_norm=False)
    model = matched_model(dataclasses.replace(pure, mlp_dim=0), target)
    assert (model.mlp_dim, model.num_layers) == (0, 23)
    assert parameter_count(model)["non_embedding"] == pytest.approx(target, rel=0.02)


def test_mixers_that_are_too_large_get_fewer_blocks():
    target = parameter_count(LARGE)["non_embedding"]
    model = matched_model(dataclasses.replace(LARGE, mixers=("mamba2+full",)), target)
    assert 0 < model.num_layers < 8
    assert model.mlp_dim > 0
    assert parameter_count(model)["non_embedding"] == pytest.approx(target, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "target", "sentence"),
    [
        ({"mlp_dim": 0, "mixers": ("mamba2",)}, 600_000, "embed_dim, or set an mlp_dim"),
        ({"mixers": ("mamba2",) * 4}, 600_000, "No mlp_dim gives 600000 parameters"),
        ({"mixers": ("mamba2",) * 4}, 1_500_000, "num_layers = 4 and mlp_dim = 8, has 1889632"),
    ],
)
def test_a_size_that_cannot_be_had_is_refused(fields, target, sentence):
    with pytest.raises(UserError, match=sentence):
        matched_model(dataclasses.replace(LARGE, **fields), target)
