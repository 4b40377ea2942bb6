"""The weights that a run starts from: those of another run, in this one's layout.

Most often the two models are the same. A model without an inner loop may also be given one: its
last blocks become the suffix, other weights are fast, fast MLPs are added.
"""

import sys

import jax

from tttjax.config import from_config_dict
from tttjax.models import Transformer, build_model, fast_mlps, relayout
from tttjax.parallel.mesh import param_shardings
from tttjax.training import checkpoint_format, checkpoints
from tttjax.training.step import Trainer
from tttjax.types import Array, Params, PyTree


def load_initial_weights(origin: str, trainer: Trainer, seed: int) -> Params:
    """The newest weights of `origin`, a work directory or checkpoint, for the trainer's model.

    seed: of fast MLPs that `origin` does not have; they start as `model.fast_mlp_init` says.
    Raises UserError if there is no undamaged checkpoint, or for weights that differ in anything
    else than the suffix and what is fast in it.
    """
    path = checkpoints.find_checkpoint(origin)
    wanted, target = trainer.abstract_state.params, trainer.model
    saved = checkpoint_format.read_meta(path)["config"]
    source = target
    if saved is not None:
        config = from_config_dict(saved)
        source = build_model(config.model, config.inner)

    def move(params: Params, key: Array) -> Params:
        return relayout(params, source, target, fast_mlps(target, key))

    key = jax.random.key(seed)
    if not _is_moved(source, target, wanted, move, key):
        return checkpoint_format.read_item(
            path / "params", wanted
        )  # equal, or refused with the differences
    template = source.abstract_params()
    shardings = param_shardings(trainer.mesh, source.axes(), template)
    template = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), template, shardings
    )
    params = checkpoint_format.read_item(path / "params", template)
    _tell(source, target, str(path))
    return jax.jit(move, out_shardings=jax.tree.map(lambda x: x.sharding, wanted))(params, key)


def _is_moved(source: Transformer, target: Transformer, wanted: Params, move, key: Array) -> bool:
    """Whether the two lay out the same blocks in different ways."""
    there = source.abstract_params()
    if source.kinds != target.kinds or _sizes(there) == _sizes(wanted):
        return False
    try:
        moved = jax.eval_shape(move, there, key)
    except ValueError:  # rows of one stack differ: some blocks' fast MLPs have other sizes
        return False
    return _sizes(moved) == _sizes(wanted)


def _sizes(tree: PyTree) -> dict[str, tuple]:
    return {name: (x.shape, x.dtype) for name, x in checkpoint_format.named_leaves(tree).items()}


def _tell(source: Transformer, target: Transformer, path: str) -> None:
    if jax.process_index() != 0:
        return
    added = target.fast_mlp and not source.fast_mlp
    start = "at zero" if target.shape.fast_mlp_init == "zero" else "at random"
    mlps = f"; their fast MLPs are new and start {start}" if added else ""
    print(
        f"note: of the model in {path} the last {target.suffix_layers} blocks are the suffix{mlps}",
        file=sys.stderr,
    )
