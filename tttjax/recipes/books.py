"""TTT-E2E on English books, for two CPU cores: trained in two hours, or overnight.

    tttjax train --config=books:SIZE,pretrain --workdir=runs/books --config.data.sources=DATA
    tttjax train --config=books:SIZE,extend --workdir=runs/books-8k --config.data.sources=DATA \\
        --config.train.init_from=runs/books

SIZE    blocks, width, vocabulary   window k, mini-batch b   tokens at 1K, at 8K
1.7m    4, 160, 1,024               128, 32                  9.8M, 1M
5m      6, 224, 4,096               128, 32                  20M, 1.2M

The last two blocks have fast weights. The extension has a tenth of the learning rate, and the full
inner rate from the start.

Cost: 1.7m an hour and three quarters; 5m about nine hours, from single steps beside other work.
1.7m is in experiments/books-1.7m: 1.70 bits per byte at 8,192 tokens of the test books. 5m has not
been run; docs/books.md says what to expect.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from tttjax.config import default_config
from tttjax.errors import UserError
from tttjax.recipes.sizes import choose

STEP_TOKENS = 8192
LENGTHS = {"pretrain": 1024, "extend": 8192}


@dataclass(frozen=True)
class BookSize:
    """A size: fields of the model, the peak learning rate, and the steps of both stages."""

    model: Mapping[str, Any]
    peak_lr: float
    steps: Mapping[str, int]


SIZES = {
    "1.7m": BookSize(
        model={"vocab_size": 1024, "embed_dim": 160, "num_layers": 4, "num_heads": 5}
        | {"mlp_dim": 400, "init_std": 0.08},
        peak_lr=8e-3,
        steps={"pretrain": 1200, "extend": 120},
    ),
    "5m": BookSize(
        model={"vocab_size": 4096, "embed_dim": 224, "num_layers": 6, "num_heads": 7}
        | {"mlp_dim": 592, "init_std": 0.067},
        peak_lr=6e-3,
        steps={"pretrain": 2500, "extend": 150},
    ),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration of `SIZE,STAGE`; default 1.7m,pretrain."""
    words = (arg or "1.7m,pretrain").split(",")
    if len(words) != 2:
        raise UserError(f"{arg!r} is no recipe of books: write SIZE,STAGE, such as 1.7m,pretrain")
    size = SIZES[choose(words[0], SIZES, "The size")]
    stage = choose(words[1], LENGTHS, "The stage")
    length, steps, extend = LENGTHS[stage], size.steps[stage], stage == "extend"
    config = default_config()
    config.model.update(
        **size.model,
        mixers=("window",),
        window_size=128,
        suffix_layers=2,
        fast_mlp=True,
        rope_theta=1e4,
        post_norm=False,
        remat="none",
    )
    config.inner.update(
        chunk_size=32, lr_init=1.0 if extend else 0.1, lr_warmup_steps=0 if extend else steps // 12
    )
    config.optim.update(
        peak_lr=size.peak_lr / 10 if extend else size.peak_lr, warmup_steps=steps // 12
    )
    config.data.layout = "documents"
    config.train.update(
        steps=steps,
        batch_size=STEP_TOKENS // length,
        seq_len=length,
        log_every=5,
        checkpoint_every=50,
        eval_every=200,
    )
    config.eval.update(context_lengths=(length,), num_sequences=32, batch_size=8, bins=32)
    return config


def recipes() -> list[str]:
    """The arguments of all sizes and stages."""
    return [f"{size},{stage}" for size in SIZES for stage in LENGTHS]
