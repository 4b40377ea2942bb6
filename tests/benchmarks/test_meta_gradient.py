"""The meta-gradient benchmark compares four train steps of one size."""

import pytest
from helpers.small import small_config

from tttjax.benchmarks.meta_gradient import bench_meta_gradient, variants
from tttjax.cli.main import main
from tttjax.config import parameter_count
from tttjax.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

SIZES = {
    "model": {
        **{"mixers": ("window",), "num_layers": 1, "embed_dim": 16, "mlp_dim": 24},
        **{"vocab_size": 32, "post_norm": False, "qk_norm": False},
    },
    "train": {"batch_size": 8},
}


def test_the_controls_are_static_and_of_equal_size():
    config = small_config(**SIZES)
    configs = dict(variants(config))
    assert list(configs) == ["fast", "reference", "window", "full"]
    assert configs["fast"].inner.form == "fast"
    assert configs["reference"].inner.form == "reference"
    size = parameter_count(config.model)["total"]
    for name in ("window", "full"):
        model = configs[name].model
        assert model.mixers == (name,)
        assert not model.fast_mlp
        assert parameter_count(model)["total"] == pytest.approx(size, rel=0.1)


def test_the_four_steps_are_measured(zero_weights):
    results = {r.name: r for r in bench_meta_gradient(small_config(**SIZES), rounds=1)}
    assert list(results) == ["fast", "reference", "window", "full"]
    for form in ("fast", "reference"):
        assert results[form].flops > 1.2 * results["window"].flops
        assert results[form].step_ratio == results[form].step_seconds / results["full"].step_seconds


def test_a_configuration_without_fast_mlps_is_rejected(capsys):
    with pytest.raises(UserError, match=r"model.fast_mlp = False"):
        variants(small_config(model={"fast_mlp": False, "suffix_layers": 0}))
    words = ["bench", "meta-gradient", "--config=mid_size:full"]
    assert main(words) == 2
    assert "model.fast_mlp = False" in capsys.readouterr().err
