"""A model split at its lowest fast weight, into a parallel and a sequential part.

The parallel part runs once over all tokens of a sequence: the prefix, which has no fast weights,
and the mixers of the first suffix block, unless one of their weights is fast. The inner loop runs
the sequential part, everything after it, chunk by chunk.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp

from tttjax.config.model import ModelConfig
from tttjax.models import inner_rates
from tttjax.models.block import Block
from tttjax.models.mixer import AttentionForm
from tttjax.models.stacking import Stack, empty_state, run_stage
from tttjax.models.transformer import Transformer, advance
from tttjax.types import Array, PyTree

MIXING = ("mixer", "pre_conv")  # name prefixes of a block's weights before its MLPs
PartStates = tuple[PyTree, PyTree]  # states of the parallel and of the sequential part
FIRST = "first"  # the segment of row 0 of stage 0, if its mixers are in the parallel part


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of one stage of the suffix; `stacks` by name of the block."""

    stage: str
    rows: slice
    stacks: dict[str, Stack]


@dataclass(frozen=True)
class SplitModel:
    """The two parts of `model` as pure functions, and the weight layout of the sequential part.

    That layout is by segment: `sequential_weights(tree)["suffix"][segment][block]`.
    split_block: False leaves all of the first suffix block in the sequential part, so that no stack
    of weights is cut in two, which copies it.
    """

    model: Transformer
    split_block: bool = True

    @cached_property
    def first_mixers_are_parallel(self) -> bool:
        """Whether the mixers of the first suffix block belong to the parallel part."""
        first = "suffix/stage0/block0/"
        if not self.split_block or first.rstrip("/") not in self.model.stacks:
            return False
        if not self._first_block.caches():
            return False
        mixing = tuple(first + name for name in MIXING)
        return not any(path.startswith(mixing) for path in self.model.fast_paths)

    @cached_property
    def _first_block(self) -> Block:
        return self.model.stacks["suffix/stage0/block0"].module()

    @cached_property
    def _first_mixers(self) -> dict[str, Stack]:
        """The first suffix block without its MLPs, if its mixers are in the parallel part."""
        if not self.first_mixers_are_parallel:
            return {}
        kind = self.model.stages["suffix"][0].kinds[0]
        without_mlp = dataclasses.replace(self.model.config, mlp_dim=0)
        return {"block0": Stack(Block, 1, (kind, False, without_mlp))}

    @cached_property
    def segments(self) -> dict[str, Segment]:
        """The sequential part by name, in the order in which it runs."""
        model, segments = self.model, {}
        config = model.config

        def stack(kind: str, height: int, config: ModelConfig = config) -> Stack:
            return Stack(Block, height, (kind, config.fast_mlp, config))

        for i, stage in enumerate(model.stages["suffix"]):
            rows = slice(0, stage.repeats)
            if i == 0 and self.first_mixers_are_parallel:
                first = {f"block{j}": stack(kind, 1) for j, kind in enumerate(stage.kinds)}
                only_mlps = dataclasses.replace(config, pre_conv=False)
                first["block0"] = stack("none", 1, only_mlps)
                segments[FIRST] = Segment("stage0", slice(0, 1), first)
                rows = slice(1, stage.repeats)
            height = rows.stop - rows.start
            if height:
                stacks = {f"block{j}": stack(kind, height) for j, kind in enumerate(stage.kinds)}
                segments[f"stage{i}"] = Segment(f"stage{i}", rows, stacks)
        return segments

    @cached_property
    def _segments_below_fast_weights(self) -> frozenset[str]:
        """The segments that the inner gradient does not reach."""

        def has_fast_weights(segment: Segment) -> bool:
            return any(p.startswith(f"suffix/{segment.stage}/") for p in self.model.fast_paths)

        below = itertools.takewhile(lambda s: not has_fast_weights(s[1]), self.segments.items())
        return frozenset(name for name, _ in below)

    @property
    def sequential_mixers(self) -> frozenset[str]:
        """Kinds of the sequential part's mixers; `a+b` counts as two."""
        kinds = {
            str(stack.arguments[0])
            for segment in self.segments.values()
            for stack in segment.stacks.values()
        }
        return frozenset(kind for joined in kinds for kind in joined.split("+"))

    # --- weights ------------------------------------------------------------------------------

    def sequential_weights(self, tree: PyTree) -> PyTree:
        """The sequential part of a tree of slow or of fast weights, by segment."""
        stages = tree.get("suffix", {})
        suffix = {}
        for name, segment in self.segments.items():
            blocks = dict(stages.get(segment.stage, {}))
            if name == FIRST and "block0" in blocks:
                block = blocks["block0"]
                blocks["block0"] = {k: w for k, w in block.items() if not k.startswith(MIXING)}
            suffix[name] = jax.tree.map(lambda w, rows=segment.rows: w[rows], blocks)
        outside = ("prefix", "suffix", inner_rates.PART)
        outside_blocks = {name: w for name, w in tree.items() if name not in outside}
        if not self.model.config.tie_embeddings:
            outside_blocks.pop("embedding", None)
        return {**outside_blocks, "suffix": suffix}

    def parallel_weights(self, slow: PyTree) -> PyTree:
        """The slow weights of the parallel part."""
        weights = {name: w for name, w in slow.items() if name in ("embedding", "prefix")}
        if self.first_mixers_are_parallel:
            first = slow["suffix"]["stage0"]["block0"]
            weights["suffix"] = {"stage0": {"block0": _first_row_of_mixers(first)}}
        return weights

    def join(self, tree: PyTree) -> PyTree:
        """The inverse of `sequential_weights` for a tree of fast weights."""
        suffix = dict(tree["suffix"])
        first = suffix.pop(FIRST, None)
        if first is not None and "stage0" in suffix:
            suffix["stage0"] = jax.tree.map(
                lambda a, b: jnp.concatenate((a, b)), first, suffix["stage0"]
            )
        elif first is not None:
            suffix["stage0"] = first
        suffix = {name: blocks for name, blocks in suffix.items() if blocks}
        joined = {**tree, "suffix": suffix}
        return joined if suffix else {k: w for k, w in joined.items() if k != "suffix"}

    # --- functions ----------------------------------------------------------------------------

    def inner_rates(self, slow: PyTree, lr: Array | float) -> Array | PyTree:
        """`Transformer.inner_rates`; a tree is laid out by `sequential_weights`."""
        rates = self.model.inner_rates(slow, lr)
        return self.sequential_weights(rates) if isinstance(rates, dict) else jnp.asarray(rates)

    def run_parallel(self, slow: PyTree, token_T: Array) -> Array:
        """The input of the sequential part for a whole sequence, [T, D]."""
        remat = self.model.config.remat == "block"
        return self._forward_parallel(slow, None, token_T, "dense", remat)[0]

    def extend_parallel(
        self, slow: PyTree, state: PyTree, token_T: Array, form: AttentionForm = "dense"
    ) -> tuple[Array, PyTree]:
        """`run_parallel` for the next T tokens of a sequence, and the new state.

        state: from `init_parallel` or an earlier call. form: of attention (`Attention`); "prefill"
        only for the first tokens.
        """
        x_TD, blocks = self._forward_parallel(slow, state, token_T, form, remat=False)
        return x_TD, advance({**state, "blocks": blocks}, token_T.shape[0])

    def _forward_parallel(
        self, slow: PyTree, state: PyTree | None, token_T: Array, form: AttentionForm, remat: bool
    ) -> tuple[Array, PyTree | None]:
        x_TD = self.model.embed(slow, token_T)
        x_TD, after = self.model.run_part("prefix", slow, state, x_TD, remat=remat, form=form)
        blocks = after and dict(after["blocks"])
        if self._first_mixers:
            first = slow["suffix"]["stage0"]["block0"]
            mixing = _first_row_of_mixers(first)
            mixer_state = state and state["blocks"]["first_mixers"]
            position = jnp.zeros((), jnp.int32) if state is None else state["position"]
            x_TD, mixer_state = run_stage(
                self._first_mixers,
                {"block0": mixing},
                mixer_state,
                x_TD,
                position,
                remat=remat,
                cast=state is None,
                form=form,
            )
            blocks = blocks and {**blocks, "first_mixers": mixer_state}
        return x_TD, blocks

    def init_parallel(self, max_length: int) -> PyTree:
        """The state of the parallel part before the first token."""
        dtype = self.model.compute_dtype
        blocks = self.model.init_state(max_length, parts=["prefix"])["blocks"]
        blocks["first_mixers"] = {
            name: empty_state(stack, max_length, dtype)
            for name, stack in self._first_mixers.items()
        }
        return {"position": jnp.zeros((), jnp.int32), "blocks": blocks}

    def init_sequential(self, max_length: int) -> PyTree:
        """The state of the sequential part before the first token."""
        blocks = {
            name: {
                block: empty_state(stack, max_length, self.model.compute_dtype)
                for block, stack in segment.stacks.items()
            }
            for name, segment in self.segments.items()
        }
        return {"position": jnp.zeros((), jnp.int32), "blocks": blocks}

    @cached_property
    def parallel_caches(self) -> PyTree:
        """The caches of all mixers, in the structure of the parallel part's state `blocks`."""
        prefix = {
            f"stage{i}": {
                f"block{j}": self.model.stacks[f"prefix/stage{i}/block{j}"]
                for j in range(len(stage.kinds))
            }
            for i, stage in enumerate(self.model.stages["prefix"])
        }
        return _caches({"prefix": prefix, "first_mixers": self._first_mixers})

    @cached_property
    def sequential_caches(self) -> PyTree:
        """The caches of all mixers, in the structure of the sequential part's state `blocks`."""
        return _caches({name: segment.stacks for name, segment in self.segments.items()})

    def run_sequential(
        self, weights: PyTree, state: PyTree, x_CD: Array, form: AttentionForm = "dense"
    ) -> tuple[Array, PyTree]:
        """Runs the sequential part over the next C tokens.

        weights: `sequential_weights` of slow and fast combined. form: of attention (`mixer`).
        """
        blocks = {}
        for name, segment in self.segments.items():
            is_below = name in self._segments_below_fast_weights
            x_CD, blocks[name] = run_stage(
                segment.stacks,
                weights["suffix"][name],
                state["blocks"][name],
                x_CD,
                state["position"],
                remat=False,
                cast=form in ("blocked", "blocked_jvp"),
                form="blocked" if form == "blocked_jvp" and is_below else form,
            )
        return x_CD, advance({**state, "blocks": blocks}, x_CD.shape[0])

    def decode_one(
        self, parallel: PyTree, sequential: PyTree, states: PartStates, token: Array
    ) -> tuple[Array, PartStates]:
        """(the last block's output for one token [D], the states for `Cache.append_kv`).

        parallel, sequential: weights of the parts; sequential: slow and fast combined.
        """
        x_1D, new_parallel = self.extend_parallel(parallel, states[0], token[None], "decode")
        x_1D, new_sequential = self.run_sequential(sequential, states[1], x_1D, "decode")
        return x_1D[0], (new_parallel, new_sequential)


def _caches(stacks: PyTree) -> PyTree:
    return jax.tree.map(
        lambda stack: stack.module().caches(), stacks, is_leaf=lambda node: isinstance(node, Stack)
    )


def _first_row_of_mixers(block: PyTree) -> PyTree:
    """The weights before the MLPs in the first row of a stack."""
    mixing = {name: w for name, w in block.items() if name.startswith(MIXING)}
    return jax.tree.map(lambda w: w[:1], mixing)
