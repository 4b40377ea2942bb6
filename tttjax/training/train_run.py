"""The objects of a training run, and how they are opened: data, model, checkpoints, metrics."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Protocol

import jax

from tttjax.config import (
    Config,
    check_memory,
    check_weights_config,
)
from tttjax.config.placement import Placement, choose_placement, describe_change
from tttjax.data.pipeline import StreamOptions, make_train_stream
from tttjax.data.shards import TOKENIZER_DIR, open_prepared
from tttjax.data.tokenizers.base import copy_tokenizer
from tttjax.errors import UserError
from tttjax.io.locks import Lock
from tttjax.io.paths import storage_path
from tttjax.parallel.mesh import make_mesh
from tttjax.parallel.pod import sharing_failures
from tttjax.planning import flops
from tttjax.runtime.memory import device_memory, host_memory
from tttjax.training import checkpoints, metrics, saved_weights
from tttjax.training.attention_kernels import describe_kernels, platform_of
from tttjax.training.held_out_loss import HeldOutLoss, make_held_out_loss
from tttjax.training.hosts import Hosts
from tttjax.training.records import StepRecorder, Totals
from tttjax.training.step import Trainer, TrainState, make_trainer
from tttjax.training.warm_start import load_initial_weights
from tttjax.training.watchdog import Watchdog
from tttjax.types import Batch


class BatchStream(Protocol):
    """An iterator over this process's part of every batch, with a state to resume from."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class TrainRun:
    """The objects of a run in progress.

    tokenizer: fingerprint of the data's tokenizer ("" for custom batches). start: steps done by
    earlier starts. held_out: None without `train.eval_every`.
    """

    config: Config
    placement: Placement
    workdir: Path
    lock: Lock
    watchdog: Watchdog
    hosts: Hosts
    trainer: Trainer
    batches: BatchStream
    tokenizer: str
    checkpointer: checkpoints.Checkpointer
    logger: metrics.MetricLogger
    recorder: StepRecorder
    totals: Totals
    start: int
    held_out: HeldOutLoss | None


@sharing_failures()  # before the stack closes what waits for other processes
def set_up(
    config: Config,
    workdir: Path,
    lock: Lock,
    watchdog: Watchdog,
    hosts: Hosts,
    batches: BatchStream | None,
    exit_stack: contextlib.ExitStack,
    from_step: int | None,
) -> tuple[TrainRun, TrainState]:
    """Opens everything that training needs, closed by `exit_stack`, and the initial state."""
    settings = config.train
    placement, mesh = _choose_mesh(config, workdir)
    placed = placement.applied_to(config)
    batches, tokenizer = (batches, "") if batches else open_batches(config)
    exit_stack.callback(batches.close)
    kernels = describe_kernels(config, platform_of(mesh))
    trainer = make_trainer(placed, mesh)
    checkpointer = checkpoints.Checkpointer(
        workdir / checkpoints.CHECKPOINT_DIR,
        keep=settings.keep_checkpoints,
        keep_every=settings.keep_every,
    )
    exit_stack.callback(checkpointer.close)
    with watchdog.phase("restore"):
        state, start, totals = _initial_state(
            config, trainer, checkpointer, batches, tokenizer, from_step
        )
    if tokenizer and jax.process_index() == 0:
        copy_tokenizer(
            storage_path(config.data.sources[0]) / TOKENIZER_DIR, workdir / TOKENIZER_DIR
        )
    logger = metrics.MetricLogger(
        workdir,
        metrics.Throughput(
            settings.batch_size * settings.seq_len,
            flops.train_flops_per_token(config.model, config.inner, settings.seq_len),
            flops.device_peak(),
        ),
        hosts,
        total_steps=settings.steps,
        log_every=settings.log_every,
        start_step=start,
        wandb_project=settings.wandb_project,
        config=dataclasses.asdict(config),
    )
    exit_stack.callback(logger.close)
    described = "; ".join(filter(None, (_describe(placed, trainer, start), kernels)))
    lines = (*hosts.exchange_devices(), describe_change(placement, workdir), described)
    for line in filter(None, lines):
        logger.print_line(line)
    recorder = StepRecorder(workdir, settings.max_skipped_steps, logger, totals, hosts.account)
    run = TrainRun(
        config=config,
        placement=placement,
        workdir=workdir,
        lock=lock,
        watchdog=watchdog,
        hosts=hosts,
        trainer=trainer,
        batches=batches,
        tokenizer=tokenizer,
        checkpointer=checkpointer,
        logger=logger,
        recorder=recorder,
        totals=totals,
        start=start,
        held_out=make_held_out_loss(config, trainer.model, mesh) if settings.eval_every else None,
    )
    return run, state


