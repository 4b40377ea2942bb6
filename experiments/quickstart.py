"""A small model that learns to read, and its control: what `launch/quickstart.sh` trains.

    tttjax train --config=experiments/quickstart.py:ttt_e2e --workdir=DIR --config.data.sources=DATA
    tttjax train --config=experiments/quickstart.py:window --workdir=DIR --config.data.sources=DATA

ttt_e2e   window attention of 256 tokens, and the last two blocks learn while they read
window    window attention alone, its MLPs wider so that both have as many parameters
"""

from ml_collections import ConfigDict

from experiments.sizes import choose
from tttjax.config import default_config, from_config_dict, match_parameters, parameter_count

SYSTEMS = ("ttt_e2e", "window")


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration of one of SYSTEMS; default ttt_e2e."""
    config = _ttt_e2e()
    if choose(arg or "ttt_e2e", SYSTEMS, "The system") == "window":
        size = parameter_count(from_config_dict(config).model)["total"]
        config.model.update(suffix_layers=0, fast_mlp=False)
        config.model.mlp_dim = match_parameters(from_config_dict(config).model, size)
    return config


def recipes() -> list[str]:
    """The arguments of both systems."""
    return list(SYSTEMS)


def _ttt_e2e() -> ConfigDict:
    config = default_config()
    config.model.update(
        vocab_size=2048,
        embed_dim=128,
        num_layers=4,
        num_heads=4,
        mlp_dim=256,
        mixers=("window",),
        window_size=256,
        suffix_layers=2,
        fast_mlp=True,
    )
    config.inner.update(chunk_size=64, lr_init=0.1, lr_warmup_steps=30)
    config.optim.update(peak_lr=3e-3, warmup_steps=30)
    config.train.update(steps=300, batch_size=8, seq_len=1024, log_every=5, checkpoint_every=50)
    config.eval.context_lengths = (256, 512, 1024, 2048)
    return config
