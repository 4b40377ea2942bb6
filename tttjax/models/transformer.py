"""The model: a pure function from (parameters, state, tokens) to (outputs, state).

The *prefix* has no fast weights and runs over all tokens at once. The *suffix*, the last blocks,
holds the fast weights: the inner loop runs it chunk by chunk. Equal blocks are stacked and scanned,
so that compile time does not grow with depth; a pattern such as 5 window : 1 full is scanned by its
period.

Everything here is for one sequence; `over_sequences` adds the batch.
"""

import difflib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict

from tttjax.config.model import ModelConfig
from tttjax.config.schema import InnerConfig
from tttjax.errors import UserError
from tttjax.models.block import Block
from tttjax.models.inner_rates import Declaration, declare_rates, inner_rates
from tttjax.models.layers import RMSNorm, normal_weight
from tttjax.models.mixer import AttentionForm
from tttjax.models.stacking import (
    Stack,
    combine,
    declared_axes,
    empty_state,
    is_declared_fast,
    partition,
    path_filter,
    run_stage,
)
from tttjax.models.ttt_layer.layer import TTTLayer
from tttjax.ops.cross_entropy.nll import token_nll, token_nll_in_blocks
from tttjax.ops.norms import rms_norm
from tttjax.types import Array, Params, PyTree

PARTS = ("prefix", "suffix")


@dataclass(frozen=True)
class Stage:
    """Consecutive blocks: the sequence `kinds`, `repeats` times."""

    kinds: tuple[str, ...]
    repeats: int


def advance(state: PyTree, tokens: int) -> PyTree:
    """The state after all its parts have processed `tokens` more tokens."""
    return {**state, "position": state["position"] + tokens}


def _starts_a_state(path: str) -> bool:
    """Whether a weight is the inner model of a TTT layer before the first token."""
    parts = path.split("/")
    return parts[-1] in TTTLayer.INNER_WEIGHTS and parts[-2].startswith("mixer")


def plan_stages(kinds: Sequence[str]) -> tuple[Stage, ...]:
    """Whole periods of the shortest pattern as one scanned stage, the rest as a second."""
    if not kinds:
        return ()
    period = next(
        p
        for p in range(1, len(kinds) + 1)
        if all(a == b for a, b in zip(kinds, kinds[p:], strict=False))
    )
    repeats, remainder = divmod(len(kinds), period)
    stages = []
    if repeats:
        stages.append(Stage(tuple(kinds[:period]), repeats))
    if remainder:
        stages.append(Stage(tuple(kinds[-remainder:]), 1))
    return tuple(stages)


