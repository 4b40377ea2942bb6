"""The configuration as frozen dataclasses: every field, its default, its meaning, its limits.

A field is declared in one place, here or (the network's) in `model`. The checks of single values,
the command line's parsing, the comparison of a resumed run with its work directory and
docs/configuration.md are all derived from it. Relations between fields are in `checks`.
"""

import dataclasses
import functools
from dataclasses import dataclass

from tttjax.config.fields import declare
from tttjax.config.limits import SEED_MAX
from tttjax.config.model import ModelConfig

RULES = ("sgd", "momentum", "normalized_sgd", "adam", "muon")
GRADIENT_FORMS = ("fast", "reference")
GATHERS = ("layer", "step")
TRAJECTORIES = ("rewind", "store", "recompute")
META_GRADIENTS = ("exact", "truncated", "first_order", "none")


@dataclass(frozen=True)
class InnerConfig:
    """The inner loop: one step on the fast weights per chunk of tokens."""

    chunk_size: int = declare(
        128, "Tokens of one inner mini-batch (b); sequences are cut into these.", minimum=1
    )
    rule: str = declare("sgd", "Update rule of the fast weights.", choices=RULES)
    lr: float = declare(1.0, "Inner learning rate.", minimum=0)
    clip: float = declare(
        1.0,
        "Global norm, over all fast weights, to which gradients are clipped; 0: off. The length of "
        "every step of normalized_sgd (0: 1).",
        minimum=0,
    )
    momentum: float = declare(0.9, "Decay of momentum and Muon.", minimum=0, below=1)
    b1: float = declare(0.9, "First-moment decay of Adam.", minimum=0, below=1)
    b2: float = declare(0.95, "Second-moment decay of Adam.", minimum=0, below=1)
    eps: float = declare(1e-8, "Epsilon of Adam and Muon.", above=0)
    lr_init: float = declare(
        1.0, "Inner learning rate at the start of the ramp over outer steps.", minimum=0
    )
    lr_warmup_steps: int = declare(
        0, "Outer steps over which the inner learning rate ramps to lr; 0: always lr.", minimum=0
    )
    fast_paths: tuple[str, ...] = declare(
        (),
        'Glob patterns over parameter paths that choose the fast weights, as "suffix/**/mlp/**"; '
        "empty: those declared fast (the fast MLPs). Patterns replace the declared ones.",
    )
    meta_gradient: str = declare(
        "exact",
        "How the outer gradient sees the updates. exact: through all of them. truncated: through "
        "those of the sequence's last truncate_chunks chunks, the others are constants. "
        "first_order: all updates are constants (keys and values of earlier chunks are not). "
        "none: trained without updates (TTT only at evaluation: dynamic evaluation).",
        choices=META_GRADIENTS,
    )
    truncate_chunks: int = declare(
        0,
        'How many chunks "truncated" keeps exact (m), else 0. The very last update meets no loss, '
        "so 1 is the same as first_order.",
        minimum=0,
    )
    form: str = declare(
        "fast",
        "How the outer gradient is computed. fast: by a derivative of its own for the loop over "
        "chunks. reference: by plain jax.grad, the definition. The same numbers, to rounding.",
        choices=GRADIENT_FORMS,
        mutable_on_resume=True,
    )
    trajectory: str = declare(
        "rewind",
        "How the backward pass of the fast form comes by the fast weights before each chunk. "
        "rewind: by undoing the updates, whose gradients are kept. store: they are kept too. "
        "recompute: only those before every sqrt(N)th of N chunks are kept, and all chunks are "
        "read once more to undo their updates; for long sequences.",
        choices=TRAJECTORIES,
        mutable_on_resume=True,
    )
    remat: bool = declare(
        True,
        "Whether the backward pass of the reference form recomputes each chunk's activations; the "
        "fast form always does.",
        mutable_on_resume=True,
    )
    fast_dtype: str = declare(
        "float32", "Type of the fast weights while reading.", choices=("float32", "float64")
    )


@dataclass(frozen=True)
class OptimConfig:
    """The outer optimizer: AdamW, linear warm-up, cosine decay."""

    peak_lr: float = declare(3e-3, "Learning rate at the end of the warm-up.", minimum=0)
    init_lr: float = declare(
        -1.0,
        "Learning rate of the first step, where the warm-up starts; -1: one notch above zero, "
        "peak_lr / (warmup_steps + 1), so that the first step is not lost (as it is with 0).",
        minimum=-1,
    )
    end_lr: float = declare(1e-5, "Learning rate at the end of the decay.", minimum=0)
    warmup_steps: int = declare(0, "Steps of linear warm-up.", minimum=0)
    decay_steps: int = declare(
        0, "Step at which end_lr is reached, warm-up included; 0: train.steps.", minimum=0
    )
    b1: float = declare(0.9, "First-moment decay.", minimum=0, below=1)
    b2: float = declare(0.95, "Second-moment decay.", minimum=0, below=1)
    eps: float = declare(1e-8, "Added to the root of the second moment.", above=0)
    weight_decay: float = declare(0.1, "Decoupled weight decay.", minimum=0)
    decay_embeddings: bool = declare(True, "Whether the embedding table is decayed too.")
    clip: float = declare(
        1.0, "Global norm to which the outer gradient is clipped; 0: off.", minimum=0
    )


