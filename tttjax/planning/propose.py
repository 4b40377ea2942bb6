"""The nearest recipe that fits, for one that does not.

Looked for are, in this order: weights gathered block by block; recomputation switched on where it
is off, and the fast form of the meta-gradient; the trajectory of the fast weights recomputed too;
weights and optimizer divided by more devices (mesh.fsdp); batches read in more parts
(train.accum_steps); and last, layers divided (mesh.tensor), for which mesh.fsdp may give way, since
that divides the state as well.
None of them changes a number of the run, but for rounding. Fewer changes come before more, small
ones before large.

What a change will save is predicted, so that few programs need compiling: the state of training is
divided by fsdp x tensor; of what a step holds, the weights that are gathered for all of it and
their gradient stay, the rest goes with the sequences that a device reads at once; of that, tensor
divides all but what is kept between blocks. A prediction is never the answer: the caller compiles
it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import jax

from tttjax.config import Config, InnerConfig, ModelConfig, check_mesh, has_fast_weights
from tttjax.errors import UserError
from tttjax.models import build_model
from tttjax.planning.memory import Memory
from tttjax.training.step import gathered_per_layer
from tttjax.ttt.outer_loss import learns

MARGIN = 0.97  # of the memory; predictions are not exact
AFTER_REFUSAL = 0.85  # of what was predicted and did not fit, the next try may need
TENSOR_WAYS = (1, 2, 4, 8)
LEANER = ("", "gather", "recomputation", "trajectory")  # what is made leaner; "": nothing


@dataclass(frozen=True)
class Candidate:
    """A changed recipe. changes: new values by field name, in words of the command line."""

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
    """The first candidate predicted to fit that does; None after `tries` that did not.

    needed: of the recipe as it is, on one device. fits: compiles a recipe for the pod. After a
    refusal the prediction was too low, and only those that save clearly more are tried.
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
    """Those predicted to fit into `capacity` bytes, the nearest first."""
    found = []
    for leaner, fsdp, accum, tensor in itertools.product(
        LEANER, _divisors(devices), _divisors(config.train.batch_size), TENSOR_WAYS
    ):
        changed = _changed(config, devices, leaner, fsdp, accum, tensor)
        if changed is None:
            continue
        changes = _changes(config, changed)
        predicted = predict(config, changed, devices, needed)
        if changes and predicted <= MARGIN * capacity:
            size = fsdp / config.mesh.fsdp * accum / config.train.accum_steps
            order = tensor, len(changes), (LEANER.index(leaner) or len(LEANER)), size, accum
            found.append((order, Candidate(changed, changes, predicted)))
    for _, candidate in sorted(found, key=lambda pair: pair[0]):
        yield candidate


def predict(before: Config, after: Config, devices: int, needed: Memory) -> float:
    """Bytes of a device under the recipe `after`, from those under `before`."""
    ways = [c.mesh.fsdp * c.mesh.tensor for c in (before, after)]
    state = needed.state * ways[0] / ways[1]
    parameters = needed.parameters * ways[0]
    held = [parameters * _held(c) for c in (before, after)]
    fixed = min(held[0], needed.working)
    # What enters a block is whole on all devices of tensor; what is inside is divided.
    enters = needed.activations if before.model.remat == "block" else 0.0
    kept = min(enters, needed.working - fixed)
    inside = needed.working - fixed - kept
    if _recomputes(after) and not _recomputes(before):
        kept, inside = kept / 2, inside / 2  # a guess, to be checked like all the others
    elif after.inner.trajectory == "recompute" != before.inner.trajectory:
        share = needed.trajectory / max(inside, 1)
        inside *= 1 - min(share, 1) * (1 - _kept_weights(after))
    inside *= before.mesh.tensor / after.mesh.tensor
    sequences = [_sequences_at_once(c, devices) for c in (before, after)]
    read = (kept + inside) * sequences[1] / sequences[0]
    fixed *= held[1] / held[0]
    return state + fixed + read + needed.program + needed.batch