class EmbedAndHead(nnx.Module):
    """The weights outside the blocks: embedding, final norm, head."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        D, V, dtype = model.embed_dim, model.vocab_size, jnp.dtype(model.param_dtype)

        def weight(size: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            return normal_weight(rngs, size, axes, std=model.init_std, dtype=dtype)

        self.embedding = weight((V, D), ("vocab", "embed"))
        self.final_norm = RMSNorm(D, "embed", eps=model.norm_eps, dtype=dtype)
        if not model.tie_embeddings:
            self.head = weight((D, V), ("embed", "vocab"))


@dataclass(frozen=True)
class Transformer:
    """Pure functions of a model, without weights.

    fast_patterns: paths of the fast weights, in place of the declared ones (`FastWeight`).
    learn_lr: which inner learning rates are weights too (`InnerConfig.learn_lr`).
    """

    config: ModelConfig
    fast_patterns: tuple[str, ...] = ()
    learn_lr: str = "none"

    @property
    def _param_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.param_dtype)

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Dtype of activations and matrix products."""
        return jnp.dtype(self.config.compute_dtype)

    # --- layout -----------------------------------------------------------------------------

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The mixer of every block, first to last."""
        mixers = self.config.mixers
        return tuple(mixers[i % len(mixers)] for i in range(self.config.num_layers))

    @cached_property
    def stages(self) -> dict[str, tuple[Stage, ...]]:
        first = self.config.num_layers - self.config.suffix_layers
        return {
            "prefix": plan_stages(self.kinds[:first]),
            "suffix": plan_stages(self.kinds[first:]),
        }

    @cached_property
    def stacks(self) -> dict[str, Stack]:
        """Every stack of blocks by path, in order of execution."""

        def stack(kind: str, fast: bool, repeats: int) -> Stack:
            return Stack(Block, repeats, (kind, fast, self.config))

        return {
            f"{part}/stage{i}/block{j}": stack(
                kind, self.config.fast_mlp and part == "suffix", stage.repeats
            )
            for part in PARTS
            for i, stage in enumerate(self.stages[part])
            for j, kind in enumerate(stage.kinds)
        }

    @cached_property
    def _embed_and_head(self) -> Stack:
        return Stack(EmbedAndHead, 1, (self.config,))

    def block_paths(self) -> list[tuple[str, int]]:
        """(path of the stack, row in it) of every block, first to last."""
        return [
            (f"{part}/stage{i}/block{j}", row)
            for part in PARTS
            for i, stage in enumerate(self.stages[part])
            for row in range(stage.repeats)
            for j in range(len(stage.kinds))
        ]

    @cached_property
    def _variables(self) -> dict[str, tuple[nnx.Variable, int | None]]:
        """Every declared weight by path, and the height of its stack (None: outside the blocks)."""
        with self._weights_x64():
            variables: dict[str, tuple[nnx.Variable, int | None]] = {
                "/".join(path): (v, None) for path, v in self._embed_and_head.variables().items()
            }
            for prefix, stack in self.stacks.items():
                for path, variable in stack.variables().items():
                    variables["/".join((prefix, *path))] = (variable, stack.repeats)
        return variables

    def _weights_x64(self) -> AbstractContextManager:
        """A context that enables x64 for weights in float64."""
        is_wide = self.config.param_dtype == "float64"
        return jax.enable_x64(True) if is_wide else nullcontext()

    @cached_property
    def fast_paths(self) -> frozenset[str]:
        """Paths of the fast weights: the declared ones, or those that the patterns name.

        Raises UserError for a pattern that matches nothing or a weight outside the suffix.
        """
        if not self.fast_patterns:
            return frozenset(p for p, (v, _) in self._variables.items() if is_declared_fast(v))
        for pattern in self.fast_patterns:
            if not any(map(path_filter([pattern]), self._variables)):
                similar = difflib.get_close_matches(pattern, self._variables, n=3, cutoff=0)
                raise UserError(
                    f"inner.fast_paths: {pattern!r} matches no weight; the paths nearest to it are "
                    + ", ".join(similar)
                )
        chosen = frozenset(filter(path_filter(self.fast_patterns), self._variables))
        starts = sorted(path for path in chosen if _starts_a_state(path))
        if starts:
            raise UserError(
                f"inner.fast_paths chooses {starts[0]!r}, where a TTT layer's own learning starts: "
                "it is read at the first token only, so changing it later does nothing; choose "
                "other weights"
            )
        outside = sorted(p for p in chosen if p.startswith("prefix/") or p == "embedding")
        if outside:
            raise UserError(
                f"inner.fast_paths chooses {outside[0]!r}, which lies before the suffix and runs "
                "once for the whole sequence; choose weights of the suffix, or enlarge "
                "model.suffix_layers"
            )
        return chosen

    def axes(self) -> Params:
        """Logical axis names (a tuple of strings) of every weight."""
        tree = {path: declaration.axes for path, declaration in self._declarations.items()}
        tree |= {path: declaration.axes for path, declaration in self._rates.items()}
        return partition(unflatten_dict(tree, sep="/"), self.fast_paths)

    @cached_property
    def _declarations(self) -> dict[str, Declaration]:
        """Every weight of the network by path."""
        return {
            path: Declaration(
                v.shape if height is None else (height, *v.shape),
                declared_axes(v, height is not None),
            )
            for path, (v, height) in self._variables.items()
        }

    @cached_property
    def _rates(self) -> dict[str, Declaration]:
        """The learned inner learning rates by path."""
        return declare_rates(self.learn_lr, {p: self._declarations[p] for p in self.fast_paths})

    # --- parameters and state ---------------------------------------------------------------

    def init(self, key: Array | int) -> Params:
        """Random weights: matrices N(0, init_std^2), norms 1. key: of jax.random, or a seed."""
        key = jax.random.key(key) if isinstance(key, int) else key
        end_key, *keys = jax.random.split(key, 1 + len(self.stacks))
        with self._weights_x64():
            ends = jax.tree.map(lambda x: x[0], self._embed_and_head.init(end_key))
            blocks = {
                path: stack.init(k)
                for (path, stack), k in zip(self.stacks.items(), keys, strict=True)
            }
            rates = {path: jnp.zeros(r.shape, self._param_dtype) for path, r in self._rates.items()}
        tree = {**ends, **unflatten_dict(blocks | rates, sep="/")}
        return partition(tree, self.fast_paths)

    def abstract_params(self) -> Params:
        """Shapes and dtypes of `init`, which is not traced."""

        tree = {
            path: jax.ShapeDtypeStruct(declaration.shape, self._variables[path][0].dtype)
            for path, declaration in self._declarations.items()
        }
        for path, declaration in self._rates.items():
            tree[path] = jax.ShapeDtypeStruct(declaration.shape, self._param_dtype)
        return partition(unflatten_dict(tree, sep="/"), self.fast_paths)

    def init_state(self, max_length: int, parts: Sequence[str] = PARTS) -> PyTree:
        """The state before the first token.

        max_length: capacity of full attention, in tokens; other mixers ignore it.
        """
        state: dict[str, PyTree] = {
            path: empty_state(stack, max_length, self.compute_dtype)
            for path, stack in self.stacks.items()
            if path.split("/")[0] in parts
        }
        # A part without blocks has an entry too, as in the state that `apply` returns.
        blocks = {part: {} for part in parts} | unflatten_dict(state, sep="/")
        return {"position": jnp.zeros((), jnp.int32), "blocks": blocks}

    # --- functions --------------------------------------------------------------------------

    def inner_rates(self, slow: PyTree, lr: Array | float) -> Array | float | PyTree:
        """The inner learning rate of every fast weight: a scalar, or a tree like `Params.fast`."""
        ranks = {path: len(self._declarations[path].shape) for path in self.fast_paths}
        return inner_rates(self.learn_lr, ranks, slow, lr)

    def embed(self, slow: PyTree, token_T: Array) -> Array:
        """Embeddings of the tokens, not scaled, in the compute dtype, [T, D]."""
        return jnp.take(slow["embedding"], token_T, axis=0).astype(self.compute_dtype)

    def run_part(
        self,
        part: str,
        weights: PyTree,
        state: PyTree | None,
        x_TD: Array,
        remat: bool | None = None,
        form: AttentionForm = "dense",
    ) -> tuple[Array, PyTree | None]:
        """Runs the blocks of "prefix" or "suffix" over the next T tokens of a sequence.

        weights: the nested dict of all weights (`combine(slow, fast)`), or at least this part.
        state: from `init_state` or an earlier call; None: x_TD is the whole sequence.
        remat: overrides whether the backward pass recomputes blocks. form: of attention.
        Returns the hidden states [T, D] and the new state with the old position: call `advance`
        once all parts have run.
        """
        position = jnp.zeros((), jnp.int32) if state is None else state["position"]
        new_blocks: dict[str, PyTree] = {}
        for i, stage in enumerate(self.stages[part]):
            x_TD, new_blocks[f"stage{i}"] = run_stage(
                {
                    f"block{j}": self.stacks[f"{part}/stage{i}/block{j}"]
                    for j in range(len(stage.kinds))
                },
                weights[part][f"stage{i}"],
                state and state["blocks"][part][f"stage{i}"],
                x_TD,
                position,
                remat=self.config.remat == "block" if remat is None else remat,
                cast=state is None,
                form=form,
            )
        if state is None:
            return x_TD, None
        blocks = {**state["blocks"], part: new_blocks}
        return x_TD, {**state, "blocks": blocks}

    def head(self, weights: PyTree) -> Array:
        """The output matrix [D, V] in the compute dtype."""
        head_DV = weights["embedding"].T if self.config.tie_embeddings else weights["head"]
        return head_DV.astype(self.compute_dtype)

    def final_norm(self, weights: PyTree, x_TD: Array) -> Array:
        return rms_norm(x_TD, weights["final_norm"]["weight"], self.config.norm_eps)

    def logits(self, weights: PyTree, h_TD: Array) -> Array:
        """Logits [T, V] of hidden states after the last norm, in float32 at least."""
        wide = jnp.promote_types(self.compute_dtype, jnp.float32)
        return jnp.einsum("td,dv->tv", h_TD, self.head(weights), preferred_element_type=wide)

    def nll(self, weights: PyTree, x_TD: Array, target_T: Array, block: int | None = None) -> Array:
        """Negative log-likelihood of the targets given the last block's output, float32 [T].

        block: rows of logits in memory at a time (None: all).
        """
        h_TD, head_DV = self.final_norm(weights, x_TD), self.head(weights)
        if block is None:
            return token_nll(h_TD, head_DV, target_T)
        return token_nll_in_blocks(h_TD, head_DV, target_T, block)

    def apply(self, params: Params, state: PyTree, token_T: Array) -> tuple[Array, PyTree]:
        """(parameters, state, tokens) -> (logits float32 [T, V], state), without inner updates.

        Any split of a sequence into calls gives the same logits and the same final state.
        """
        weights = combine(params.slow, params.fast)
        x_TD = self.embed(params.slow, token_T)
        for part in PARTS:
            x_TD, state = self.run_part(part, weights, state, x_TD)
        logit_TV = self.logits(weights, self.final_norm(weights, x_TD))
        return logit_TV, advance(state, token_T.shape[0])


def build_model(model: ModelConfig, inner: InnerConfig) -> Transformer:
    """The model of a configuration, with the fast weights that the inner loop updates."""
    return Transformer(model, inner.fast_paths, inner.learn_lr)
