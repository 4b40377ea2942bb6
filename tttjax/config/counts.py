"""Parameter counts by formula, and widths that make two models equally large."""

import dataclasses

from tttjax.config.schema import ModelConfig
from tttjax.errors import UserError


def parameter_count(model: ModelConfig) -> dict[str, int]:
    """Counts of scalars: `total`, `non_embedding`, and `fast` (the fast MLPs' matrices).

    `non_embedding` leaves out the embedding table and an untied output matrix. `fast` counts the
    weights declared fast, whatever `inner.fast_paths` may choose instead. For tied embeddings and
    all norms on, with s suffix blocks,

        non_embedding = L (4 D H K + 3 D F + 4 D + 2 K) + D + s (3 D F + 2 D).
    """
    D, layers = model.embed_dim, model.num_layers
    K = model.head_dim or D // model.num_heads
    norms_D = (model.pre_norm + model.post_norm) * D
    mlp = 3 * D * model.mlp_dim
    attention = 4 * D * model.num_heads * K + 2 * K * model.qk_norm + norms_D
    with_attention = sum(
        model.mixers[layer % len(model.mixers)] != "none" for layer in range(layers)
    )
    fast_blocks = model.suffix_layers if model.fast_mlp else 0
    non_embedding = with_attention * attention + (layers + fast_blocks) * (mlp + norms_D) + D
    tables = 1 if model.tie_embeddings else 2
    return {
        "total": non_embedding + tables * model.vocab_size * D,
        "non_embedding": non_embedding,
        "fast": fast_blocks * mlp,
    }


def match_parameters(model: ModelConfig, target: int, multiple_of: int = 8) -> int:
    """The `mlp_dim`, a multiple of `multiple_of`, whose total is nearest to `target` scalars.

    How controls of equal size are made: the one with more MLPs gets narrower ones, as in the
    paper. Raises UserError if even the narrowest model is nearer to twice the target.
    """
    widths = [dataclasses.replace(model, mlp_dim=multiple_of * n) for n in (1, 2)]
    first, second = (parameter_count(m)["total"] for m in widths)
    steps = max(0, round((target - first) / (second - first)))
    if first > 1.5 * target:
        raise UserError(
            f"No mlp_dim gives {target} parameters: with mlp_dim = {multiple_of} there are already "
            f"{first}."
        )
    return multiple_of * (1 + steps)
