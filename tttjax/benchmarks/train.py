"""Benchmark of train steps: compile time, step time, memory, FLOPs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tttjax.benchmarks.timing import (
    cell,
    check_rounds,
    mebibytes,
    median_seconds,
    none_if_out_of_memory,
    peak_bytes,
    quotient,
    temporary_bytes,
)
from tttjax.config import Config, check_mesh, parameter_count
from tttjax.parallel.mesh import make_mesh
from tttjax.parallel.precision import x64_if_configured
from tttjax.planning.count import count
from tttjax.training.attention_kernels import platform_of
from tttjax.training.step import TrainState, make_trainer
from tttjax.types import Batch


@dataclass(frozen=True)
class TrainBenchmark:
    """Cost of one configuration's train step.

    compile_seconds: tracing and compiling. step_seconds: median. step_ratio: to the last
    configuration. Times are None if the device runs out of memory. flops: of the matrix products of
    the traced step (`planning.count`). memory_bytes: peak memory on one device (arguments,
    temporaries and outputs; donated buffers count once). temporary_bytes: the temporaries alone.
    Both as the compiler reports them; None if it does not.
    """

    name: str
    parameters: int
    seq_len: int
    tokens: int
    compile_seconds: float
    step_seconds: float | None
    step_ratio: float | None
    flops: float
    memory_bytes: int | None
    temporary_bytes: int | None


@dataclass
class _TrainEntry:
    name: str
    config: Config
    step: jax.stages.Compiled | None  # None: too large for the device
    state: TrainState | None
    batch: Batch
    compile_seconds: float
    flops: float
    memory_bytes: int | None
    temporary_bytes: int | None


def bench_train(configs: Sequence[tuple[str, Config]], rounds: int = 5) -> list[TrainBenchmark]:
    """Measures the train steps of the named configurations.

    Raises UserError if a configuration does not fit the devices, and for no rounds.
    """
    check_rounds(rounds)
    entries = []
    for name, config in configs:
        with x64_if_configured(config):
            entries.append(_prepare(name, config))
    runs = {i: partial(_step, e) for i, e in enumerate(entries) if e.step and e.state}
    medians = median_seconds(runs, rounds)
    return [
        TrainBenchmark(
            name=entry.name,
            parameters=parameter_count(entry.config.model)["total"],
            seq_len=entry.config.train.seq_len,
            tokens=entry.batch.inputs.size,
            compile_seconds=entry.compile_seconds,
            step_seconds=medians.get(i),
            step_ratio=quotient(medians.get(i), medians.get(len(entries) - 1)),
            flops=entry.flops,
            memory_bytes=entry.memory_bytes,
            temporary_bytes=entry.temporary_bytes,
        )
        for i, entry in enumerate(entries)
    ]


def _step(entry: _TrainEntry) -> Any:
    assert entry.step
    with x64_if_configured(entry.config):
        entry.state, metrics = entry.step(entry.state, entry.batch)
    return entry.state, metrics


def _prepare(name: str, config: Config) -> _TrainEntry:
    mesh = check_mesh(config, jax.device_count())
    trainer = make_trainer(config, make_mesh(mesh.data, mesh.fsdp, mesh.tensor))
    shape = (config.train.batch_size, config.train.seq_len)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.model.vocab_size, (2, *shape), dtype=np.int32)
    batch = trainer.put_batch(Batch(tokens[0], tokens[1], jnp.ones(shape, bool)))
    start = time.perf_counter()
    traced = trainer.step.trace(trainer.abstract_state, batch)
    compiled = none_if_out_of_memory(traced.lower().compile)
    compile_seconds = time.perf_counter() - start
    return _TrainEntry(
        name,
        config,
        compiled,
        none_if_out_of_memory(partial(trainer.init_state, config.train.seed)),
        batch,
        compile_seconds,
        count(traced.jaxpr, platform_of(trainer.mesh)).flops,
        compiled and peak_bytes(compiled),
        compiled and temporary_bytes(compiled),
    )


def format_table(results: Sequence[TrainBenchmark]) -> str:
    """The results as a text table."""
    width = max(len(result.name) for result in results)
    head = "sequence  parameters  compile s   step s  ratio  GFLOPs  ratio  memory MiB  temporary"
    lines = [f"{'':{width}}  {head}"]
    for result in results:
        lines.append(
            f"{result.name:{width}}  {result.seq_len:8}  {result.parameters:10,}  "
            f"{result.compile_seconds:9.1f}  {cell(result.step_seconds, '7.3f')}  "
            f"{cell(result.step_ratio, '5.2f')}  "
            f"{result.flops / 1e9:6,.0f}  {result.flops / results[-1].flops:5.2f}  "
            f"{mebibytes(result.memory_bytes):>10}  {mebibytes(result.temporary_bytes):>9}"
        )
    return "\n".join(lines)
