"""A model of the size at which costs are compared on a CPU: 7 million parameters, 2,048 tokens.

    tttjax bench train --config=mid_size:ttt_e2e \\
        --config=mid_size:window --config=mid_size:full

ttt_e2e          window attention of 512 tokens, two of eight blocks learn on every 128 tokens
window, full     attention alone, the MLPs wider so that all have as many parameters
mamba2, gated_deltanet, kda, ttt_linear, ttt_mlp    that mixer alone, likewise
ttt_kvb          window attention and TTT-MLP, one step on every 128 tokens, likewise

All mixers at three lengths, in one run:

    tttjax bench train --lengths 1024,4096,16384 --config=mid_size:mamba2 \\
        ... --config=mid_size:window --config=mid_size:full

For training them: one sequence per step, 7 million parameters want about 70,000 steps.
"""

from ml_collections import ConfigDict

from tttjax.config import default_config
from tttjax.recipes.sizes import choose, make_control

CONTROLS = {
    "window": ("window",),
    "full": ("full",),
    "mamba2": ("mamba2",),
    "gated_deltanet": ("gated_deltanet",),
    "kda": ("kda",),
    "ttt_linear": ("ttt_linear",),
    "ttt_mlp": ("ttt_mlp",),
    "ttt_kvb": ("window+ttt_mlp",),
}
SYSTEMS = ("ttt_e2e", *CONTROLS)


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration of one of SYSTEMS; default ttt_e2e."""
    system = choose(arg or "ttt_e2e", SYSTEMS, "The system")
    config = _ttt_e2e()
    if system == "ttt_kvb":
        config.model.ttt_layer.update(backbone="plain", chunk_size=config.inner.chunk_size)
    if system != "ttt_e2e":
        make_control(config, CONTROLS[system])
    return config


def recipes() -> list[str]:
    """The arguments of all systems."""
    return list(SYSTEMS)


def _ttt_e2e() -> ConfigDict:
    config = default_config()
    config.model.update(
        vocab_size=4096,
        embed_dim=256,
        num_layers=8,
        num_heads=4,
        mlp_dim=512,
        window_size=512,
        suffix_layers=2,
        fast_mlp=True,
        remat="none",
        mamba2={"state_size": 64},
    )
    config.inner.update(chunk_size=128, lr_init=0.1, lr_warmup_steps=7000)
    config.optim.update(peak_lr=3e-3, warmup_steps=7000)
    config.train.update(steps=70000, batch_size=1, seq_len=2048)
    return config
