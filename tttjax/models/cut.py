"""A model cut at its lowest fast weight: what runs in parallel below, what learns above.

The prefix has no fast weights and runs once over a sequence. So can the mixers of the first suffix
block, if only its MLPs or what comes after them are fast: nothing below them changes while reading.
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp

from tttjax.models.block import Block, BlockShape
from tttjax.models.functional import Stack, empty_state, run_stage
from tttjax.models.transformer import Transformer, advance
from tttjax.types import Array, PyTree

MIXING = ("mixer", "pre_conv")  # how the names begin of a block's weights before its MLPs
ATTENTION_FORMS = ("dense", "once", "twice")
FIRST = "first"  # the segment of the first row of stage 0, where that is apart from the others


@dataclass(frozen=True)
class Segment:
    """Rows of one stage of the suffix that run one after the other, by the name of the stack."""

    stage: str
    rows: slice
    stacks: dict[str, Stack]


@dataclass(frozen=True)
class Cut:
    """The two halves of `model` as pure functions, and the layout of weights for the upper one.

    In that layout the blocks' weights lie by segment: `above(tree)["suffix"][segment][block]`.
    """

    model: Transformer

    @cached_property
    def lifts_mixers(self) -> bool:
        """Whether the mixers of the first suffix block run below."""
        first = "suffix/stage0/block0/"
        if first.rstrip("/") not in self.model.stacks or not self._first_block.keeps():
            return False
        mixing = tuple(first + name for name in MIXING)
        return not any(path.startswith(mixing) for path in self.model.fast_paths)

    @cached_property
    def _first_block(self) -> Block:
        return self.model.stacks["suffix/stage0/block0"].module()

    @cached_property
    def _lifted(self) -> Stack:
        """The first suffix block without its MLPs."""
        kind, shape = self.model.stages["suffix"][0].kinds[0], self.model.shape
        without_mlp = dataclasses.replace(shape, mlp_dim=0)
        return Stack(lambda rngs: Block(kind, False, without_mlp, rngs), 1)

    @cached_property
    def segments(self) -> dict[str, Segment]:
        """The upper half by name, in the order in which it runs."""
        return self._segments_by_form["dense"]

    @cached_property
    def _segments_by_form(self) -> dict[str, dict[str, Segment]]:
        return {form: self._make_segments(form) for form in ATTENTION_FORMS}

    def _make_segments(self, form: str) -> dict[str, Segment]:
        model, found = self.model, {}
        shape = dataclasses.replace(model.shape, attention_form=form)

        def stack(kind: str, height: int, shape: BlockShape = shape) -> Stack:
            return Stack(lambda rngs: Block(kind, model.fast_mlp, shape, rngs), height)

        for i, stage in enumerate(model.stages["suffix"]):
            rows = slice(0, stage.repeats)
            if i == 0 and self.lifts_mixers:
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
        model = self.model
        x_TD, _ = model.run_part("prefix", slow, None, model.embed(slow, token_T))
        if not self.lifts_mixers:
            return x_TD
        first = slow["suffix"]["stage0"]["block0"]
        mixing = {k: w for k, w in first.items() if k.startswith(MIXING)}
        mixing = jax.tree.map(lambda w: w[:1], mixing)
        start = jnp.zeros((), jnp.int32)
        return run_stage(
            {"block0": self._lifted}, {"block0": mixing}, None, x_TD, start, remat=model.remat
        )[0]

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
        kinds = {
            name: {block: stack.module().keeps() for block, stack in segment.stacks.items()}
            for name, segment in self.segments.items()
        }
        blocks = jax.eval_shape(lambda: self.init_state(1))["blocks"]
        return jax.tree.map(
            lambda kind, below: jax.tree.map(lambda _: kind, below),
            kinds,
            blocks,
            is_leaf=lambda node: isinstance(node, str),
        )

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
            )
        return x_CD, advance({**state, "blocks": blocks}, x_CD.shape[0])
