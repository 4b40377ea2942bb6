"""Import of a source as a run: reads and compares the weights, writes the run, verifies it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tttjax.config import Config, with_absolute_paths
from tttjax.errors import UserError, install_extra
from tttjax.interop.huggingface.compare import TOLERANCE, largest_difference, static_logits
from tttjax.interop.source import ImportSource, Log, Reference
from tttjax.interop.streaming import assemble, flat_weights, return_freed_memory
from tttjax.io.atomic import atomic_folder
from tttjax.models.relayout import fast_mlps
from tttjax.models.transformer import Transformer, build_model
from tttjax.parallel.mesh import make_mesh
from tttjax.parallel.precision import x64_if_configured
from tttjax.runs.run import RunSpec, open_run
from tttjax.runs.write_run import max_concurrent_bytes, write_run
from tttjax.training import saved_weights
from tttjax.training.step import weights_template
from tttjax.types import Array, Params

SAMPLE = 64  # random tokens whose logits are compared


@dataclasses.dataclass(frozen=True)
class LogitDeviations:
    """Largest differences of logits.

    reference: between the source's own code and ours; None: not compared. read_back: between the
    written run and the weights that were read.
    """

    reference: float | None
    read_back: float


def import_run(source: ImportSource, workdir: str | Path, log: Log = print) -> LogitDeviations:
    """Creates a run in `workdir` with the source's weights.

    Raises UserError for a work directory in use, unreadable weights, and logits that deviate;
    nothing is left behind then.
    """
    config = with_absolute_paths(source.config)
    model = build_model(config.model, config.inner)
    with atomic_folder(workdir, "--workdir") as folder, x64_if_configured(config):
        # First, so that it is freed before our weights are read.
        reference_logit_TV = _reference_logits(source.reference, log)
        template = weights_template(model, _make_mesh(config))
        params = _read_weights(source, model, template)
        logit_TV = _finite_logits(source, params)
        deviation = _compare(source, params, reference_logit_TV, log)
        write_run(
            folder,
            config,
            params,
            step=source.step,
            origin=source.origin,
            tokenizer=source.tokenizer,
        )
        concurrent_bytes = max_concurrent_bytes(params)
        del params  # never hold both copies in memory
        return_freed_memory()
        written = open_run(RunSpec(folder))
        restored = saved_weights.restore_params(folder, template, concurrent_bytes=concurrent_bytes)
        read_back = largest_difference(sample_logits(written.config, restored), logit_TV)
        if not read_back <= TOLERANCE:  # also for NaN
            raise UserError(
                f"the written run computes other logits than the weights that were read (by up to "
                f"{read_back:.3g}) and was removed; check the disk and import again."
            )
    if source.tokenizer is None:
        log("without a tokenizer: commands that read text need --tokenizer")
    log(f"verified the run: logits of {SAMPLE} random tokens differ by at most {read_back:.3g}")
    return LogitDeviations(deviation, read_back)


def _make_mesh(config: Config) -> Mesh:
    """A mesh with the configuration's fsdp and tensor axes; replicas would only cost memory."""
    fsdp, tensor = config.mesh.fsdp, config.mesh.tensor
    if fsdp * tensor > jax.device_count():
        fsdp = tensor = 1
    return make_mesh(1, fsdp, tensor, devices=jax.devices()[: fsdp * tensor])


def sample_tokens(vocab_size: int) -> np.ndarray:
    """The same random tokens [T] in every comparison."""
    return np.random.default_rng(0).integers(vocab_size, size=SAMPLE, dtype=np.int32)


def sample_logits(config: Config, params: Params) -> np.ndarray:
    """Logits [T, V] of random tokens, without inner updates.

    They use every weight; of the embedding, only the rows of these tokens.
    """
    # XLA attention can be sharded and agrees with the other kernels up to rounding.
    xla_config = dataclasses.replace(config.model, attention_kernel="xla", remat="none")
    model = build_model(xla_config, config.inner)
    token_T = jnp.asarray(sample_tokens(config.model.vocab_size))
    return np.asarray(_jitted_static_logits(model, params, token_T))


# By model, so that the logits of what was read and of what was written are one program.
_jitted_static_logits = jax.jit(static_logits, static_argnums=0)


def _read_weights(source: ImportSource, model: Transformer, template: Params) -> Params:
    """The source's weights and the added ones."""
    return_freed_memory()
    added = _added(model, template, source.added, source.config.train.seed)
    params = assemble(template, source.iter_weights(model), model, added)
    return_freed_memory()
    return params


def _added(
    model: Transformer, template: Params, paths: frozenset[str], seed: int
) -> dict[str, Array]:
    """The weights that the source lacks, initialized as in a new model, on their devices."""
    if not paths:
        return {}
    targets = flat_weights(template)

    def init() -> dict[str, Array]:
        new = fast_mlps(model, jax.random.key(seed))
        return {path: new[path] for path in sorted(paths)}

    return jax.jit(init, out_shardings={path: targets[path].sharding for path in sorted(paths)})()


def _finite_logits(source: ImportSource, params: Params) -> np.ndarray:
    logit_TV = sample_logits(source.config, params)
    if not np.isfinite(logit_TV).all():
        raise UserError(
            f"the logits of {source.origin['source']} are not finite: the weights are damaged or "
            "the configuration is wrong."
        )
    return logit_TV


def _reference_logits(reference: Reference | None, log: Log) -> np.ndarray | None:
    if reference is None:
        return None
    logit_TV = reference.logits(sample_tokens(reference.config.model.vocab_size))
    if logit_TV is None:
        log(
            f"{reference.name} is not installed ({install_extra('interop')}), so logits are not "
            "compared with it"
        )
    return logit_TV


def _compare(
    source: ImportSource, params: Params, reference_logit_TV: np.ndarray | None, log: Log
) -> float | None:
    """The largest deviation from the reference. Raises UserError if it exceeds rounding."""
    reference = source.reference
    if reference is None or reference_logit_TV is None:
        return None
    deviation = largest_difference(sample_logits(reference.config, params), reference_logit_TV)
    largest = float(np.max(np.abs(reference_logit_TV)))
    summary = f"logits of {SAMPLE} random tokens differ by at most {deviation:.3g}"
    if reference.exact and not deviation <= TOLERANCE * max(1.0, largest):
        raise UserError(
            f"{summary} from those of {reference.name}, whose largest is {largest:.3g}: "
            f"{source.origin['source']} has a feature that tttjax does not support, and was not "
            "imported."
        )
    rounded = "" if reference.exact else "; weights were rounded to another dtype"
    log(
        f"compared with {reference.name} in float32: {summary} (the largest is {largest:.3g})"
        f"{rounded}"
    )
    return deviation
