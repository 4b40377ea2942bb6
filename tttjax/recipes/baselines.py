"""The recurrent systems that TTT-E2E is compared with: their mixers and own sizes.

system          a block                                      state of a sequence at 760M
mamba2          Mamba-2, window attention, MLP               9.4M scalars and the window
gated_deltanet  Gated DeltaNet, window attention, MLP        10.6M and the window
kda             Kimi Delta Attention, window attention, MLP  4.7M and the window
ttt_kvb         window attention, TTT-MLP, MLP               19.1M and the window
ttt_linear      convolution, TTT-Linear, MLP                 3.6M
ttt_mlp         convolution, TTT-MLP, MLP                    28.5M

Of TTT layers the fast weights are counted; the sums of their gradients within a mini-batch are as
many again.

kda (arXiv 2510.26692) is newer than the papers. It replaces Gated DeltaNet in that hybrid, with the
official default of 128 entries per head.

mamba2, gated_deltanet and ttt_kvb are hybrids with window attention of 8K tokens, with QK-norm,
which the paper found to help them. It says neither which blocks have attention nor how wide the
mixers are. But from 8K to 128K tokens of context the training cost of all three grows by as much as
that of window attention alone, 0.38e10 FLOPs per token at 3B, which is just what 32 windows of 8K
and full width cost. So ours have window attention in every block, and grow by as much. The whole
cost of our TTT-KVB is the published one, too; that of the other two is published as 0.41e10 less
than ours at every length, which is what attention to 8K tokens costs, as though that had not been
counted.

The recurrent mixer comes first, as in the hybrids of the Gated DeltaNet paper, but in TTT-KVB
after the attention. Mamba-2 and Gated DeltaNet have the sizes of their official defaults. TTT-KVB
takes one inner step for each 1,024 tokens, the mean over them of their gradients, so that it learns
less from a token than TTT-MLP with its 16 does; the paper gives no rate, ours is that of TTT-MLP
(`--config.model.ttt_layer.lr`).

The last two are those of the second paper (arXiv 2407.04620), in its Mamba backbone, without
attention and without norms after the mixers; inner learning rates 1 and 0.1. The paper warms the
0.1 up from 0.01; here it is constant.

MLP widths are solved for (`sizes.match_full_attention`), so that every system has the parameters
of full attention, those of the embedding left out.

Any other mixture is one field. `mixers` is a pattern repeated over the blocks, and + puts two
mixers into one block:

    ("mamba2",)                            no attention; with mlp_dim = 0 the original Mamba-2,
                                           twice as deep: `matched_model` finds the depth
    ("mamba2", "window")                   every other block
    (*["gated_deltanet"] * 3, "full")      three to one
    ("gated_deltanet", "mamba2+window")    both
    ("full+ttt_mlp",)                      TTT-KVB with full attention
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CHUNK_KVB = 1024  # the mini-batch at which the paper's TTT-KVB is best
HEAD_KVB = 64  # 2 matrices of 64 x 256 for each head: 18M in all at 760M, as in the paper
MAX_KEY_DIM = 256
HEAD_KDA = 128


@dataclass(frozen=True)
class Baseline:
    """mixers: the pattern of a block. fields: from embed_dim to further fields of the model."""

    mixers: tuple[str, ...]
    fields: Callable[[int], dict[str, Any]]


def _mamba2(embed_dim: int) -> dict[str, Any]:
    """Official defaults: expand 2, heads of 64, state 128, one group."""
    return {"mamba2": {"expand": 2, "head_dim": 64, "state_size": 128, "groups": 1}}


def _gated_deltanet(embed_dim: int) -> dict[str, Any]:
    """Official defaults: keys 3/4 as wide as the model in heads of 256, values twice that.

    Where 256 does not divide the keys' width, the largest smaller multiple of 64 that does.
    """
    keys = 3 * embed_dim // 4
    key_dim = next(k for k in range(MAX_KEY_DIM, 0, -64) if keys % k == 0)
    sizes = {"key_heads": keys // key_dim, "key_dim": key_dim, "value_dim": 2 * key_dim}
    return {"gated_deltanet": sizes}


def _ttt(embed_dim: int) -> dict[str, Any]:
    """The second paper's block, with the attention heads of the size as the TTT layer's."""
    layer = {"backbone": "mamba", "chunk_size": 16}
    return {"ttt_layer": layer, "pre_conv": True, "post_norm": False}


def _ttt_kvb(embed_dim: int) -> dict[str, Any]:
    """Queries, keys and values each of their own, no convolution: attention is there for that."""
    heads = embed_dim // HEAD_KVB
    return {"ttt_layer": {"backbone": "plain", "chunk_size": CHUNK_KVB, "heads": heads}}


def _kda(embed_dim: int) -> dict[str, Any]:
    """Official defaults: as wide as the model, in heads of 128."""
    sizes = {"heads": embed_dim // HEAD_KDA, "key_dim": HEAD_KDA, "value_dim": HEAD_KDA}
    return {"kda": sizes}


BASELINES = {
    "mamba2": Baseline(("mamba2+window",), _mamba2),
    "gated_deltanet": Baseline(("gated_deltanet+window",), _gated_deltanet),
    "kda": Baseline(("kda+window",), _kda),
    "ttt_linear": Baseline(("ttt_linear",), _ttt),
    "ttt_mlp": Baseline(("ttt_mlp",), _ttt),
    "ttt_kvb": Baseline(("window+ttt_mlp",), _ttt_kvb),
}
