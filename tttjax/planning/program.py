"""The train step of a configuration, traced and compiled for a topology."""

import dataclasses
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from tttjax.config import Config, check_mesh
from tttjax.errors import is_out_of_memory
from tttjax.parallel.mesh import batch_sharding
from tttjax.parallel.precision import x64_if_configured
from tttjax.planning.count import Count, Transfer, count
from tttjax.planning.hlo import collectives
from tttjax.planning.memory import (
    Memory,
    device_program,
    estimate_temporary,
    make_memory,
    saved_bytes,
)
from tttjax.planning.topologies import Topology, open_mesh
from tttjax.training.step import Trainer, make_trainer
from tttjax.types import Batch


@dataclass(frozen=True)
class Program:
    """A traced train step. memory: estimated. seconds: of tracing."""

    config: Config
    topology: Topology
    traced: jax.stages.Traced
    count: Count
    memory: Memory
    seconds: float


@dataclass(frozen=True)
class CompiledStep:
    """A compiled train step. memory: None if the compiler ran out of memory; then it needs `needed`
    bytes (0 if the compiler does not say). unknown_loops: see `hlo.Collectives`."""

    memory: Memory | None
    needed: float
    available: float
    transfers: tuple[Transfer, ...]
    unknown_loops: int
    seconds: float


def trace(config: Config, topology: Topology) -> Program:
    """Traces the real train step on a mesh over the topology.

    Without a compiler for it, attention is traced in its XLA form, whose memory can be estimated.
    Raises UserError if the mesh does not fit topology or model, or libtpu is missing.
    """
    start = time.perf_counter()
    if not topology.compiles:
        model = dataclasses.replace(config.model, attention_kernel="xla")
        config = dataclasses.replace(config, model=model)
    mesh_config = check_mesh(config, topology.devices)
    with x64_if_configured(config):
        trainer = make_trainer(config, open_mesh(topology, mesh_config))
        batch = _abstract_batch(config, trainer)
        traced = trainer.step.trace(trainer.abstract_state, batch)
    memory = _estimate(trainer, batch, traced.jaxpr)
    seconds = time.perf_counter() - start
    return Program(config, topology, traced, count(traced.jaxpr), memory, seconds)


def _abstract_batch(config: Config, trainer: Trainer) -> Batch:
    shape = config.train.batch_size, config.train.seq_len
    sharding = batch_sharding(trainer.mesh)

    def array(dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return Batch(array(jnp.int32), array(jnp.int32), array(jnp.bool_))


def _estimate(trainer: Trainer, batch: Batch, program: ClosedJaxpr) -> Memory:
    device = device_program(program)
    state = trainer.abstract_state
    saved = saved_bytes(device, state.params.fast)
    return make_memory(state, batch, saved, estimate_temporary(device), 0.0, "estimate")


def compile_program(program: Program) -> CompiledStep:
    """Lowers and compiles it for its topology; needs `topology.compiles`."""
    start = time.perf_counter()
    with x64_if_configured(program.config):
        try:
            compiled = program.traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            arguments = program.memory.state + program.memory.batch
            needed, available = _out_of_memory(str(error), arguments)
            return CompiledStep(None, needed, available, (), 0, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    parsed = collectives(compiled.as_text())
    memory = _exact(program.memory, compiled.memory_analysis())
    available = program.topology.accelerator.memory if program.topology.accelerator else 0.0
    return CompiledStep(
        memory, memory.total, available, parsed.transfers, parsed.unknown_loops, seconds
    )


def _exact(estimate: Memory, analysis) -> Memory:
    """The compiler's totals, split by kind as in the estimate."""
    working = float(analysis.temp_size_in_bytes)
    trajectory = min(estimate.trajectory, working)
    activations = min(estimate.activations, working - trajectory)
    arguments = estimate.state + estimate.batch
    padding = analysis.argument_size_in_bytes - arguments
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Memory(
        parameters=estimate.parameters,
        optimizer=estimate.optimizer,
        batch=estimate.batch,
        trajectory=trajectory,
        activations=activations,
        temporary=working - trajectory - activations,
        program=results + analysis.generated_code_size_in_bytes + max(padding, 0.0),
        source="compiler",
    )


_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


def _out_of_memory(message: str, arguments: float) -> tuple[float, float]:
    """(bytes needed, bytes available) from the compiler's error; zeros if it states none.

    arguments: bytes of the step's arguments, which one of the two messages does not include.
    """
    size = r"([\d.]+)([KMGT]?)"
    if match := re.search(rf"Used {size} of {size}", message):
        return _bytes(match[1], match[2]), _bytes(match[3], match[4])
    if match := re.search(rf"temporaries \({size}\) exceeds available HBM \({size}\)", message):
        return arguments + _bytes(match[1], match[2]), _bytes(match[3], match[4])
    return 0.0, 0.0


def _bytes(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit]