def _changed(
    config: Config, devices: int, leaner: str, fsdp: int, accum: int, tensor: int
) -> Config | None:
    """The recipe with these values; None if it is not a valid one, or a step back."""
    if not (_divides_more(config, fsdp, accum, tensor) and _can_be_leaner(config, leaner, fsdp)):
        return None
    changed = _made_lean(_divided(config, leaner, fsdp, accum, tensor), leaner)
    try:
        check_mesh(changed, devices)
    except UserError:
        return None
    if tensor > config.mesh.tensor and _sequences_at_once(changed, devices) < 1:
        return None
    return changed


def _divides_more(config: Config, fsdp: int, accum: int, tensor: int) -> bool:
    """Whether nothing is divided among fewer than before; fsdp may give way to tensor."""
    mesh = config.mesh
    if accum % config.train.accum_steps or tensor % mesh.tensor:
        return False
    gives_way = tensor > mesh.tensor and fsdp * tensor % (mesh.fsdp * mesh.tensor) == 0
    return fsdp % mesh.fsdp == 0 or gives_way


def _can_be_leaner(config: Config, leaner: str, fsdp: int) -> bool:
    """Whether this way of LEANER ("": none) is not taken yet, and can be with so many chips."""
    if leaner == "gather":
        return config.mesh.gather != "layer" and fsdp > 1
    if leaner == "recomputation":
        return not _recomputes(config)
    if leaner == "trajectory":
        is_recomputed = config.inner.trajectory == "recompute"
        return not is_recomputed and has_fast_weights(config.model, config.inner)
    return True


def _divided(config: Config, leaner: str, fsdp: int, accum: int, tensor: int) -> Config:
    """The recipe on such a mesh, in so many parts; block by block where anything is made leaner."""
    mesh = config.mesh
    # data is what the other axes leave, whatever it was; left alone where nothing else changes.
    data = -1 if (fsdp, tensor) != (mesh.fsdp, mesh.tensor) else mesh.data
    gather = "layer" if leaner and fsdp > 1 else mesh.gather
    return dataclasses.replace(
        config,
        mesh=dataclasses.replace(mesh, data=data, fsdp=fsdp, tensor=tensor, gather=gather),
        train=dataclasses.replace(config.train, accum_steps=accum),
    )


def _made_lean(config: Config, leaner: str) -> Config:
    """With everything recomputed that can be, where `leaner` is more than another gathering."""
    if leaner in ("", "gather"):
        return config
    is_recomputed = leaner == "trajectory" or config.inner.trajectory == "recompute"
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
    """Whether the recipe keeps as little as it can from the forward to the backward pass."""
    inner = config.inner
    is_lean = inner.remat and inner.form == "fast" and inner.trajectory != "store"
    return config.model.remat == "block" and is_lean


def _held(config: Config) -> float:
    """Copies of all weights that a device holds during a step whatever it reads: of those that are
    whole for all of it the weights and their gradient, of the others their part of the gradient,
    twice where it is summed over parts of the batch."""
    mesh = config.mesh
    early = 1.0
    if mesh.gather == "layer" and mesh.fsdp > 1:
        early = _early_share(config.model, config.inner)
    sums = 1 if config.train.accum_steps == 1 else 2
    return (2 * early + sums * (1 - early) / mesh.fsdp) / mesh.tensor


@lru_cache
def _early_share(model: ModelConfig, inner: InnerConfig) -> float:
    built = build_model(model, inner)
    params = built.abstract_params()
    late = [
        params.slow.get(part) for part in gathered_per_layer(learns(built, inner.meta_gradient))
    ]
    sizes = [sum(w.size for w in jax.tree.leaves(tree)) for tree in (late, params)]
    return 1 - sizes[0] / sizes[1]


def _kept_weights(config: Config) -> float:
    """With recomputed trajectories, the part of them that is in memory at a time."""
    chunks = config.train.seq_len // config.inner.chunk_size
    return min(1.0, 2 * chunks**-0.5)


def _sequences_at_once(config: Config, devices: int) -> float:
    """Sequences that one device reads at a time."""
    return config.train.batch_size * config.mesh.tensor / devices / config.train.accum_steps


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