@dataclass(frozen=True)
class TrainConfig:
    """The length of the run, its batches, and what it writes."""

    steps: int = declare(1000, "Outer steps of the whole run.", minimum=1)
    batch_size: int = declare(8, "Sequences per step, over all devices and processes.", minimum=1)
    seq_len: int = declare(2048, "Tokens of a sequence (T), a multiple of chunk_size.", minimum=1)
    accum_steps: int = declare(
        1, "Micro-batches a batch is cut into to save memory.", minimum=1, mutable_on_resume=True
    )
    seed: int = declare(0, "Seed of the initial parameters.", minimum=0, maximum=SEED_MAX)
    log_every: int = declare(10, "Steps between progress lines.", minimum=1, mutable_on_resume=True)
    checkpoint_every: int = declare(
        100,
        "Steps between checkpoints; the last step is always saved.",
        minimum=1,
        mutable_on_resume=True,
    )
    keep_checkpoints: int = declare(
        2, "Newest checkpoints kept.", minimum=1, mutable_on_resume=True
    )
    init_from: str = declare(
        "",
        "Work directory or checkpoint whose weights the run starts from, as the extension stage "
        "does; empty: random.",
        path=True,
    )
    max_skipped_steps: int = declare(
        10,
        "Steps in a row skipped for a loss or gradient that is not finite before training stops.",
        minimum=1,
        mutable_on_resume=True,
    )
    profile_steps: tuple[int, ...] = declare(
        (),
        "First and last step of a profiler trace; empty: none.",
        minimum=1,
        mutable_on_resume=True,
    )
    wandb_project: str = declare(
        "", "Weights & Biases project to log to as well; empty: none.", mutable_on_resume=True
    )


@dataclass(frozen=True)
class DataConfig:
    """Prepared data sets (see `tttjax prepare`) and how sequences are drawn from them."""

    sources: tuple[str, ...] = declare(
        (),
        "Paths of prepared data sets. A resumed run may find the same data in another place.",
        path=True,
    )
    weights: tuple[float, ...] = declare(
        (), "Share of each source; empty: proportional to their sizes.", above=0
    )
    layout: str = declare(
        "stream",
        "stream: sequences are cut from one contiguous stream of tokens, as in the papers. "
        "documents: one document per sequence, the rest masked.",
        choices=("stream", "documents"),
    )
    seed: int = declare(0, "Seed of the order of sequences.", minimum=0, maximum=SEED_MAX)
    shuffle: bool = declare(True, "Whether the order of sequences is shuffled.")
    prefetch: int = declare(
        4, "Batches made ready ahead of time.", minimum=0, mutable_on_resume=True
    )
    val_split: str = declare("val", "Split that evaluation reads.", mutable_on_resume=True)


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged. The numbers of a run do not depend on it, but for rounding."""

    data: int = declare(
        -1,
        "Devices among which sequences are divided; -1: all the rest.",
        minimum=-1,
        mutable_on_resume=True,
    )
    fsdp: int = declare(
        1,
        "Devices among which sequences, parameters and optimizer state are divided.",
        minimum=1,
        mutable_on_resume=True,
    )
    tensor: int = declare(
        1,
        "Devices among which heads and MLP entries are divided.",
        minimum=1,
        mutable_on_resume=True,
    )
    gather: str = declare(
        "layer",
        "When FSDP-sharded parameters are all-gathered. layer: per layer in the parallel part of "
        "the model, in the forward and again in the backward pass, and once per microbatch "
        "(train.accum_steps) in the sequential part; gradients are reduce-scattered as soon as "
        "they are computed (with model.remat = none gathered layers are saved for the backward "
        "pass, in the compute dtype). step: all parameters once per step, and the full gradient "
        "is held until the end of the step: more memory, less communication.",
        choices=GATHERS,
        mutable_on_resume=True,
    )


@dataclass(frozen=True)
class EvalConfig:
    """What `tttjax evaluate` measures."""

    context_lengths: tuple[int, ...] = declare(
        (),
        "Context lengths in tokens; empty: 1, 2, 4 and 8 windows.",
        minimum=1,
        mutable_on_resume=True,
    )
    num_sequences: int = declare(
        32, "Held-out sequences per length.", minimum=1, mutable_on_resume=True
    )
    batch_size: int = declare(4, "Sequences evaluated at once.", minimum=1, mutable_on_resume=True)
    bins: int = declare(
        32,
        "Bins of the table of loss by token position.",
        minimum=1,
        maximum=100_000,
        mutable_on_resume=True,
    )
    seed: int = declare(
        0, "Seed of the choice of sequences.", minimum=0, maximum=SEED_MAX, mutable_on_resume=True
    )


@dataclass(frozen=True)
class Config:
    """A whole run: what every experiment file resolves to."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    inner: InnerConfig = InnerConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()


SECTIONS: dict[str, type] = {f.name: f.type for f in dataclasses.fields(Config)}  # type: ignore[misc]


@functools.cache
def all_fields() -> dict[str, dataclasses.Field]:
    """Every field by its dotted name, `train.steps` and so on, in order of declaration."""
    return {
        f"{section}.{field.name}": field
        for section, cls in SECTIONS.items()
        for field in dataclasses.fields(cls)
    }
