"""Search for the nearest recipe that fits, for one that does not.

Changes are tried in this order: FSDP-sharded weights gathered per layer; recomputation, with the
fast form of the meta-gradient; recomputing the fast-weight trajectory as well; more FSDP sharding
(mesh.fsdp); more gradient accumulation (train.accum_steps); and last tensor parallelism
(mesh.tensor), which may replace part of mesh.fsdp, because it shards the state as well. None of
them changes the results, except for rounding. Fewer and smaller changes come first.

Predictions of the memory saved keep the number of compilations low. The training state is sharded
fsdp x tensor ways. Of a step's working memory, the weights gathered for the whole step and their
gradient are fixed; the rest is proportional to the sequences per device; of that, tensor shards
everything but the block inputs. The caller compiles every candidate to verify the prediction.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import jax

from tttjax.config import Config, InnerConfig, ModelConfig, check_mesh, has_fast_weights
from tttjax.errors import UserError
from tttjax.models.transformer import build_model
from tttjax.planning.memory import Memory
from tttjax.training.step import gathered_per_layer
from tttjax.ttt.outer_loss import learns

MARGIN = 0.97  # largest predicted share of the memory; predictions are not exact
AFTER_REFUSAL = 0.85  # largest prediction of the next try, relative to one that did not fit
TENSOR_SIZES = (1, 2, 4, 8)
SAVINGS = ("", "gather", "recomputation", "trajectory")  # memory savings; "": none


@dataclass(frozen=True)
class Candidate:
    """A changed recipe. changes: new values by field name, as on the command line."""

    config: Config
    changes: dict[str, str]
    predicted: float


def find_fitting(
    config: Config,
    devices: int,
    needed: Memory,
    capacity: float,
    fits: Callable[[Config], bool],
    tries: int = 3,
) -> Candidate | None:
    """The first candidate that fits; None after `tries` candidates that do not.

    needed: memory of the unchanged recipe on one device. fits: compiles a recipe for the pod. If it
    returns False, the prediction was too low; the next candidate must save clearly more.
    """
    limit = capacity
    for candidate in candidates(config, devices, needed, capacity):
        if candidate.predicted > limit:
            continue
        if fits(candidate.config):
            return candidate
        limit, tries = AFTER_REFUSAL * candidate.predicted, tries - 1
        if not tries:
            break
    return None


def candidates(
    config: Config, devices: int, needed: Memory, capacity: float
) -> Iterator[Candidate]:
    """Recipes predicted to fit into `capacity` bytes, the nearest first."""
    ranked = []
    for saving, fsdp, accum, tensor in itertools.product(
        SAVINGS, _divisors(devices), _divisors(config.train.batch_size), TENSOR_SIZES
    ):
        changed = _changed(config, devices, saving, fsdp, accum, tensor)
        if changed is None:
            continue
        changes = _changes(config, changed)
        predicted = predict(config, changed, devices, needed)
        if changes and predicted <= MARGIN * capacity:
            size = fsdp / config.mesh.fsdp * accum / config.train.accum_steps
            order = tensor, len(changes), (SAVINGS.index(saving) or len(SAVINGS)), size, accum
            ranked.append((order, Candidate(changed, changes, predicted)))
    for _, candidate in sorted(ranked, key=lambda pair: pair[0]):
        yield candidate


def predict(before: Config, after: Config, devices: int, needed: Memory) -> float:
    """Predicted bytes of a device under the recipe `after`; needed: under `before`."""
    shards = [c.mesh.fsdp * c.mesh.tensor for c in (before, after)]
    state = needed.state * shards[0] / shards[1]
    parameters = needed.parameters * shards[0]
    weights = [parameters * _weight_copies(c) for c in (before, after)]
    fixed = min(weights[0], needed.working)
    # Block inputs are replicated over tensor; activations inside blocks are sharded.
    block_inputs = needed.activations if before.model.remat == "block" else 0.0
    block_inputs = min(block_inputs, needed.working - fixed)
    inside = needed.working - fixed - block_inputs
    if _recomputes(after) and not _recomputes(before):
        block_inputs, inside = block_inputs / 2, inside / 2  # a guess; compilation verifies it
    elif after.inner.trajectory == "recompute" != before.inner.trajectory:
        share = needed.trajectory / max(inside, 1)
        inside *= 1 - min(share, 1) * (1 - _trajectory_fraction(after))
    inside *= before.mesh.tensor / after.mesh.tensor
    sequences = [_sequences_per_device(c, devices) for c in (before, after)]
    per_sequence = (block_inputs + inside) * sequences[1] / sequences[0]
    fixed *= weights[1] / weights[0]
    return state + fixed + per_sequence + needed.program + needed.batch


def _changed(
    config: Config, devices: int, saving: str, fsdp: int, accum: int, tensor: int
) -> Config | None:
    """The recipe with these values; None if it is invalid or shards less than before."""
    if not (_shards_no_less(config, fsdp, accum, tensor) and _saving_applies(config, saving, fsdp)):
        return None
    changed = _with_saving(_with_mesh(config, saving, fsdp, accum, tensor), saving)
    try:
        check_mesh(changed, devices)
    except UserError:
        return None
    if tensor > config.mesh.tensor and _sequences_per_device(changed, devices) < 1:
        return None
    return changed


def _shards_no_less(config: Config, fsdp: int, accum: int, tensor: int) -> bool:
    """Whether nothing is sharded less than before; tensor may replace part of fsdp."""
    mesh = config.mesh
    if accum % config.train.accum_steps or tensor % mesh.tensor:
        return False
    trades_fsdp_for_tensor = tensor > mesh.tensor and fsdp * tensor % (mesh.fsdp * mesh.tensor) == 0
    return fsdp % mesh.fsdp == 0 or trades_fsdp_for_tensor


def _saving_applies(config: Config, saving: str, fsdp: int) -> bool:
    """Whether a saving ("": none) is not applied yet and is possible with this fsdp."""
    if saving == "gather":
        return config.mesh.gather != "layer" and fsdp > 1
    if saving == "recomputation":
        return not _recomputes(config)
    if saving == "trajectory":
        is_recomputed = config.inner.trajectory == "recompute"
        return not is_recomputed and has_fast_weights(config.model, config.inner)
    return True


def _with_mesh(config: Config, saving: str, fsdp: int, accum: int, tensor: int) -> Config:
    """The recipe with these mesh sizes and steps; with a saving, weights are gathered per layer."""
    mesh = config.mesh
    # data takes the remaining devices if another axis changes.
    data = -1 if (fsdp, tensor) != (mesh.fsdp, mesh.tensor) else mesh.data
    gather = "layer" if saving and fsdp > 1 else mesh.gather
    return dataclasses.replace(
        config,
        mesh=dataclasses.replace(mesh, data=data, fsdp=fsdp, tensor=tensor, gather=gather),
        train=dataclasses.replace(config.train, accum_steps=accum),
    )


def _with_saving(config: Config, saving: str) -> Config:
    """The recipe with recomputation switched on as `saving` says."""
    if saving in ("", "gather"):
        return config
    is_recomputed = saving == "trajectory" or config.inner.trajectory == "recompute"
    trajectory = "recompute" if is_recomputed else "rewind"
    inner = dataclasses.replace(config.inner, remat=True, form="fast", trajectory=trajectory)
    model = dataclasses.replace(config.model, remat="block")
    return dataclasses.replace(config, model=model, inner=inner)


def _changes(before: Config, after: Config) -> dict[str, str]:
    pairs = {
        "model.remat": (before.model.remat, after.model.remat),
        "inner.remat": (before.inner.remat, after.inner.remat),
        "inner.form": (before.inner.form, after.inner.form),
        "inner.trajectory": (before.inner.trajectory, after.inner.trajectory),
        "mesh.fsdp": (before.mesh.fsdp, after.mesh.fsdp),
        "train.accum_steps": (before.train.accum_steps, after.train.accum_steps),
        "mesh.tensor": (before.mesh.tensor, after.mesh.tensor),
        "mesh.data": (before.mesh.data, after.mesh.data),
        "mesh.gather": (before.mesh.gather, after.mesh.gather),
    }
    return {name: str(new).lower() for name, (old, new) in pairs.items() if old != new}


def _recomputes(config: Config) -> bool:
    """Whether the recipe saves as few residuals as it can."""
    inner = config.inner
    is_minimal = inner.remat and inner.form == "fast"
    return config.model.remat == "block" and is_minimal


def _weight_copies(config: Config) -> float:
    """Copies of all weights that a device holds for a whole step, for any number of sequences.

    Weights gathered per step count twice (with their gradient); those gathered per layer count the
    shard of their gradient, twice with gradient accumulation.
    """
    mesh = config.mesh
    per_step = 1.0
    if mesh.gather == "layer" and mesh.fsdp > 1:
        per_step = _fraction_gathered_per_step(config.model, config.inner)
    sums = 1 if config.train.accum_steps == 1 else 2
    return (2 * per_step + sums * (1 - per_step) / mesh.fsdp) / mesh.tensor


@lru_cache
def _fraction_gathered_per_step(model: ModelConfig, inner: InnerConfig) -> float:
    network = build_model(model, inner)
    params = network.abstract_params()
    per_layer = [
        params.slow.get(part) for part in gathered_per_layer(learns(network, inner.meta_gradient))
    ]
    sizes = [sum(w.size for w in jax.tree.leaves(tree)) for tree in (per_layer, params)]
    return 1 - sizes[0] / sizes[1]


def _trajectory_fraction(config: Config) -> float:
    """The fraction of a recomputed trajectory that is in memory at a time."""
    chunks = config.train.seq_len // config.inner.chunk_size
    return min(1.0, 2 * chunks**-0.5)


def _sequences_per_device(config: Config, devices: int) -> float:
    """Sequences that one device processes at a time."""
    return config.train.batch_size * config.mesh.tensor / devices / config.train.accum_steps


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
