"""A model cut at its lowest fast weight: what runs in parallel below, what learns above.

The prefix has no fast weights and runs once over a sequence. So can the mixers of the first suffix
block, if only its MLPs or what comes after them are fast: nothing below them changes while reading.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from tttjax.models.block import Block, BlockShape
from tttjax.models.stacking import Stack, empty_state, run_stage
from tttjax.models.transformer import Transformer, advance
from tttjax.types import Array, PyTree

MIXING = ("mixer", "pre_conv")  # how the names begin of a block's weights before its MLPs
ATTENTION_FORMS = ("dense", "once", "twice", "start", "one")
PartStates = tuple[PyTree, PyTree]  # the states of the lower and of the upper half
FIRST = "first"  # the segment of the first row of stage 0, where that is apart from the others


@dataclass(frozen=True)
class Segment:
    """Rows of one stage of the suffix that run one after the other, by the name of the stack."""

    stage: str
    rows: slice
    stacks: dict[str, Stack]


@dataclass(frozen=True)
class SplitModel:
    """The two halves of `model` as pure functions, and the layout of weights for the upper one.

    In that layout the blocks' weights lie by segment: `above(tree)["suffix"][segment][block]`.
    """

    model: Transformer

    @cached_property
    def first_mixers_are_parallel(self) -> bool:
        """Whether the mixers of the first suffix block run below."""
        first = "suffix/stage0/block0/"
        if first.rstrip("/") not in self.model.stacks or not self._first_block.keeps():
            return False
        mixing = tuple(first + name for name in MIXING)
        return not any(path.startswith(mixing) for path in self.model.fast_paths)

    @cached_property
    def _first_block(self) -> Block:
        return self.model.stacks["suffix/stage0/block0"].module()

    def _shape(self, form: str) -> BlockShape:
        return dataclasses.replace(self.model.shape, attention_form=form)

    @cached_property
    def _models(self) -> dict[str, Transformer]:
        """The model with each form of attention."""
        return {
            form: dataclasses.replace(self.model, shape=self._shape(form))
            for form in ATTENTION_FORMS
        }

    def _first_mixers(self, form: str) -> dict[str, Stack]:
        """The first suffix block without its MLPs, if its mixers run below."""
        if not self.first_mixers_are_parallel:
            return {}
        kind = self.model.stages["suffix"][0].kinds[0]
        without_mlp = dataclasses.replace(self._shape(form), mlp_dim=0)
        return {"block0": Stack(Block, 1, (kind, False, without_mlp))}

    @cached_property
    def segments(self) -> dict[str, Segment]:
        """The upper half by name, in the order in which it runs."""
        return self._segments_by_form["dense"]

    @cached_property
    def _segments_by_form(self) -> dict[str, dict[str, Segment]]:
        return {form: self._make_segments(form) for form in ATTENTION_FORMS}

    def _make_segments(self, form: str) -> dict[str, Segment]:
        model, found = self.model, {}
        shape = self._shape(form)

        def stack(kind: str, height: int, shape: BlockShape = shape) -> Stack:
            return Stack(Block, height, (kind, model.fast_mlp, shape))

        for i, stage in enumerate(model.stages["suffix"]):
            rows = slice(0, stage.repeats)
            if i == 0 and self.first_mixers_are_parallel:
                first = {f"block{j}": stack(kind, 1) for j, kind in enumerate(stage.kinds)}
                only_mlps = dataclasses.replace(shape, pre_conv=False)
                first["block0"] = stack("none", 1, only_mlps)
                found[FIRST] = Segment("stage0", slice(0, 1), first)
                rows = slice(1, stage.repeats)
            height = rows.stop - rows.start
            if height:
                stacks = {f"block{j}": stack(kind, height) for j, kind in enumerate(stage.kinds)}
                found[f"stage{i}"] = Segment(f"stage{i}", rows, stacks)
        return found

    @property
    def sequential_mixers(self) -> frozenset[str]:
        """Kinds of mixers that read chunk by chunk, joined ones taken apart."""
        kinds = {
            str(stack.arguments[0])
            for segment in self.segments.values()
            for stack in segment.stacks.values()
        }
        return frozenset(kind for joined in kinds for kind in joined.split("+"))

    # --- weights ------------------------------------------------------------------------------

    def above(self, tree: PyTree) -> PyTree:
        """The part of a tree of slow or of fast weights that the upper half reads, by segment."""
        stages = tree.get("suffix", {})
        suffix = {}
        for name, segment in self.segments.items():
            blocks = dict(stages.get(segment.stage, {}))
            if name == FIRST and "block0" in blocks:
                kept = {k: w for k, w in blocks["block0"].items() if not k.startswith(MIXING)}
                blocks["block0"] = kept
            suffix[name] = jax.tree.map(lambda w, rows=segment.rows: w[rows], blocks)
        ends = {name: w for name, w in tree.items() if name not in ("prefix", "suffix")}
        if not self.model.tied:
            ends.pop("embedding", None)
        return {**ends, "suffix": suffix}

    def lower(self, slow: PyTree) -> PyTree:
        """The part of the slow weights that `below` and `extend_parallel` read."""
        kept = {name: w for name, w in slow.items() if name in ("embedding", "prefix")}
        if self.first_mixers_are_parallel:
            first = slow["suffix"]["stage0"]["block0"]
            kept["suffix"] = {"stage0": {"block0": _first_row_of_mixers(first)}}
        return kept

    def join(self, tree: PyTree) -> PyTree:
        """The inverse of `above` for a tree of fast weights."""
        suffix = dict(tree["suffix"])
        first = suffix.pop(FIRST, None)
        if first is not None and "stage0" in suffix:
            rest = suffix["stage0"]
            suffix["stage0"] = jax.tree.map(lambda a, b: jnp.concatenate((a, b)), first, rest)
        elif first is not None:
            suffix["stage0"] = first
        suffix = {name: blocks for name, blocks in suffix.items() if blocks}
        joined = {**tree, "suffix": suffix}
        return joined if suffix else {k: w for k, w in joined.items() if k != "suffix"}

    # --- functions ----------------------------------------------------------------------------

    def below(self, slow: PyTree, token_T: Array) -> Array:
        """What enters the upper half, for all tokens of a sequence at once, [T, D]."""
        return self._run_parallel(slow, None, token_T, "dense", self.model.remat)[0]

    def extend_parallel(
        self, slow: PyTree, state: PyTree, token_T: Array, form: str = "dense"
    ) -> tuple[Array, PyTree]:
        """`below` for T further tokens of a sequence, and the new state.

        state: of `init_parallel`. form: of attention; "start" where nothing has been read yet.
        """
        x_TD, blocks = self._run_parallel(slow, state, token_T, form, remat=False)
        return x_TD, advance({**state, "blocks": blocks}, token_T.shape[0])

    def _run_parallel(self, slow, state: PyTree | None, token_T, form: str, remat: bool):
        model, lifted = self._models[form], self._first_mixers(form)
        x_TD = model.embed(slow, token_T)
        x_TD, after = model.run_part("prefix", slow, state, x_TD, remat=remat)
        blocks = after and dict(after["blocks"])
        if lifted:
            first = slow["suffix"]["stage0"]["block0"]
            mixing = _first_row_of_mixers(first)
            past = state and state["blocks"]["lifted"]
            position = jnp.zeros((), jnp.int32) if state is None else state["position"]
            x_TD, now = run_stage(
                lifted, {"block0": mixing}, past, x_TD, position, remat=remat, cast=state is None
            )
            blocks = blocks and {**blocks, "lifted": now}
        return x_TD, blocks

    def init_parallel(self, max_length: int) -> PyTree:
        """The lower half's state of a sequence of which nothing has been read."""
        dtype = self.model.compute_dtype
        blocks = self.model.init_state(max_length, parts=["prefix"])["blocks"]
        lifted = self._first_mixers("dense").items()
        blocks["lifted"] = {k: empty_state(stack, max_length, dtype) for k, stack in lifted}
        return {"position": jnp.zeros((), jnp.int32), "blocks": blocks}

    def init_state(self, max_length: int) -> PyTree:
        """The upper half's state of a sequence of which nothing has been read."""
        blocks = {
            name: {
                block: empty_state(stack, max_length, self.model.compute_dtype)
                for block, stack in segment.stacks.items()
            }
            for name, segment in self.segments.items()
        }
        return {"position": jnp.zeros((), jnp.int32), "blocks": blocks}

    def keeps(self) -> PyTree:
        """How each array of the state grows (`Block.keeps`), in the structure of its `blocks`."""
        return _kinds(self._sequential_stacks, jax.eval_shape(lambda: self.init_state(1))["blocks"])

    def parallel_kinds(self) -> PyTree:
        """The same for the lower half."""
        return _kinds(
            self._parallel_stacks, jax.eval_shape(lambda: self.init_parallel(1))["blocks"]
        )

    @cached_property
    def _parallel_stacks(self) -> PyTree:
        """The lower half's stacks, in the structure of its state."""
        stages = {
            f"stage{i}": {
                f"block{j}": self.model.stacks[f"prefix/stage{i}/block{j}"]
                for j in range(len(stage.kinds))
            }
            for i, stage in enumerate(self.model.stages["prefix"])
        }
        return {"prefix": stages, "lifted": self._first_mixers("dense")}

    @cached_property
    def _sequential_stacks(self) -> PyTree:
        return {name: segment.stacks for name, segment in self.segments.items()}

    def run(
        self, weights: PyTree, state: PyTree, x_CD: Array, form: str = "dense"
    ) -> tuple[Array, PyTree]:
        """The upper half over C further tokens.

        weights: `above` of slow and fast together. form: of window attention (`Attention`).
        """
        blocks = {}
        for name, segment in self._segments_by_form[form].items():
            x_CD, blocks[name] = run_stage(
                segment.stacks,
                weights["suffix"][name],
                state["blocks"][name],
                x_CD,
                state["position"],
                remat=False,
                cast=form in ("once", "twice"),
            )
        return x_CD, advance({**state, "blocks": blocks}, x_CD.shape[0])

    # --- writing, a token at a time -------------------------------------------------------------

    def opened(self, past: PartStates, now: PartStates, pending: Array, room: int) -> PartStates:
        """The states of both halves for writing up to `room` tokens after `past`.

        now: `past` after `pending` more tokens.
        """

        def half(stacks: PyTree, past: PyTree, now: PyTree) -> PyTree:
            rest = {"first": past["position"], "pending": pending, "room": room}
            blocks = _of_blocks(stacks, "opened", past["blocks"], now["blocks"], **rest)
            return {**now, "blocks": blocks}

        return self._both(half, past, now)

    def closed(self, past: PartStates, states: PartStates, pending: Array) -> PartStates:
        """The states for reading on, from those for writing, `pending` tokens after `past`."""

        def half(stacks: PyTree, past: PyTree, state: PyTree) -> PyTree:
            blocks = past["blocks"], state["blocks"]
            return {**state, "blocks": _of_blocks(stacks, "closed", *blocks, pending=pending)}

        return self._both(half, past, states)

    def decode_one(
        self, lower: PyTree, upper: PyTree, states: PartStates, token: Array
    ) -> tuple[Array, PartStates]:
        """(what the last block gives for one token [D], what is to be `committed` for it).

        lower, upper: the halves' weights, the upper one's of slow and fast together.
        """
        x_1D, below = self.extend_parallel(lower, states[0], token[None], "one")
        x_1D, above = self.run(upper, states[1], x_1D, "one")
        return x_1D[0], (below, above)

    def committed(self, states: PartStates, new: PartStates) -> PartStates:
        """The states of R sequences for writing, after `decode_one` of each.

        Positions are [R], what blocks keep is [L, R, ...], with L layers of a stack.
        """

        def half(stacks: PyTree, state: PyTree, new: PyTree) -> PyTree:
            blocks = state["blocks"], new["blocks"]
            rest = {"position_R": state["position"]}
            return {**new, "blocks": _of_blocks(stacks, "committed", *blocks, by_row=False, **rest)}

        return self._both(half, states, new)

    def _both(self, half: Callable[..., PyTree], *states: PartStates) -> PartStates:
        below, above = zip(*states, strict=True)
        return half(self._parallel_stacks, *below), half(self._sequential_stacks, *above)


