"""The TTT-E2E paper's models and recipe as one table; every recipe is derived from it.

Sources: the paper (arXiv 2512.23675), its official configurations, and for numbers of a result
those given beside them in `results.py`. The recurrent baselines, for which there are no official
configurations, are in `baselines.py`.
"""

import functools
from collections.abc import Collection
from dataclasses import dataclass

from ml_collections import ConfigDict

from tttjax.config import (
    default_config,
    from_config_dict,
    match_parameters,
    matched_model,
    parameter_count,
)
from tttjax.config.values import nearest
from tttjax.errors import UserError
from tttjax.recipes.baselines import BASELINES

VOCAB_SIZE = 128256  # Llama 3
PRETRAIN_LENGTH = 8192
WINDOW = 8192
CHUNK = 1024


@dataclass(frozen=True)
class Size:
    """One model size and its recipe at one token multiple.

    mlp_dim belongs to every model without fast MLPs, fast_model_mlp_dim to TTT-E2E, whose MLPs
    are narrower so that both have about the same number of parameters. suffix_layers is the last
    quarter of the blocks. steps, batch_size and peak_lr are those of pretraining at 8K tokens;
    extension_steps has batches of `extension_tokens` tokens at every context length.
    """

    layers: int
    embed_dim: int
    heads: int
    mlp_dim: int
    fast_model_mlp_dim: int
    suffix_layers: int
    steps: int
    batch_size: int
    peak_lr: float
    extension_steps: int
    extension_tokens: int


SIZES = {
    "125m": Size(12, 768, 12, 2048, 1664, 3, 4800, 64, 3e-3, 120, 2**20),
    "350m": Size(24, 1024, 16, 2816, 2304, 6, 13500, 64, 1.5e-3, 337, 2**20),
    "760m": Size(24, 1536, 16, 4096, 3328, 6, 29000, 64, 1.25e-3, 725, 2**20),
    "1b": Size(24, 2048, 32, 5376, 4352, 6, 50000, 64, 1e-3, 1250, 2**20),
    "3b": Size(32, 2560, 32, 6912, 5632, 8, 52000, 128, 8e-4, 1300, 2**21),
}
EXTENSION_LR = 4e-4  # best of a sweep at 760M to 3B, for full attention

MIXERS = {
    "full": ("full",),
    "window": ("window",),
    "hybrid": (*["window"] * 5, "full"),
    "ttt_e2e": ("window",),
    **{system: baseline.mixers for system, baseline in BASELINES.items()},
}
MLP_MULTIPLE = 64  # of which MLP widths that are solved for are multiples
CONTEXTS = {"8k": 8192, "16k": 16384, "32k": 32768, "64k": 65536, "128k": 131072}

# The paper raises theta for full attention when it extends the context. For sliding windows and
# hybrids it says nothing. Ours: a window has no distances beyond 8K, so it keeps the 500K of
# pretraining, as TTT-E2E does, and so does the window attention of the recurrent baselines; a
# hybrid with full-attention layers takes their theta.
THETA = 500_000.0
EXTENDED_THETA = {"8k": THETA, "16k": 1e6, "32k": 2e6, "64k": 5e6, "128k": 1e7}


def pretraining(size: str, system: str, multiple: int = 1) -> ConfigDict:
    """Pretraining at 8K tokens. multiple: of the Chinchilla-optimal tokens (20 per parameter)."""
    table = SIZES[size]
    config = _base(size, system)
    config.train.update(
        steps=multiple * table.steps, batch_size=table.batch_size, seq_len=PRETRAIN_LENGTH
    )
    config.optim.peak_lr = table.peak_lr
    _finish(config)
    if system == "ttt_e2e":
        config.inner.lr_init = 0.1
        config.inner.lr_warmup_steps = config.train.steps // 10
    config.data.sources = ("data/dclm",)
    return config


def extension(size: str, system: str, context: str, multiple: int = 1) -> ConfigDict:
    """Extension of a pretrained model to a longer context, with 5% of the pretraining tokens."""
    table = SIZES[size]
    config = _base(size, system)
    config.train.update(
        steps=multiple * table.extension_steps,
        batch_size=table.extension_tokens // CONTEXTS[context],
        seq_len=CONTEXTS[context],
        init_from=f"runs/{run_name(size, system, 'pretrain', multiple=multiple)}",
    )
    config.optim.peak_lr = EXTENSION_LR
    _finish(config)
    if system in ("full", "hybrid"):
        config.model.rope_theta = EXTENDED_THETA[context]
    config.data.sources = ("data/books",)
    return config


def run_name(size: str, system: str, stage: str, context: str = "", multiple: int = 1) -> str:
    """The work directory's name, by which an extension finds its pretraining run."""
    parts = [size, system, stage, context, f"{multiple}x" if multiple > 1 else ""]
    return "-".join(part for part in parts if part)


def tokens(config: ConfigDict) -> int:
    """Tokens that the run trains on."""
    return config.train.steps * config.train.batch_size * config.train.seq_len


def choose(word: str, choices: Collection[str], what: str) -> str:
    """`word` if it is one of `choices`; UserError otherwise."""
    if word not in choices:
        raise UserError(
            f"{what} {word!r} is not one of {', '.join(choices)}.{nearest(word, choices)}"
        )
    return word


@functools.cache
def full_attention_size(size: str) -> int:
    """Parameters outside the embedding that every system of this size should have."""
    return parameter_count(from_config_dict(_base(size, "full")).model)["non_embedding"]


def match_full_attention(config: ConfigDict, size: str) -> None:
    """Gives the model the MLP width at which it is as large as full attention of the size."""
    model = from_config_dict(config).model
    matched = matched_model(model, full_attention_size(size), MLP_MULTIPLE)
    config.model.update(num_layers=matched.num_layers, mlp_dim=matched.mlp_dim)


def _base(size: str, system: str) -> ConfigDict:
    table = SIZES[size]
    is_fast = system == "ttt_e2e"
    config = default_config()
    config.model.update(
        vocab_size=VOCAB_SIZE,
        embed_dim=table.embed_dim,
        num_layers=table.layers,
        num_heads=table.heads,
        mlp_dim=table.fast_model_mlp_dim if is_fast else table.mlp_dim,
        mixers=MIXERS[system],
        window_size=WINDOW,
        suffix_layers=table.suffix_layers if is_fast else 0,
        fast_mlp=is_fast,
        rope_theta=THETA,
        compute_dtype="bfloat16",
    )
    config.inner.chunk_size = CHUNK
    if system in BASELINES:
        config.model.update(BASELINES[system].fields(table.embed_dim))
        match_full_attention(config, size)
    return config


def _finish(config: ConfigDict) -> None:
    """What follows from the training's length: warm-up and the contexts of evaluation."""
    config.optim.warmup_steps = config.train.steps // 10
    config.eval.context_lengths = tuple(
        length for length in CONTEXTS.values() if length <= config.train.seq_len
    )


def make_control(config: ConfigDict, mixers: tuple[str, ...]) -> None:
    """Turns a TTT-E2E configuration into its control: `mixers`, nothing fast, the same size."""
    size = parameter_count(from_config_dict(config).model)["total"]
    config.model.update(mixers=mixers, suffix_layers=0, fast_mlp=False)
    config.model.mlp_dim = match_parameters(from_config_dict(config).model, size)
