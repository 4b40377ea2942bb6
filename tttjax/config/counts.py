"""Parameter counts by formula, and sizes that make two models equally large."""

import dataclasses
import itertools
from collections.abc import Callable

from tttjax.config.model import ModelConfig
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
    count = sum(MIXERS[kind](model) + _branch_norms(model) for kind in _real(mixers))
    if model.mlp_dim:
        count += 3 * D * model.mlp_dim + _branch_norms(model)
    if model.pre_conv:
        count += D + model.conv_size * D + D  # norm, taps, bias
    return count


def _real(mixers: str) -> list[str]:
    return [kind for kind in mixers.split("+") if kind != "none"]


def _branch_norms(model: ModelConfig) -> int:
    """The norms before and after one residual branch."""
    return (model.pre_norm + model.post_norm) * model.embed_dim


def _fast_mlp(model: ModelConfig) -> int:
    """The fast weights of one block."""
    if model.fast_mlp_heads:
        head = model.embed_dim // model.fast_mlp_heads
        return model.fast_mlp_heads * (2 * head * 4 * head + 4 * head + head)
    return 3 * model.embed_dim * model.mlp_dim


# --- mixers -------------------------------------------------------------------------------------


def _attention(model: ModelConfig) -> int:
    K = model.head_size
    heads = 2 * model.num_heads + 2 * model.kv_heads  # of queries, output, keys and values
    return model.embed_dim * heads * K + 2 * K * model.qk_norm


def _mamba2(model: ModelConfig) -> int:
    D, H = model.embed_dim, model.mamba_heads
    inner = H * model.mamba_head_dim
    groups = model.mamba_groups * model.mamba_state  # of B, and of C
    projections = D * (2 * inner + 2 * groups + H) + inner * D
    convolutions = (model.conv_size + 1) * (inner + 2 * groups)
    return projections + convolutions + 3 * H + inner  # dt's bias, A and the skip; the norm


def _gated_deltanet(model: ModelConfig) -> int:
    D = model.embed_dim
    key_heads, value_heads, key_dim, value_dim = model.delta_sizes
    keys, values = key_heads * key_dim, value_heads * value_dim
    projections = D * (2 * keys + 2 * values + 2 * value_heads) + values * D
    convolutions = model.conv_size * (2 * keys + values)
    return projections + convolutions + 2 * value_heads + value_dim  # A, dt's bias; the norm


def _ttt(model: ModelConfig, inner: int) -> int:
    """A TTT layer whose inner model has `inner` scalars over all heads."""
    D, heads = model.embed_dim, model.ttt_num_heads
    reads_queries = model.ttt_output == "query"
    if model.ttt_backbone == "mamba":  # one projection and its convolutions; values, gate, output
        outer = 4 * D * D + (1 + reads_queries) * (model.conv_size + 1) * D
    else:
        outer = (3 + reads_queries) * D * D
    rates = D * heads + heads + model.ttt_chunk
    return outer + rates + inner + 4 * D  # the inner norm and the one of the output


def _ttt_linear(model: ModelConfig) -> int:
    D = model.embed_dim
    return _ttt(model, inner=D * (D // model.ttt_num_heads) + D)


def _ttt_mlp(model: ModelConfig) -> int:
    D = model.embed_dim
    hidden = 4 * D // model.ttt_num_heads
    return _ttt(model, inner=2 * D * hidden + model.ttt_num_heads * hidden + D)


MIXERS: dict[str, Callable[[ModelConfig], int]] = {
    "full": _attention,
    "window": _attention,
    "local": _attention,
    "mamba2": _mamba2,
    "gated_deltanet": _gated_deltanet,
    "ttt_linear": _ttt_linear,
    "ttt_mlp": _ttt_mlp,
}
