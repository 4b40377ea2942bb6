"""The loss of held-out sequences while training: with TTT and without, by position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from tttjax.config import Config
from tttjax.data.held_out import HeldOut, doubling_windows, eval_sequences
from tttjax.data.shards import PreparedData, open_prepared
from tttjax.errors import UserError
from tttjax.inference.prefill import make_inference_model
from tttjax.inference.sequence_nll import Scorer, make_scorer, token_losses
from tttjax.models.transformer import Transformer
from tttjax.ttt.outer_loss import make_inner_loop
from tttjax.types import Array, Params


@dataclass(frozen=True)
class HeldOutLoss:
    """Scores the same sequences at every call, with contexts of the training length.

    scorers: by mode, "on" (if there are fast weights) and "off". edges: of the bins of positions.
    """

    held_out: HeldOut
    mask_NT: np.ndarray
    scorers: Mapping[str, Scorer]
    edges: Sequence[int]
    batch_size: int
    mesh: Mesh

    def evaluate(self, params: Params, lr: float | Array) -> dict[str, Any]:
        """{"first_token": ..., "last_token": ..., mode: {"loss": x, "by_position": [...]}}.

        lr: inner learning rate. Losses are means over targets, in nats per token; of masked data,
        over the chosen targets (None at positions without any).
        """
        result: dict[str, Any] = {
            "first_token": [edge + 1 for edge in self.edges[:-1]],
            "last_token": list(self.edges[1:]),
        }
        length, count_T = self.edges[-1], self.mask_NT.sum(axis=0)
        for mode, scorer in self.scorers.items():
            nll_NT = token_losses(
                scorer, self.mesh, params, lr, self.held_out, length, self.batch_size
            )
            sum_T = np.where(self.mask_NT, nll_NT, 0).sum(axis=0, dtype=np.float64)
            bins = [np.add.reduceat(x_T, self.edges[:-1]) for x_T in (sum_T, count_T)]
            result[mode] = {
                "loss": float(sum_T.sum() / count_T.sum()),
                "by_position": [
                    float(total / count) if count else None
                    for total, count in zip(*bins, strict=True)
                ],
            }
        return result


def make_held_out_loss(config: Config, model: Transformer, mesh: Mesh) -> HeldOutLoss:
    """From `data.val_split` of the first source that has it, and `eval.*`.

    Raises UserError if no source has the split, or no document is long enough.
    """
    length, settings = config.train.seq_len, config.eval
    held_out = eval_sequences(
        _find_data(config),
        length=length,
        num=settings.num_sequences,
        split=config.data.val_split,
        seed=settings.seed,
    )
    inner = make_inner_loop(config.inner)
    modes = {"on": True, "off": False} if model.fast_paths else {"off": False}
    scorers = {
        mode: make_scorer(make_inference_model(model, inner, lr=0.0, learn=learn), mesh)
        for mode, learn in modes.items()
    }
    return HeldOutLoss(
        held_out=held_out,
        mask_NT=held_out.scored(),
        scorers=scorers,
        edges=doubling_windows(length, config.model.window_size),
        batch_size=settings.batch_size,
        mesh=mesh,
    )


def _find_data(config: Config) -> PreparedData:
    for source in map(open_prepared, config.data.sources):
        if source.splits.get(config.data.val_split, {}).get("tokens"):
            return source
    raise UserError(
        f"train.eval_every needs held-out data, but no source has the split "
        f"{config.data.val_split!r} (data.val_split); set train.eval_every=0, or prepare the data "
        "with that split"
    )
