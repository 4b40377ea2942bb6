"""Configurations of the nine systems, at each scale, and the training budget of each stage.

Each scale is one table; everything else is derived. All models of a scale have as many parameters
as its full-attention model, and train on the same tokens.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from tttjax.config import default_config, from_config_dict, match_parameters, parameter_count
from tttjax.recipes.baselines import BASELINES
from tttjax.recipes.sizes import choose

HYBRID = ("window", "window", "window", "full")
# These systems differ from full attention only at contexts beyond the window.
PRETRAINED_AS = {"window": "full", "hybrid": "full"}
SYSTEMS = (
    *("full", "window", "hybrid", "mamba2", "gated_deltanet"),
    *("ttt_linear", "ttt_mlp", "ttt_e2e"),
)
DYNAMIC = "dynamic"  # the ninth system: dynamic evaluation of the window model
PRETRAIN, EXTEND = "pretrain", "extend"


@dataclass(frozen=True)
class Scale:
    """One scale of the comparison.

    model, mixers: model fields common to all systems, and those of the recurrent mixers.
    window (k), chunk (b): tokens of the attention window, and of one inner step of TTT-E2E.
    tokens_per_step: of every run; pretrain_steps at one window, extension_steps at each longer
    context. rates: ladder of peak learning rates, lowest first; shares: the same for extensions,
    relative to the best rate of pretraining (1/3 in the paper, at 760M); tried: initial number of
    rates, from the middle of the ladder. dynamic: inner learning rates of dynamic evaluation by
    update rule. sequences: validation and test sequences at the longest context, at most.
    speed: thousand tokens per second by system, for time estimates only.
    """

    model: Mapping[str, Any]
    mixers: Mapping[str, Any]
    window: int
    chunk: int
    suffix_layers: int
    tokens_per_step: int
    pretrain_steps: int
    extension_steps: int
    rates: tuple[float, ...]
    speed: Mapping[str, float]
    shares: tuple[float, ...] = (1 / 100, 1 / 30, 1 / 10, 1 / 3, 1.0)
    tried: int = 3
    windows: tuple[int, ...] = (2, 4, 8)
    seeds: int = 2
    sequences: int = 64
    eval_batch: int = 16
    mlp_multiple: int = 4
    dynamic: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        return self.window * max(1, *self.windows)

    def steps(self, stage: str) -> int:
        return self.pretrain_steps if stage == PRETRAIN else self.extension_steps


_SPEED = {"full": 9.0, "window": 9.0, "hybrid": 9.0, "mamba2": 4.4, "gated_deltanet": 4.0}
_SPEED |= {"ttt_linear": 4.0, "ttt_mlp": 2.5, "ttt_e2e": 4.0, DYNAMIC: 9.0}
_DYNAMIC = {"sgd": (0.01, 0.03, 0.1, 0.3, 1.0), "adam": (1e-4, 3e-4, 1e-3, 3e-3)}

CPU = Scale(
    model={
        "vocab_size": 1024,
        "embed_dim": 64,
        "num_layers": 4,
        "num_heads": 2,
        "mlp_dim": 176,
        "init_std": 0.1,  # about 1 / sqrt(embed_dim)
        "remat": "none",
    },
    mixers={
        "mamba2": {"head_dim": 32, "state_size": 32},
        "gated_deltanet": {"key_heads": 2, "key_dim": 24, "value_dim": 48},
        "scan_chunk": 32,
    },
    window=128,
    chunk=16,
    suffix_layers=2,
    tokens_per_step=2048,
    pretrain_steps=600,
    extension_steps=120,
    rates=(2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2),
    speed=_SPEED,
    dynamic=_DYNAMIC,
)
SCALES = {
    "cpu": CPU,
    "gpu": Scale(
        model={
            "vocab_size": 8192,
            "embed_dim": 384,
            "num_layers": 12,
            "num_heads": 6,
            "mlp_dim": 1024,
            "init_std": 0.04,
            "compute_dtype": "bfloat16",
        },
        mixers={
            "mamba2": {"head_dim": 64, "state_size": 128},
            "gated_deltanet": {"key_heads": 3, "key_dim": 96, "value_dim": 192},
        },
        window=1024,
        chunk=128,
        suffix_layers=3,
        tokens_per_step=2**16,
        pretrain_steps=1600,
        extension_steps=240,
        rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
        speed={name: 100 * speed for name, speed in _SPEED.items()},
        sequences=128,
        eval_batch=8,
        mlp_multiple=16,
        dynamic=_DYNAMIC,
    ),
    # A few steps of everything, to check that it works on this machine and text.
    "smoke": Scale(
        model={**CPU.model, "vocab_size": 264, "embed_dim": 16, "mlp_dim": 48, "init_std": 0.25},
        mixers={
            "mamba2": {"head_dim": 8, "state_size": 8},
            "gated_deltanet": {"key_heads": 2, "key_dim": 6, "value_dim": 12},
            "scan_chunk": 16,
        },
        window=32,
        chunk=16,
        suffix_layers=2,
        tokens_per_step=256,
        pretrain_steps=4,
        extension_steps=2,
        rates=(1e-2, 2e-2),
        shares=(1 / 10, 1 / 3),
        tried=1,
        windows=(2,),
        seeds=1,
        sequences=4,
        eval_batch=4,
        speed=dict.fromkeys(_SPEED, 2.0),
        dynamic={"sgd": (0.01, 0.1)},
    ),
}


def recipe(name: str, system: str, stage: str, windows: int = 1) -> ConfigDict:
    """The configuration of one stage of one system; seed, learning rate and data are set later."""
    scale = SCALES[choose(name, SCALES, "The scale")]
    choose(system, SYSTEMS, "The system")
    choose(stage, (PRETRAIN, EXTEND), "The stage")
    config = _model(name, system)
    steps, length = scale.steps(stage), scale.window * windows
    config.train.update(
        steps=steps,
        batch_size=scale.tokens_per_step // length,
        seq_len=length,
        log_every=20,
        checkpoint_every=200,
        keep_checkpoints=1,
    )
    config.optim.update(peak_lr=scale.rates[(len(scale.rates) - 1) // 2], warmup_steps=steps // 10)
    config.data.update(layout="documents", val_split="val")
    config.eval.update(
        context_lengths=tuple(scale.window * n for n in (1, *scale.windows)),
        num_sequences=scale.sequences,
        batch_size=scale.eval_batch,
    )
    if system == "ttt_e2e" and stage == PRETRAIN:
        config.inner.update(lr_init=0.1, lr_warmup_steps=steps // 10)
    return config


@functools.cache
def parameters(name: str, system: str) -> int:
    """The number of parameters of a system."""
    return parameter_count(from_config_dict(_model(name, system)).model)["total"]


def _model(name: str, system: str) -> ConfigDict:
    """The model; MLPs are sized to match the parameters of full attention."""
    scale = SCALES[name]
    config = default_config()
    config.model.update(**scale.model, window_size=scale.window)
    config.inner.chunk_size = scale.chunk
    if system == "full":
        config.model.mixers = ("full",)
        return config
    if system in BASELINES:
        config.model.update(mixers=BASELINES[system].mixers, **scale.mixers)
        if system.startswith("ttt"):  # the block of the TTT-layer paper
            config.model.update(pre_conv=True, post_norm=False)
    else:
        config.model.mixers = HYBRID if system == "hybrid" else ("window",)
    if system == "ttt_e2e":
        config.model.update(suffix_layers=scale.suffix_layers, fast_mlp=True)
    model = from_config_dict(config).model
    config.model.mlp_dim = match_parameters(model, parameters(name, "full"), scale.mlp_multiple)
    return config
