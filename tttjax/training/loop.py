"""The training loop: set-up, steps, metrics, checkpoints, resuming."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax

from tttjax.config import (
    Config,
    check_memory,
    check_same_run,
    check_weights_config,
    config_fingerprint,
    with_absolute_paths,
    write_run_info,
)
from tttjax.config.placement import Placement, describe_change, place
from tttjax.data.pipeline import StreamOptions, make_train_stream
from tttjax.data.shards import TOKENIZER_DIR, open_prepared
from tttjax.data.tokenizers.base import copy_tokenizer
from tttjax.errors import UserError
from tttjax.exit_codes import DONE, SAVED
from tttjax.io.atomic import atomic_write
from tttjax.io.locks import Lock
from tttjax.io.paths import storage_path
from tttjax.parallel import precision
from tttjax.parallel.mesh import make_mesh
from tttjax.parallel.pod import sharing_failures
from tttjax.planning import flops
from tttjax.runtime import compilation_cache, progress
from tttjax.runtime.memory import device_memory, host_memory, memory_use
from tttjax.training import checkpoints, metrics
from tttjax.training.attention_kernels import describe_kernels, platform_of
from tttjax.training.checkpoints import saying_what_is_saved
from tttjax.training.failed_starts import forget_failed_starts
from tttjax.training.held_out_loss import HeldOutLoss, make_held_out_loss
from tttjax.training.hosts import Hosts
from tttjax.training.ledger import Ledger
from tttjax.training.plot import write_plot
from tttjax.training.profiler import Profiler
from tttjax.training.records import StepRecorder, Totals
from tttjax.training.result import TrainResult, describe_result
from tttjax.training.save_schedule import SaveSchedule
from tttjax.training.start_account import StartAccount
from tttjax.training.step import Trainer, TrainState, make_trainer
from tttjax.training.stopping import StopRequest
from tttjax.training.warm_start import load_initial_weights
from tttjax.training.watchdog import Watchdog, end_hung_run
from tttjax.training.workdir import lock_workdir, remove_failed_start
from tttjax.types import Batch


class BatchStream(Protocol):
    """An iterator over this process's part of every batch, with a state to resume from."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...
    def close(self) -> None: ...


