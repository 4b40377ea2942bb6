"""Initial weights from another run (`train.init_from`), in this run's parameter layout.

Usually the two models are equal. A model without an inner loop can also be extended by one: its
last blocks become the suffix, other weights become fast, fast MLPs are added.
"""

import sys

import jax

from tttjax.config import from_config_dict
from tttjax.models.relayout import fast_mlps, relayout
from tttjax.models.transformer import Transformer, build_model
from tttjax.training import checkpoint_format, saved_weights
from tttjax.training.step import Trainer, weights_template
from tttjax.types import Array, Params, PyTree


def load_initial_weights(origin: str, trainer: Trainer, seed: int) -> Params:
    """The newest weights of `origin`, a work directory or checkpoint, for the trainer's model.

    seed: for fast MLPs that `origin` does not have (initialised by `model.fast_mlp_init`).
    Raises UserError if there is no undamaged checkpoint, or if the models differ in more than the
    suffix and its fast weights.
    """
    path = saved_weights.find_checkpoint(origin)
    expected, target = trainer.abstract_state.params, trainer.model
    saved = checkpoint_format.read_meta(path)["config"]
    source = target
    if saved is not None:
        config = from_config_dict(saved)
        source = build_model(config.model, config.inner)

    def convert(params: Params, key: Array) -> Params:
        return relayout(params, source, target, fast_mlps(target, key))

    key = jax.random.key(seed)
    if not _needs_relayout(source, target, expected, convert, key):
        # Equal layouts, or a UserError with the differences.
        return checkpoint_format.read_item(path / "params", expected)
    template = weights_template(source, trainer.mesh)
    params = checkpoint_format.read_item(path / "params", template)
    _print_note(source, target, str(path))
    shardings = jax.tree.map(lambda x: x.sharding, expected)
    return jax.jit(convert, out_shardings=shardings)(params, key)


def _needs_relayout(
    source: Transformer, target: Transformer, expected: Params, convert, key: Array
) -> bool:
    """Whether both models have the same blocks in different layouts."""
    saved = source.abstract_params()
    if source.kinds != target.kinds or _shapes(saved) == _shapes(expected):
        return False
    try:
        converted = jax.eval_shape(convert, saved, key)
    except ValueError:  # rows of one stack differ: some blocks' fast MLPs have other sizes
        return False
    return _shapes(converted) == _shapes(expected)


def _shapes(tree: PyTree) -> dict[str, tuple]:
    return {name: (x.shape, x.dtype) for name, x in checkpoint_format.named_leaves(tree).items()}


def _print_note(source: Transformer, target: Transformer, path: str) -> None:
    if jax.process_index() != 0:
        return
    added = target.config.fast_mlp and not source.config.fast_mlp
    start = "at zero" if target.config.fast_mlp_init == "zero" else "at random"
    mlps = f"; their fast MLPs are new and start {start}" if added else ""
    print(
        f"note: of the model in {path} the last {target.config.suffix_layers} blocks "
        f"are the suffix{mlps}",
        file=sys.stderr,
    )
