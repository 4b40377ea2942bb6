"""A model of the size at which costs are compared on a CPU: 7 million parameters, 2,048 tokens.

    tttjax bench train --config=experiments/mid_size.py:ttt_e2e \\
        --config=experiments/mid_size.py:window --config=experiments/mid_size.py:full

ttt_e2e   window attention of 512 tokens, two of eight blocks learn on every 128 tokens
window    window attention alone, its MLPs wider so that both have as many parameters
full      full attention, likewise

For training them: one sequence per step, 7 million parameters want about 70,000 steps.
"""

from ml_collections import ConfigDict

from experiments.sizes import choose, make_control
from tttjax.config import default_config

SYSTEMS = ("ttt_e2e", "window", "full")


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration of one of SYSTEMS; default ttt_e2e."""
    system = choose(arg or "ttt_e2e", SYSTEMS, "The system")
    config = _ttt_e2e()
    if system != "ttt_e2e":
        make_control(config, (system,))
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
    )
    config.inner.update(chunk_size=128, lr_init=0.1, lr_warmup_steps=7000)
    config.optim.update(peak_lr=3e-3, warmup_steps=7000)
    config.train.update(steps=70000, batch_size=1, seq_len=2048)
    return config
