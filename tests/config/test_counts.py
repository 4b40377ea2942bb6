"""Parameter counts by formula against the official models' numbers."""

import dataclasses

import pytest

from tttjax.config import ModelConfig, match_parameters, parameter_count
from tttjax.errors import UserError

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


def test_parts_that_are_left_out_do_not_count():
    model = ModelConfig(vocab_size=10, embed_dim=8, num_layers=2, num_heads=2, mlp_dim=3)
    whole = parameter_count(model)["total"]

    def saved(**values):
        return whole - parameter_count(dataclasses.replace(model, **values))["total"]

    assert saved(qk_norm=False) == 2 * 2 * 4
    assert saved(pre_norm=False) == saved(post_norm=False) == 2 * 2 * 8
    assert saved(tie_embeddings=False) == -10 * 8
    assert saved(mixers=("none", "window")) == 4 * 8 * 8 + 2 * 4 + 2 * 8
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


def test_a_model_that_cannot_be_that_small_is_refused():
    with pytest.raises(UserError, match="No mlp_dim gives 1000 parameters"):
        match_parameters(ModelConfig(), 1000)
