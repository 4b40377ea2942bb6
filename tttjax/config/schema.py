"""The configuration as frozen dataclasses: every field, its default, its meaning, its limits.

A field is declared in one place: here, in `model` (the network's), or in a mixer's `config.py`. The
checks of single values, the command line's parsing, the comparison of a resumed run with its work
directory and docs/configuration.md are all derived from it. Relations between fields are in
`checks`.
"""

import dataclasses
import functools
from dataclasses import dataclass

from tttjax.config.fields import declare, field_info, fields_of
from tttjax.config.limits import SEED_MAX
from tttjax.config.model import ModelConfig

RULES = ("sgd", "momentum", "normalized_sgd", "adam", "muon", "custom")
LOSSES = ("next_token", "custom")
LEARNED_LRS = ("none", "model", "layer", "weight")
GRADIENT_FORMS = ("fast", "reference")
GATHERS = ("layer", "step")
LAYOUTS = ("stream", "documents")
TRAJECTORIES = ("rewind", "recompute")
META_GRADIENTS = ("exact", "truncated", "first_order", "none")


@dataclass(frozen=True)
class InnerConfig:
    """The inner loop: one step on the fast weights per chunk of tokens."""

    chunk_size: int = declare(
        128,
        "Tokens of one inner mini-batch (b); sequences are split into chunks of this size.",
        minimum=1,
    )
    rule: str = declare(
        "sgd",
        "Update rule of the fast weights. custom: the function inner_rule of the recipe file.",
        choices=RULES,
    )
    loss: str = declare(
        "next_token",
        "Inner loss of a chunk. next_token: mean negative log-likelihood. custom: the function "
        "inner_loss of the recipe file; the outer loss stays that of the next token.",
        choices=LOSSES,
        omit_default_in_hash=True,
    )
    code: str = declare(
        "",
        "sha256 of the recipe file that defines a custom rule or loss; set from the file.",
        omit_default_in_hash=True,
    )
    lr: float = declare(1.0, "Inner learning rate.", minimum=0)
    clip: float = declare(
        1.0,
        "Maximum global norm of the inner gradient, over all fast weights; 0: no clipping. For "
        "normalized_sgd, the norm of every gradient (0: 1).",
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
    learn_lr: str = declare(
        "none",
        "Learned inner learning rates: lr is multiplied by exp(r), and the outer optimizer trains "
        "r from 0. none; model: one r; layer: one for each layer with fast weights; weight: one "
        "for each entry of the fast weights, in as much memory as these.",
        choices=LEARNED_LRS,
        omit_default_in_hash=True,
    )
    fast_paths: tuple[str, ...] = declare(
        (),
        'Glob patterns over parameter paths that choose the fast weights, as "suffix/**/mlp/**"; '
        "empty: those declared fast (the fast MLPs). Patterns replace the declared ones.",
    )
    meta_gradient: str = declare(
        "exact",
        "Which inner updates the outer gradient flows through. exact: all of them. truncated: "
        "those of the sequence's last truncate_chunks chunks; the others are constants. "
        "first_order: none, all updates are constants (keys and values of earlier chunks are "
        "not). none: no inner updates in training; TTT only at evaluation (dynamic evaluation).",
        choices=META_GRADIENTS,
    )
    truncate_chunks: int = declare(
        0,
        "Number of chunks (m) whose updates are differentiated by truncated, otherwise 0. No loss "
        "follows the last update, so 1 equals first_order.",
        minimum=0,
    )
    form: str = declare(
        "fast",
        "How the outer gradient is computed. fast: by a custom VJP of the loop over chunks. "
        "reference: by plain jax.grad, the definition. Both give the same numbers up to rounding.",
        choices=GRADIENT_FORMS,
        mutable_on_resume=True,
    )
    trajectory: str = declare(
        "rewind",
        "How the backward pass of the fast form obtains the fast weights before each chunk. "
        "rewind: saves the inner gradients and undoes the updates. recompute: saves the fast "
        "weights before every sqrt(N)th of N chunks, and runs all chunks once more to recover the "
        "gradients that undo their updates; for long sequences.",
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
        "float32", "Dtype of the fast weights in the inner loop.", choices=("float32", "float64")
    )


@dataclass(frozen=True)
class OptimConfig:
    """The outer optimizer: AdamW, linear warm-up, cosine decay."""

    peak_lr: float = declare(3e-3, "Learning rate at the end of the warm-up.", minimum=0)
    init_lr: float = declare(
        -1.0,
        "Learning rate of the first step, where the warm-up starts. -1: peak_lr / (warmup_steps + "
        "1), so that the first step has an effect (with 0 it has none).",
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

    steps: int = declare(1000, "Outer steps of the run.", minimum=1)
    batch_size: int = declare(8, "Sequences per step, over all devices and processes.", minimum=1)
    seq_len: int = declare(2048, "Tokens of a sequence (T), a multiple of chunk_size.", minimum=1)
    accum_steps: int = declare(
        1,
        "Microbatches per batch, to save memory (gradient accumulation). A run that resumes on "
        "another number of devices takes as many as keep the sequences that a device holds at a "
        "time at most those of its first start with this value.",
        minimum=1,
        mutable_on_resume=True,
    )
    seed: int = declare(0, "Seed of the initial parameters.", minimum=0, maximum=SEED_MAX)
    log_every: int = declare(10, "Steps between progress lines.", minimum=1, mutable_on_resume=True)
    eval_every: int = declare(
        0,
        "Steps between evaluations on data.val_split of the first source that has it: "
        "eval.num_sequences sequences of train.seq_len tokens, with TTT on and off, also after the "
        "last step; 0: none.",
        minimum=0,
        mutable_on_resume=True,
    )
    checkpoint_every: int = declare(
        100,
        "Steps between checkpoints; the last step is always saved.",
        minimum=1,
        mutable_on_resume=True,
    )
    checkpoint_minutes: float = declare(
        15.0,
        "Minutes after which a checkpoint is saved even if train.checkpoint_every steps have not "
        "passed; 0: by steps alone.",
        minimum=0,
        mutable_on_resume=True,
    )
    keep_checkpoints: int = declare(
        2, "Number of newest checkpoints to keep.", minimum=1, mutable_on_resume=True
    )
    keep_every: int = declare(
        0,
        "Checkpoints of steps that are multiples of this are saved too and never deleted; 0: none.",
        minimum=0,
        mutable_on_resume=True,
    )
    init_from: str = declare(
        "",
        "Work directory or checkpoint of the initial weights, as in the extension stage; empty: "
        "random initialization.",
        path=True,
    )
    max_skipped_steps: int = declare(
        10,
        "Consecutive steps with a non-finite loss or gradient (they are skipped) after which "
        "training stops.",
        minimum=1,
        mutable_on_resume=True,
        first_name="nonfinite_limit",
    )
    max_failed_starts: int = declare(
        5,
        "Starts in a row that end without a new step, by a crash or a stop, after which the next "
        "one exits with code 2, so that no launcher starts it again.",
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
        "", "Weights & Biases project to log to; empty: none.", mutable_on_resume=True
    )


@dataclass(frozen=True)
class DataConfig:
    """Prepared data sets (see `tttjax prepare`) and how sequences are drawn from them."""

    sources: tuple[str, ...] = declare(
        (),
        "Paths of prepared data sets. On resuming, the same data may be at another path.",
        path=True,
    )
    weights: tuple[float, ...] = declare(
        (), "Sampling weight of each source; empty: proportional to their sizes.", above=0
    )
    layout: str = declare(
        "stream",
        "stream: sequences are consecutive parts of one stream of tokens, as in the papers. "
        "documents: one document per sequence, padded and masked.",
        choices=LAYOUTS,
    )
    seed: int = declare(0, "Seed of the order of sequences.", minimum=0, maximum=SEED_MAX)
    shuffle: bool = declare(True, "Whether the order of sequences is shuffled.")
    prefetch: int = declare(4, "Batches prefetched.", minimum=0, mutable_on_resume=True)
    val_split: str = declare("val", "Split that evaluation reads.", mutable_on_resume=True)


@dataclass(frozen=True)
class MeshConfig:
    """The device mesh. Results do not depend on it, up to rounding."""

    data: int = declare(
        -1,
        "Size of the data-parallel axis; -1: all remaining devices.",
        minimum=-1,
        mutable_on_resume=True,
    )
    fsdp: int = declare(
        1,
        "Size of the axis that shards sequences, parameters and optimizer state (FSDP).",
        minimum=1,
        mutable_on_resume=True,
    )
    tensor: int = declare(
        1,
        "Size of the axis that shards heads and MLP entries (tensor parallelism).",
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
    batch_size: int = declare(4, "Batch size.", minimum=1, mutable_on_resume=True)
    bins: int = declare(
        32,
        "Number of bins of the table of loss by token position.",
        minimum=1,
        maximum=100_000,
        mutable_on_resume=True,
    )
    seed: int = declare(
        0, "Seed of the choice of sequences.", minimum=0, maximum=SEED_MAX, mutable_on_resume=True
    )


def _time_limit(default: float, of: str) -> float:
    return declare(default, f"Seconds {of}; 0: no limit.", minimum=0, mutable_on_resume=True)


@dataclass(frozen=True)
class WatchdogConfig:
    """When a run counts as hung: it writes the stacks of its threads and exits with code 76."""

    next_step: float = _time_limit(
        300.0, "without a finished step, or 20 times the median step if that is longer"
    )
    start: float = _time_limit(1800.0, "of setting up, apart from restoring and compiling")
    compile: float = _time_limit(7200.0, "of compiling the train step")
    restore: float = _time_limit(1800.0, "of restoring a checkpoint")
    save: float = _time_limit(1800.0, "of saving a checkpoint")
    evaluate: float = _time_limit(7200.0, "of one evaluation of held-out data (train.eval_every)")


@dataclass(frozen=True)
class Config:
    """The configuration of a run: what every recipe resolves to."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    inner: InnerConfig = InnerConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    watchdog: WatchdogConfig = WatchdogConfig()


SECTIONS: dict[str, type] = {f.name: f.type for f in dataclasses.fields(Config)}  # type: ignore[misc]


@functools.cache
def all_fields() -> dict[str, dataclasses.Field]:
    """Every field by its dotted name, `train.steps` and so on, in order of declaration."""
    return fields_of(Config)


@functools.cache
def first_names() -> dict[str, str]:
    """The current name of every renamed field by its first one."""
    renamed = {name: field_info(field).first_name for name, field in all_fields().items()}
    return {f"{name.split('.')[0]}.{first}": name for name, first in renamed.items() if first}
