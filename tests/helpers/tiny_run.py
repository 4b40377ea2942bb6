"""A run small enough for tests: bytes of Python sources, trained in some seconds.

    tttjax train --config=tests/helpers/tiny_run.py --workdir=DIR --config.data.sources=DATA

Arguments: static (default; no inner loop, compiles fast) or ttt_e2e.
"""

from ml_collections import ConfigDict

from tttjax.config import default_config


def get_config(arg: str | None = None) -> ConfigDict:
    """12 steps of 8 sequences of 32 bytes."""
    config = default_config()
    config.model.update(
        vocab_size=264, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=16, window_size=16
    )
    if arg == "ttt_e2e":
        config.model.update(num_layers=1, suffix_layers=1, fast_mlp=True)
    config.inner.chunk_size = 8
    config.optim.update(peak_lr=1e-2, warmup_steps=3)
    config.train.update(steps=12, batch_size=8, seq_len=32, log_every=4, checkpoint_every=4)
    return config