def _of_blocks(
    stacks: PyTree, method: str, *states: PyTree, by_row: bool = True, **rest: Any
) -> PyTree:
    """A method of `Block` on the states of all stacks, row by row or of all rows at once."""
    if isinstance(stacks, Stack):
        if not jax.tree.leaves(states):  # a block without a mixer keeps nothing
            return states[0]
        run = partial(getattr(stacks.module(), method), **rest)
        return jax.vmap(run)(*states) if by_row else run(*states)
    return {
        name: _of_blocks(inner, method, *(s[name] for s in states), by_row=by_row, **rest)
        for name, inner in stacks.items()
    }


def _kinds(stacks: PyTree, blocks: PyTree) -> PyTree:
    """`Block.keeps` of every stack, spread over the arrays of `blocks`."""
    kinds = jax.tree.map(
        lambda stack: stack.module().keeps(), stacks, is_leaf=lambda node: isinstance(node, Stack)
    )
    return jax.tree.map(
        lambda kind, below: jax.tree.map(lambda _: kind, below),
        kinds,
        blocks,
        is_leaf=lambda node: isinstance(node, str),
    )


def _first_row_of_mixers(block: PyTree) -> PyTree:
    """Of a stack's weights, what comes before the MLPs of its first row."""
    mixing = {name: w for name, w in block.items() if name.startswith(MIXING)}
    return jax.tree.map(lambda w: w[:1], mixing)
