"""The train step of a configuration, traced and compiled for a topology."""

import re
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tttjax.config import Config
from tttjax.errors import is_out_of_memory
from tttjax.parallel.mesh import batch_sharding
from tttjax.parallel.precision import x64_if_configured
from tttjax.planning.collectives import collectives
from tttjax.planning.count import count
from tttjax.planning.hlo import parse_hlo
from tttjax.planning.hlo_runs import count_runs
from tttjax.planning.kernels import Kernel, kernels
from tttjax.planning.memory import (
    Memory,
    device_program,
    known_memory,
    saved_bytes,
    split_working,
)
from tttjax.planning.primitives import Count, Transfer
from tttjax.planning.topologies import Topology
from tttjax.training.step import Trainer, make_trainer
from tttjax.types import Batch


@dataclass(frozen=True)
class Program:
    """A traced train step. memory: what is known of it before compilation. seconds: of tracing."""

    config: Config
    topology: Topology
    traced: jax.stages.Traced
    count: Count
    memory: Memory
    seconds: float


@dataclass(frozen=True)
class CompiledStep:
    """A compiled train step.

    out_of_memory: the compiler gave up. memory is then what it asked for (at least what is
    available, if it does not say), transfers are those of the traced program, and there are no
    kernels. available: bytes, 0 if unknown. kernels: of GPUs. unknown_loops: loops with kernels or
    collectives whose length is not known, counted once.
    """

    memory: Memory
    out_of_memory: bool
    available: float
    transfers: tuple[Transfer, ...]
    kernels: tuple[Kernel, ...]
    unknown_loops: int
    seconds: float


def trace(config: Config, topology: Topology, mesh: Mesh) -> Program:
    """Traces the real train step on a mesh over the topology.

    Raises UserError if the mesh does not fit the model.
    """
    start = time.perf_counter()
    with x64_if_configured(config):
        trainer = make_trainer(config, mesh)
        batch = _abstract_batch(config, trainer)
        traced = trainer.step.trace(trainer.abstract_state, batch)
    state = trainer.abstract_state
    saved = saved_bytes(device_program(traced.jaxpr), state.params.fast)
    memory = known_memory(state, batch, saved)
    counted = count(traced.jaxpr, topology.platform)
    return Program(config, topology, traced, counted, memory, time.perf_counter() - start)


def _abstract_batch(config: Config, trainer: Trainer) -> Batch:
    shape = config.train.batch_size, config.train.seq_len
    sharding = batch_sharding(trainer.mesh)

    def array(dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return Batch(array(jnp.int32), array(jnp.int32), array(jnp.bool_))


def compile_program(program: Program) -> CompiledStep:
    """Lowers and compiles it for its topology."""
    start = time.perf_counter()
    platform, available = program.topology.platform, available_bytes(program.topology)
    with x64_if_configured(program.config):
        try:
            compiled = program.traced.lower(lowering_platforms=(platform,)).compile()
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            memory, available = _out_of_memory(str(error), program.memory, available)
            seconds = time.perf_counter() - start
            transfers = program.count.transfers
            return CompiledStep(memory, True, available, transfers, (), 0, seconds)
    seconds = time.perf_counter() - start
    hlo = parse_hlo(compiled.as_text())
    runs = count_runs(hlo)
    traffic = collectives(hlo, runs)
    return CompiledStep(
        memory=_measured(program.memory, compiled.memory_analysis()),
        out_of_memory=False,
        available=available,
        transfers=traffic.transfers,
        kernels=kernels(hlo, runs) if platform == "cuda" else (),
        unknown_loops=len(runs.unknown) if platform == "cuda" else traffic.unknown_loops,
        seconds=seconds,
    )


def available_bytes(topology: Topology) -> float:
    """Memory of one device; 0 if unknown."""
    accelerator = topology.accelerator
    return accelerator.memory / accelerator.devices if accelerator else 0.0


def _measured(known: Memory, analysis) -> Memory:
    """The compiler's totals."""
    arguments = known.state + known.batch
    padding = analysis.argument_size_in_bytes - arguments
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    program = results + analysis.generated_code_size_in_bytes + max(padding, 0.0)
    return split_working(known, float(analysis.temp_size_in_bytes), program)


_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


def _out_of_memory(message: str, known: Memory, available: float) -> tuple[Memory, float]:
    """(memory, bytes available) from the compiler's error, which may state both."""
    size = r"([\d.]+)([KMGT]?)"
    arguments = known.state + known.batch
    if match := re.search(rf"Used {size} of {size}", message):
        working = _bytes(match[1], match[2]) - arguments
    elif match := re.search(rf"temporaries \({size}\) exceeds available HBM \({size}\)", message):
        working = _bytes(match[1], match[2])
    else:
        return split_working(known, max(known.working, available - arguments)), available
    return split_working(known, working), _bytes(match[3], match[4])


def _bytes(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit]
