"""The toy of the TTT-E2E paper's appendix A on books, a third as wide (E1).

    tttjax sweep --config='experiments/toy_on_books.py:*' --data=DATA --out=DIR

DATA is books with a vocabulary of 1,024. docs/results/preregistration.md has all commands, the
predictions, and what came out.

full    attention over the whole context of 128 tokens
none    no attention; with dynamic evaluation it is `naive`
e2e,16  TTT-E2E without attention, mini-batches of 16 tokens
e2e,8   the same with 8; not among `*`

Two blocks, width 128, 2 heads of 64 entries, 8 million tokens. The MLPs of both blocks are updated.
Seconds of a step on one CPU core beside other work: full 2.2, none 1.9, e2e,16 6.8; 977 steps.
"""

from ml_collections import ConfigDict

from tttjax.recipes import toy
from tttjax.recipes.sizes import choose

SYSTEMS = ("full", "none", "e2e,16", "e2e,8")
STEPS = 977  # of 64 x 128 tokens


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration of one of SYSTEMS; default e2e,16."""
    system = choose(arg or "e2e,16", SYSTEMS, "The system")
    config = toy.get_config(system.replace(",8", ",16"))
    if system == "e2e,8":
        config.inner.chunk_size = 8
    config.model.update(
        vocab_size=1024,
        embed_dim=128,
        num_heads=2,
        mlp_dim=344,
        init_std=0.09,  # about 1 / sqrt(embed_dim)
        rope_theta=1e3,
        remat="none",
    )
    config.inner.update(lr_init=0.1, lr_warmup_steps=STEPS // 10)
    config.train.update(
        steps=STEPS, batch_size=64, log_every=20, checkpoint_every=50, keep_checkpoints=1
    )
    config.optim.update(peak_lr=1e-2, warmup_steps=STEPS // 10)
    config.data.sources = ()
    config.eval.update(num_sequences=2048, batch_size=64, bins=16)
    return config


def recipes() -> list[str]:
    """The arguments of `*`."""
    return [system for system in SYSTEMS if system != "e2e,8"]
