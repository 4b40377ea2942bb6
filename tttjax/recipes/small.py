"""Eight systems at sizes for a laptop or one GPU, from scratch at eight windows of context.

    tttjax train --config=small:SIZE,SYSTEM --workdir=DIR --config.data.sources=DATA
    tttjax sweep --config='small:0.3m,*' --set optim.peak_lr=5e-3,1e-2,2e-2 --data=DATA --out=DIR

SIZE    blocks, width, vocabulary   window k, mini-batch b, context   tokens
0.3m    4, 64, 1,024                128, 16, 1,024                    5.4M
0.9m    4, 128, 1,024               64, 8, 512                        20M
6m      6, 256, 4,096               512, 64, 4,096                    64M

full, window, hybrid        full attention; sliding-window attention; three of window to one of full
mamba2, gated_deltanet      the recurrent layer and window attention in every block
ttt_linear, ttt_mlp         TTT layers in the backbone of their paper, without attention
ttt_e2e                     TTT-E2E, exact meta-gradient; half of the blocks are updated

Dynamic evaluation, the ninth system of the paper, is the window model with
`tttjax evaluate --modes=dynamic`.

All models of a size have the parameters of full attention, within 2%, the same tokens, at least
20 per parameter at 0.3m and 0.9m and 10 at 6m, and the same schedule. A sequence is eight windows
of one document from the first step, so that memory beyond the window is trained and measured at
one length.

Matrices are initialized with a standard deviation of about 1 / sqrt(width); 0.02, for widths of
768 and more, learns slower. There are no norms after mixers and MLPs: with them, full attention is
0.23 nats worse at 0.3m, and worse than the window (pilots of E2). The RoPE base is 10,000, that of
short contexts.

Costs and losses are not known yet: docs/results/preregistration.md has the state of the
experiments. `tttjax sweep --plan` shows tokens and FLOPs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from tttjax.config import default_config, from_config_dict, match_parameters, parameter_count
from tttjax.errors import UserError
from tttjax.recipes.baselines import BASELINES
from tttjax.recipes.sizes import choose

HYBRID = ("window", "window", "window", "full")
SYSTEMS = (
    *("full", "window", "hybrid", "mamba2", "gated_deltanet"),
    *("ttt_linear", "ttt_mlp", "ttt_e2e"),
)
WINDOWS = 8  # of a sequence


@dataclass(frozen=True)
class SmallSize:
    """One size: fields of the model, recurrent mixers' sizes, window, mini-batch, and budget.

    batch: sequences of a step. mlp_multiple: of which solved MLP widths are multiples.
    """

    model: Mapping[str, Any]
    mixers: Mapping[str, Any]
    window: int
    chunk: int
    suffix_layers: int
    batch: int
    steps: int
    peak_lr: float
    mlp_multiple: int = 4


SIZES = {
    "0.3m": SmallSize(
        model={"vocab_size": 1024, "embed_dim": 64, "num_layers": 4, "num_heads": 2}
        | {"mlp_dim": 176, "init_std": 0.1, "rope_theta": 1e4, "remat": "none"},
        mixers={
            "mamba2": {"head_dim": 32, "state_size": 32},
            "gated_deltanet": {"key_heads": 2, "key_dim": 24, "value_dim": 48},
            "scan_chunk": 32,
        },
        window=128,
        chunk=16,
        suffix_layers=2,
        batch=8,
        steps=660,
        peak_lr=1e-2,
    ),
    "0.9m": SmallSize(
        model={"vocab_size": 1024, "embed_dim": 128, "num_layers": 4, "num_heads": 4}
        | {"mlp_dim": 344, "init_std": 0.09, "rope_theta": 1e4, "remat": "none"},
        mixers={
            "mamba2": {"head_dim": 32, "state_size": 64},
            "gated_deltanet": {"key_heads": 2, "key_dim": 48, "value_dim": 96},
            "scan_chunk": 32,
        },
        window=64,
        chunk=8,
        suffix_layers=2,
        batch=16,
        steps=2440,
        peak_lr=1e-2,
    ),
    "6m": SmallSize(
        model={"vocab_size": 4096, "embed_dim": 256, "num_layers": 6, "num_heads": 8}
        | {"mlp_dim": 704, "init_std": 0.06, "rope_theta": 1e4, "compute_dtype": "bfloat16"},
        mixers={
            "mamba2": {"head_dim": 64, "state_size": 128},
            "gated_deltanet": {"key_heads": 2, "key_dim": 96, "value_dim": 192},
        },
        window=512,
        chunk=64,
        suffix_layers=3,
        batch=16,
        steps=976,
        peak_lr=4e-3,
        mlp_multiple=16,
    ),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration of `SIZE,SYSTEM`; default 0.3m,ttt_e2e."""
    words = (arg or "0.3m,ttt_e2e").split(",")
    if len(words) != 2:
        raise UserError(f"{arg!r} is no small recipe: write SIZE,SYSTEM, such as 0.3m,window")
    return small(*words)


def recipes() -> list[str]:
    """The arguments of all systems at all sizes."""
    return [f"{size},{system}" for size in SIZES for system in SYSTEMS]


def small(size: str, system: str) -> ConfigDict:
    """The configuration of a system at a size; the data are set later."""
    table = SIZES[choose(size, SIZES, "The size")]
    config = _model(table, choose(system, SYSTEMS, "The system"))
    length = WINDOWS * table.window
    config.train.update(
        steps=table.steps,
        batch_size=table.batch,
        seq_len=length,
        log_every=20,
        checkpoint_every=100,
        keep_checkpoints=1,
    )
    config.optim.update(peak_lr=table.peak_lr, warmup_steps=table.steps // 10)
    config.data.layout = "documents"
    config.eval.update(context_lengths=(length,), num_sequences=256, batch_size=16)
    if system == "ttt_e2e":
        config.inner.update(lr_init=0.1, lr_warmup_steps=table.steps // 10)
    return config


def _model(table: SmallSize, system: str) -> ConfigDict:
    """The model; MLPs are sized to match the parameters of full attention."""
    config = default_config()
    config.model.update(**table.model, window_size=table.window, post_norm=False)
    config.inner.chunk_size = table.chunk
    if system == "full":
        config.model.mixers = ("full",)
        return config
    if system in BASELINES:
        config.model.update(mixers=BASELINES[system].mixers, **table.mixers)
        if system.startswith("ttt"):  # the block of the TTT-layer paper
            config.model.update(pre_conv=True)
    else:
        config.model.mixers = HYBRID if system == "hybrid" else ("window",)
    if system == "ttt_e2e":
        config.model.update(suffix_layers=table.suffix_layers, fast_mlp=True)
    full_size = parameter_count(from_config_dict(_model(table, "full")).model)["total"]
    model = from_config_dict(config).model
    config.model.mlp_dim = match_parameters(model, full_size, table.mlp_multiple)
    return config