def train(
    config: Config,
    workdir: str | os.PathLike,
    *,
    stop_after: int | None = None,
    from_step: int | None = None,
    batches: BatchStream | None = None,
    began: float | None = None,
) -> TrainResult:
    """Trains up to step `config.train.steps`, from the newest checkpoint in `workdir` if any.

    Arguments:
      stop_after: save and return after this step, as if interrupted.
      from_step: go back to the checkpoint of this step, once: a run that has done so resumes from
        its newest checkpoint. Later checkpoints are renamed to `abandoned-<step>`.
      batches: batches to use instead of the data sets of `config.data`.
      began: Unix time at which the command began, for the ledger; default: now.

    Raises:
      UserError: configuration, data, mesh, work directory or checkpoints are invalid; the disk is
        full; loss or gradient is not finite in too many steps; another process uses `workdir`;
        too many starts in a row failed.
    """
    started = time.perf_counter()
    workdir, config = storage_path(workdir, "--workdir"), with_absolute_paths(config)
    if stop_after is not None and stop_after < 1:
        raise UserError(f"--stop-after={stop_after} must be a step, 1 or later")
    metrics.check_wandb(config.train.wandb_project)
    hosts = Hosts(StartAccount(began))
    watchdog = Watchdog(
        config.watchdog, lambda problem: end_hung_run(workdir, problem), hosts.account
    )
    locked = lock_workdir(workdir, config.train.max_failed_starts)
    with (
        watchdog,
        locked as lock,
        remove_failed_start(workdir, lock),
        Ledger(workdir, lock, config.train.steps, hosts) as ledger,
    ):
        check_same_run(workdir, config)
        with contextlib.ExitStack() as exit_stack:
            exit_stack.enter_context(precision.x64_if_configured(config))
            run, state = _set_up(
                config, workdir, lock, watchdog, hosts, batches, exit_stack, from_step
            )
            setup_seconds = time.perf_counter() - started
            last = min(config.train.steps, stop_after or config.train.steps)
            state, step = _loop(run, state, last)
            hosts.account.end_steps()
            result = _result(run, state, step, setup_seconds)
            ledger.code = SAVED if result.interrupted else DONE
            run.logger.print_line(describe_result(result, run.checkpointer.newest_step))
        if jax.process_index() == 0 and (step > run.start or not result.interrupted):
            forget_failed_starts(workdir)
        if jax.process_index() == 0 and step == config.train.steps:
            with progress.report_activity("drawing the loss curve"):
                _write_results(run, result)
    return result


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
def _set_up(
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
    placement, mesh = _place(config, workdir)
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
    for line in filter(None, (*hosts.meet(), describe_change(placement, workdir), described)):
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


@sharing_failures()
def _loop(run: TrainRun, state: TrainState, last: int) -> tuple[TrainState, int]:
    """Runs steps start + 1 to `last`, or until a request to stop; saves. (state, steps done)."""
    settings, recorder, account = run.config.train, run.recorder, run.hosts.account
    async_metrics, step = metrics.AsyncMetrics(account), run.start
    with contextlib.ExitStack() as exit_stack:
        stop = exit_stack.enter_context(StopRequest(run.watchdog.expect_stop))
        profiler = exit_stack.enter_context(
            Profiler(settings.profile_steps, run.workdir, run.hosts, run.logger.print_line)
        )
        saves = SaveSchedule(settings, run.start)
        recorder.start_clock()
        account.begin_steps(run.start)
        for step in range(run.start + 1, last + 1):
            profiler.before(step)
            waiting_since = time.perf_counter()
            with account.phase("input"):
                data_state, batch = run.batches.get_state(), next(run.batches)
                on_device = run.trainer.put_batch(batch)
            waited = time.perf_counter() - waiting_since
            with _compiling(run) if step == run.start + 1 else account.phase("device"):
                state, values = run.trainer.step(state, on_device)
            recorder.add(async_metrics.swap(step, values, (waited, batch, data_state)))
            profiler.after(step, values)
            with account.phase("device"):  # several processes may wait for each other
                should_stop, should_save = stop.after(step), saves.is_due(step)
            if step == run.start + 1:  # includes compilation, so it is timed separately
                with progress.report_activity("the first step"):
                    first = async_metrics.flush()
                try:
                    recorder.add(first)
                finally:  # also if it was not finite and max_skipped_steps is 1
                    _write_config(run)
                    recorder.start_clock()
            run.watchdog.step()
            run.lock.check()
            if run.held_out and (step % settings.eval_every == 0 or step == settings.steps):
                recorder.add(async_metrics.flush())
                _evaluate(run, step, state)
            if should_save or step == last or should_stop:
                # Records reach the disk before the checkpoint that includes their steps.
                recorder.add(async_metrics.flush())
                # What led to skipped steps may be in the state, so it must not displace older ones.
                if recorder.skipped_in_row == 0 or step == settings.steps:
                    _save(run, step, state)
                    saves.saved(step)
            if should_stop:
                break
        activity = progress.report_activity("saving the last checkpoint")
        with run.watchdog.phase("save"), activity, saying_what_is_saved(run.checkpointer):
            run.checkpointer.wait()
        if run.start >= last:  # no step to do
            _write_config(run)
    return state, step


@contextlib.contextmanager
def _compiling(run: TrainRun) -> Iterator[None]:
    """Shows progress of the first step's call, which compiles or reads the compilation cache."""
    program = f"{config_fingerprint(run.config)} {dict(run.trainer.mesh.shape)} {jax.__version__}"
    started = time.perf_counter()
    expected = compilation_cache.last_seconds(program)
    with (
        run.watchdog.phase("compile"),
        progress.report_activity("compiling the train step", expected),
    ):
        yield
    compilation_cache.record_seconds(program, time.perf_counter() - started)


def _write_config(run: TrainRun) -> None:
    """Writes the configuration, which marks the work directory as this run's."""
    if jax.process_index() == 0:
        placement = dataclasses.asdict(run.placement)
        write_run_info(run.workdir, run.config, with_devices=True, placement=placement)


def _evaluate(run: TrainRun, step: int, state: TrainState) -> None:
    """Logs the held-out losses after a step, at the inner learning rate of its training."""
    assert run.held_out is not None
    started = time.perf_counter()
    with (
        run.watchdog.phase("evaluate"),
        progress.report_activity(f"evaluating step {step} on held-out data"),
    ):
        losses = run.held_out.evaluate(state.params, run.trainer.inner_lr_at(state))
    run.logger.log_held_out(step, losses, time.perf_counter() - started)
    run.recorder.start_clock()


def _save(run: TrainRun, step: int, state: TrainState) -> None:
    activity = progress.report_activity(f"saving the checkpoint of step {step}")
    with run.watchdog.phase("save"), activity, saying_what_is_saved(run.checkpointer):
        run.logger.sync()
        run.checkpointer.save(
            step,
            state,
            data_state=run.batches.get_state(),
            extra=dataclasses.asdict(run.totals),
            config=dataclasses.asdict(run.config),
            tokenizer=run.tokenizer,
        )
    run.recorder.start_clock()


def _result(run: TrainRun, state: TrainState, step: int, setup_seconds: float) -> TrainResult:
    memory = memory_use()
    peak = run.logger.throughput.peak
    return TrainResult(
        step=step,
        loss=run.recorder.loss,
        interrupted=step < run.config.train.steps,
        state=state,
        setup_seconds=setup_seconds,
        first_step_seconds=run.recorder.first_seconds,
        **run.recorder.steady_rates(),
        mfu_refers_to=peak.source if peak else None,
        train_seconds=run.totals.seconds,
        skipped_steps=int(state.skipped),
        peak_memory_bytes=memory.peak,
        peak_memory_of=memory.where,
    )


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


def _place(config: Config, workdir: Path) -> tuple[Placement, jax.sharding.Mesh]:
    placement = place(config, workdir, jax.device_count(), jax.process_count())
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
        origin_tokenizer = checkpoints.load_tokenizer_fingerprint(origin)
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


def _write_results(run: TrainRun, result: TrainResult) -> None:
    path = run.workdir / "summary.json"
    if result.step == run.start and path.exists():
        return  # no step was done: keep the summary of the earlier start
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(result.summary(), indent=1, allow_nan=False) + "\n")
    write_plot(run.workdir)
