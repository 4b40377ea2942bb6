"""The training loop: steps, metrics, checkpoints, the result."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator

import jax

from tttjax.config import (
    Config,
    check_same_run,
    config_fingerprint,
    with_absolute_paths,
    write_run_info,
)
from tttjax.errors import UserError
from tttjax.exit_codes import DONE, SAVED
from tttjax.io.atomic import atomic_write
from tttjax.io.paths import storage_path
from tttjax.parallel import precision
from tttjax.parallel.pod import sharing_failures
from tttjax.runtime import compilation_cache, progress
from tttjax.runtime.memory import memory_use
from tttjax.training import metrics
from tttjax.training.checkpoints import naming_saved_step
from tttjax.training.failed_starts import forget_failed_starts
from tttjax.training.hosts import Hosts
from tttjax.training.ledger import Ledger
from tttjax.training.plot import write_plot
from tttjax.training.profiler import Profiler
from tttjax.training.result import TrainResult, describe_result
from tttjax.training.save_schedule import SaveSchedule
from tttjax.training.start_account import StartAccount
from tttjax.training.step import TrainState
from tttjax.training.stopping import StopRequest
from tttjax.training.train_run import BatchStream, TrainRun, set_up
from tttjax.training.watchdog import Watchdog, end_hung_run
from tttjax.training.workdir import lock_workdir, remove_failed_start


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
            run, state = set_up(
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
        with run.watchdog.phase("save"), activity, naming_saved_step(run.checkpointer):
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
    with run.watchdog.phase("save"), activity, naming_saved_step(run.checkpointer):
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


def _write_results(run: TrainRun, result: TrainResult) -> None:
    path = run.workdir / "summary.json"
    if result.step == run.start and path.exists():
        return  # no step was done: keep the summary of the earlier start
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(result.summary(), indent=1, allow_nan=False) + "\n")
    write_plot(run.workdir)
