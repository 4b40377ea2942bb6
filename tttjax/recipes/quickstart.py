"""A small TTT-E2E model and its control: what `launch/quickstart.sh` trains.

    tttjax train --config=quickstart:ttt_e2e --workdir=DIR --config.data.sources=DATA
    tttjax train --config=quickstart:window --workdir=DIR --config.data.sources=DATA

ttt_e2e   window attention of 64 tokens; the last two of four blocks have fast weights, updated
          every 32 tokens
window    window attention alone, its MLPs wider so that both have as many parameters

The small window shows memory within a short run: sequences are eight windows long, from long
documents, and only the weights can hold what was read more than a window ago. Meta-learned
from scratch with the exact meta-gradient and the paper's inner rule.

Cost: 2.5 million tokens each; 4 and 2.5 minutes on two CPU cores. Expected on the default text,
loss at tokens 257 to 512 in nats per token: ttt_e2e 2.56 with TTT on, 3.31 with TTT off; window
3.37 (docs/quickstart.md).
"""

from ml_collections import ConfigDict

from tttjax.config import default_config
from tttjax.recipes.sizes import choose, make_control

SYSTEMS = ("ttt_e2e", "window")


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration of one of SYSTEMS; default ttt_e2e."""
    config = _ttt_e2e()
    if choose(arg or "ttt_e2e", SYSTEMS, "The system") == "window":
        make_control(config, ("window",))
    return config


def recipes() -> list[str]:
    """The arguments of both systems."""
    return list(SYSTEMS)


def _ttt_e2e() -> ConfigDict:
    config = default_config()
    config.model.update(
        vocab_size=1024,
        embed_dim=64,
        num_layers=4,
        num_heads=2,
        mlp_dim=128,
        mixers=("window",),
        window_size=64,
        suffix_layers=2,
        fast_mlp=True,
        init_std=0.1,  # about 1 / sqrt(embed_dim): 0.02, for widths of 768 and more, learns slower
        rope_theta=1e4,  # for short contexts; 500,000 hardly turns over 512 tokens
        post_norm=False,  # norms after mixers and MLPs learn slower at this width
        remat="none",
    )
    config.inner.update(chunk_size=32, lr_init=0.1, lr_warmup_steps=60)
    config.optim.update(peak_lr=2e-2, warmup_steps=60)
    config.data.update(layout="documents")
    config.train.update(steps=600, batch_size=8, seq_len=512, log_every=10, checkpoint_every=100)
    config.eval.update(
        context_lengths=(64, 128, 256, 512), num_sequences=128, batch_size=16, bins=32
    )
    return config
