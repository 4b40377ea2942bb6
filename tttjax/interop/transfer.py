"""From a source to a run: read, compared with the source's own code, written, opened again."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from tttjax.config import Config, with_absolute_paths
from tttjax.errors import UserError, install_extra
from tttjax.interop.huggingface.compare import TOLERANCE, largest_difference
from tttjax.interop.source import ImportSource, Reference, Say
from tttjax.interop.streaming import assemble, return_freed_memory
from tttjax.io.atomic import atomic_folder
from tttjax.models import Transformer, build_model, combine, fast_mlps
from tttjax.parallel.mesh import make_mesh
from tttjax.parallel.precision import as_configured
from tttjax.runs.run import RunSpec, open_run
from tttjax.runs.write_run import max_concurrent_bytes, write_run
from tttjax.training import checkpoints
from tttjax.training.step import weights_template
from tttjax.types import Array, Params

SAMPLE = 64  # random tokens whose logits are compared


@dataclasses.dataclass(frozen=True)
class Deviations:
    """Largest differences of logits: of the source's own code from ours (None: not compared), and
    of the run that was opened again from the weights that were read."""

    reference: float | None
    read_back: float


def import_run(source: ImportSource, workdir: str | Path, say: Say = print) -> Deviations:
    """Makes `workdir` a run with the source's weights.

    Raises UserError for a work directory that is in use, for weights that cannot be read, and for
    logits that deviate; then nothing is left behind.
    """
    config = with_absolute_paths(source.config)
    model = build_model(config.model, config.inner)
    with atomic_folder(workdir, "--workdir") as folder, as_configured(config):
        # First, so that it has left memory before ours is there.
        theirs = _reference_logits(source.reference, say)
        template = weights_template(model, _make_mesh(config))
        params = _read(source, model, template)
        logit_TV = _finite_logits(source, params)
        deviation = _compare(source, params, theirs, say)
        write_run(
            folder,
            config,
            params,
            step=source.step,
            origin=source.origin,
            tokenizer=source.tokenizer,
        )
        concurrent_bytes = max_concurrent_bytes(params)
        del params  # so that the two never lie in memory together
        return_freed_memory()
        written = open_run(RunSpec(folder))
        again = checkpoints.restore_params(folder, template, concurrent_bytes=concurrent_bytes)
        read_back = largest_difference(sample_logits(written.config, again), logit_TV)
        if not read_back <= TOLERANCE:  # NaN is no agreement
            raise UserError(
                f"the run that was written computes other logits than the weights that were read "
                f"(by up to {read_back:.3g}), and was removed; check the disk, and import again."
            )
    if source.tokenizer is None:
        say("without a tokenizer: commands that read text need --tokenizer")
    say(f"opened again: logits of {SAMPLE} random tokens differ by at most {read_back:.3g}")
    return Deviations(deviation, read_back)


def _make_mesh(config: Config) -> Mesh:
    """The devices among which the configuration divides weights; copies of them serve nobody."""
    fsdp, tensor = config.mesh.fsdp, config.mesh.tensor
    if fsdp * tensor > jax.device_count():
        fsdp = tensor = 1
    return make_mesh(1, fsdp, tensor, devices=jax.devices()[: fsdp * tensor])


def sample_tokens(vocab_size: int) -> np.ndarray:
    """The same random tokens [T] in every comparison."""
    return np.random.default_rng(0).integers(vocab_size, size=SAMPLE, dtype=np.int32)


def sample_logits(config: Config, params: Params) -> np.ndarray:
    """Logits [T, V] of random tokens, without learning, through every weight but embeddings."""
    # By XLA alone: its programs may be divided among devices, and agree with others to rounding.
    plain = dataclasses.replace(config.model, attention_kernel="xla", remat="none")
    model = build_model(plain, config.inner)
    token_T = jnp.asarray(sample_tokens(config.model.vocab_size))

    @jax.jit
    def logits(params: Params) -> Array:
        weights = combine(params.slow, params.fast)
        x_TD = model.embed(params.slow, token_T)
        for part in ("prefix", "suffix"):
            x_TD, _ = model.run_part(part, weights, None, x_TD)
        return model.logits(weights, model.final_norm(weights, x_TD))

    return np.asarray(logits(params))


def _read(source: ImportSource, model: Transformer, template: Params) -> Params:
    """The weights, and what is added to them."""
    return_freed_memory()
    added = _added(model, template, source.added, source.config.train.seed)
    params = assemble(template, source.pieces(model), model, added)
    return_freed_memory()
    return params


def _added(
    model: Transformer, template: Params, paths: frozenset[str], seed: int
) -> dict[str, Array]:
    """Weights that the source does not have, as a new model has them, on the devices."""
    if not paths:
        return {}
    flat = flatten_dict(combine(template.slow, template.fast), sep="/")

    def start() -> dict[str, Array]:
        new = fast_mlps(model, jax.random.key(seed))
        return {path: new[path] for path in sorted(paths)}

    return jax.jit(start, out_shardings={path: flat[path].sharding for path in sorted(paths)})()


def _finite_logits(source: ImportSource, params: Params) -> np.ndarray:
    logit_TV = sample_logits(source.config, params)
    if not np.isfinite(logit_TV).all():
        raise UserError(
            f"the logits of {source.origin['source']} are not finite: its weights are damaged, or "
            "it needs another configuration."
        )
    return logit_TV


def _reference_logits(reference: Reference | None, say: Say) -> np.ndarray | None:
    if reference is None:
        return None
    found = reference.logits(sample_tokens(reference.config.model.vocab_size))
    if found is None:
        say(
            f"{reference.name} is not installed ({install_extra('interop')}), so that our logits "
            "cannot be compared with its own"
        )
    return found


def _compare(
    source: ImportSource, params: Params, theirs: np.ndarray | None, say: Say
) -> float | None:
    """The largest deviation from the reference; UserError if it is too large to be rounding."""
    reference = source.reference
    if reference is None or theirs is None:
        return None
    deviation = largest_difference(sample_logits(reference.config, params), theirs)
    largest = float(np.max(np.abs(theirs)))
    told = f"logits of {SAMPLE} random tokens differ by at most {deviation:.3g}"
    if reference.exact and not deviation <= TOLERANCE * max(1.0, largest):
        raise UserError(
            f"{told} from those of {reference.name}, whose largest is {largest:.3g}: "
            f"{source.origin['source']} has something that is not understood here, and was not "
            "imported."
        )
    rounded = "" if reference.exact else ", weights having been rounded to another type"
    say(
        f"compared with {reference.name} in float32: {told} (the largest is {largest:.3g}){rounded}"
    )
    return deviation
