"""Parameter counts by formula, and sizes that make two models equally large."""

import dataclasses
import itertools

from tttjax.config.model import ModelConfig, split_mixers
from tttjax.errors import UserError


def parameter_count(model: ModelConfig) -> dict[str, int]:
    """Counts of scalars: `total`, `non_embedding`, and `fast` (the fast MLPs).

    `non_embedding` leaves out the embedding table and an untied output matrix. `fast` counts the
    weights declared fast, whatever `inner.fast_paths` may choose instead; the inner weights of a
    TTT layer are its state, and their initial values ordinary weights. For attention in every
    block, tied embeddings and all norms on, with s suffix blocks and G heads of keys and values (H
    unless num_kv_heads says less),

        non_embedding = L (2 D (H + G) K + 3 D F + 4 D + 2 K) + D + s (3 D F + 2 D).
    """
    D = model.embed_dim
    periods, remaining = divmod(model.num_layers, len(model.mixers))
    sizes = [_block(model, mixers) for mixers in model.mixers]
    blocks = periods * sum(sizes) + sum(sizes[:remaining])
    fast_blocks = model.suffix_layers if model.fast_mlp else 0
    fast = fast_blocks * _fast_mlp(model)
    non_embedding = blocks + fast + fast_blocks * _branch_norms(model) + D
    tables = 1 if model.tie_embeddings else 2
    return {
        "total": non_embedding + tables * model.vocab_size * D,
        "non_embedding": non_embedding,
        "fast": fast,
    }


def match_parameters(
    model: ModelConfig, target: int, multiple_of: int = 8, count: str = "total"
) -> int:
    """The `mlp_dim`, a multiple of `multiple_of`, whose size is nearest to `target` scalars.

    How controls of equal size are made: the one with more MLPs gets narrower ones, as in the
    paper. count: what of `parameter_count` is compared, "total" or "non_embedding". Raises
    UserError if even the narrowest model is nearer to twice the target.
    """
    widths = [dataclasses.replace(model, mlp_dim=multiple_of * n) for n in (1, 2)]
    first, second = (parameter_count(m)[count] for m in widths)
    steps = max(0, round((target - first) / (second - first)))
    if first > 1.5 * target:
        raise UserError(
            f"No mlp_dim gives {target} parameters: with mlp_dim = {multiple_of} there are already "
            f"{first}."
        )
    return multiple_of * (1 + steps)


def matched_model(
    model: ModelConfig,
    target: int,
    multiple_of: int = 8,
    count: str = "non_embedding",
    within: float = 0.02,
) -> ModelConfig:
    """`model` at a size within `within` (a fraction) of `target` scalars.

    Solved for, in this order:
    the width of the MLPs, a multiple of `multiple_of`, at the model's own depth;
    where the mixers alone are too large for that, fewer blocks too: as many as leave room for an
    MLP;
    where the model has no MLP (mlp_dim = 0), the number of blocks alone, as in the Mamba models,
    which have two blocks for each one of a Transformer.
    The mixers' own sizes stay as they are. Raises UserError if nothing comes near enough.
    """
    if model.mlp_dim:
        narrowest = dataclasses.replace(model, mlp_dim=multiple_of)
        largest = round(target * (1 + within))
        if parameter_count(narrowest)[count] > largest:
            layers = min(model.num_layers, _max_blocks(narrowest, largest, count))
            model = dataclasses.replace(model, num_layers=layers)
        width = match_parameters(model, target, multiple_of, count)
        model = dataclasses.replace(model, mlp_dim=width)
    else:
        fewer = _max_blocks(model, target, count)
        choices = [dataclasses.replace(model, num_layers=fewer + more) for more in (0, 1)]
        model = min(choices, key=lambda m: abs(parameter_count(m)[count] - target))
    result = parameter_count(model)[count]
    if abs(result - target) > within * target:
        remedy = "embed_dim or the mixers" if model.mlp_dim else "embed_dim, or set an mlp_dim"
        raise UserError(
            f"No model of the mixers {', '.join(model.mixers)} has {target} parameters within "
            f"{within:.1%}; the nearest, with num_layers = {model.num_layers} and mlp_dim = "
            f"{model.mlp_dim}, has {result}. Change {remedy}."
        )
    return model


def _max_blocks(model: ModelConfig, target: int, count: str) -> int:
    """The largest num_layers that the fields allow with at most `target` scalars, or the least."""
    least = max(len(model.mixers), model.suffix_layers, 1)
    for layers in itertools.count(least):
        if parameter_count(dataclasses.replace(model, num_layers=layers + 1))[count] > target:
            return layers
    raise AssertionError("itertools.count ended")


# --- parts of a block ---------------------------------------------------------------------------


def _block(model: ModelConfig, mixers: str) -> int:
    """A block without its fast MLP. mixers: its entry of `model.mixers`."""
    D = model.embed_dim
    count = sum(
        model.mixer(kind).parameter_count(kind, model) + _branch_norms(model)
        for kind in split_mixers(mixers)
    )
    if model.mlp_dim:
        count += 3 * D * model.mlp_dim + _branch_norms(model)
    if model.pre_conv:
        count += D + model.conv_size * D + D  # norm, taps, bias
    return count


def _branch_norms(model: ModelConfig) -> int:
    """The norms before and after one residual branch."""
    return (model.pre_norm + model.post_norm) * model.embed_dim


def _fast_mlp(model: ModelConfig) -> int:
    """The fast weights of one block."""
    if model.fast_mlp_heads:
        head = model.embed_dim // model.fast_mlp_heads
        return model.fast_mlp_heads * (2 * head * 4 * head + 4 * head + head)
    return 3 * model.embed_dim * model.mlp_dim