def open_batches(config: Config) -> tuple[BatchStream, str]:
    """The training batches of `config.data`, and the fingerprint of their tokenizer.

    Raises:
      UserError: data are missing, damaged or too short, or exceed model.vocab_size.
    """
    data, settings = config.data, config.train
    sources = [open_prepared(path) for path in data.sources]
    for source in sources:
        if source.tokenizer.vocab_size > config.model.vocab_size:
            raise UserError(
                f"model.vocab_size={config.model.vocab_size} is smaller than the vocabulary of "
                f"{source.folder}, {source.tokenizer.vocab_size}: set model.vocab_size to that"
            )
    options = StreamOptions(
        seq_len=settings.seq_len,
        batch_size=settings.batch_size,
        seed=data.seed,
        shuffle=data.shuffle,
        layout=data.layout,
        weights=data.weights,
    )
    stream = make_train_stream(
        sources,
        options,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        prefetch=data.prefetch,
    )
    return stream, sources[0].fingerprint


def _choose_mesh(config: Config, workdir: Path) -> tuple[Placement, jax.sharding.Mesh]:
    placement = choose_placement(config, workdir, jax.device_count(), jax.process_count())
    placed = placement.applied_to(config)
    check_memory(placed, placed.mesh, device_memory(), host_memory(), jax.process_count())
    return placement, make_mesh(placement.data, placement.fsdp, placement.tensor)


def _initial_state(
    config: Config,
    trainer: Trainer,
    checkpointer: checkpoints.Checkpointer,
    batches: BatchStream,
    tokenizer: str,
    from_step: int | None,
) -> tuple[TrainState, int, Totals]:
    """(state, steps done, totals): resumed, from another run's weights, or newly initialised."""
    restored = checkpointer.restore(trainer.abstract_state, from_step)
    if restored is not None:
        check_weights_config(
            restored.config, config, str(checkpointer.directory / str(restored.step))
        )
        _check_tokenizer(config, tokenizer, restored.tokenizer, str(checkpointer.directory))
        batches.set_state(restored.data_state)
        if from_step == restored.step:
            checkpointer.go_back_to(from_step)
        return restored.state, restored.step, Totals(**restored.extra)
    if origin := config.train.init_from:
        origin_tokenizer = saved_weights.load_tokenizer_fingerprint(origin)
        _check_tokenizer(config, tokenizer, origin_tokenizer, origin)
        weights = load_initial_weights(origin, trainer, config.train.seed)
        return trainer.start_from(weights), 0, Totals()
    return trainer.init_state(config.train.seed), 0, Totals()


def _check_tokenizer(
    config: Config, data_fingerprint: str, weights_fingerprint: str, weights: str
) -> None:
    """UserError if data and weights have different tokenizers. Unknown ("") fingerprints pass."""
    if data_fingerprint and weights_fingerprint and data_fingerprint != weights_fingerprint:
        raise UserError(
            f"the data in {', '.join(config.data.sources)} were prepared with another tokenizer "
            f"(fingerprint {data_fingerprint[:12]}) than that of the weights in {weights} "
            f"({weights_fingerprint[:12]}); prepare them with that one (`tttjax prepare "
            "--tokenizer=DIR`, DIR being the data that the weights were trained on)"
        )


def _describe(config: Config, trainer: Trainer, start: int) -> str:
    """The line to print before the first step."""
    count = {
        part: sum(x.size for x in jax.tree.leaves(getattr(trainer.abstract_state.params, part)))
        for part in ("slow", "fast")
    }
    mesh = " x ".join(f"{name} {size}" for name, size in trainer.mesh.shape.items())
    origin = f" from {config.train.init_from}" if config.train.init_from else ""
    verb = f"continuing after step {start} of" if start else f"training{origin} for"
    micro_batches = config.train.accum_steps
    accumulation = f" in {micro_batches} micro-batches" if micro_batches > 1 else ""
    return (
        f"{verb} {config.train.steps} steps of {config.train.batch_size} x "
        f"{config.train.seq_len} tokens{accumulation}; {sum(count.values()):,} parameters, "
        f"{count['fast']:,} of them fast; {jax.device_count()} {jax.default_backend()} devices "
        f"({mesh})"
    )
